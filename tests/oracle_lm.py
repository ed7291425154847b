"""A LocalLM whose programs run on the eager interpreter: the definition beside the engine."""

from __future__ import annotations

from typing import Any

from invivo.edits.oracle import run_program
from invivo.edits.results import ProgramOutput, RowOutput
from invivo.local import LocalLM
from invivo.program_result import ProgramResult


def oracle_run(lm: LocalLM, program: Any, prompt: Any, **more: Any) -> ProgramResult:
    """``lm.run(program, prompt)`` by the interpreter."""
    more.pop("adapter", None)
    given = lm.programs.given(program, more.get("blobs"), more.get("params"))
    carried = lm.programs.intervention(given, lm.marked(prompt))
    assert carried is not None
    rows = run_program(
        lm.model.decoder, carried.resolved, blobs=carried.blobs, params=carried.params
    )
    output = ProgramOutput([RowOutput(r.row, r.captures, r.measures) for r in rows])
    return lm.programs.result(output, carried)


class OracleLM:
    """Passes everything on to ``lm`` but :meth:`run`."""

    def __init__(self, lm: LocalLM) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def run(self, program: Any, prompt: Any, **more: Any) -> ProgramResult:
        return oracle_run(self._lm, program, prompt, **more)
