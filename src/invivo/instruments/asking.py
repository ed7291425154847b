"""What the instruments here ask of a model beside the edits that a user wants in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from invivo.errors import InvalidRequest
from invivo.lm import LM, Blobs, ProgramLike
from invivo.program_body import program_body
from invivo.program_result import Capture, ProgramResult


def ask(
    lm: LM,
    prompt: Any,
    outputs: Sequence[Mapping[str, Any]],
    *,
    edits: ProgramLike = None,
    blobs: Blobs | None = None,
    adapter: str | None = None,
) -> ProgramResult:
    """Bring ``outputs`` back from ``prompt`` while ``edits`` are in place.

    Args:
        edits: a program; its own outputs are left out.

    Raises:
        InvalidRequest: the program has a sweep, which would give one answer for each row.
    """
    body: Any = {} if edits is None else edits
    written, tensors = program_body(body)
    if isinstance(written, str):
        written = lm.stored_program(written)
    if written.get("sweep"):
        raise InvalidRequest(
            "an instrument looks at one program at a time",
            field="sweep",
            given=written["sweep"],
            remedy="Use lm.run for a sweep",
        )
    program = {**written, "out": [dict(one) for one in outputs]}
    result: ProgramResult = lm.run(
        program, prompt, blobs={**tensors, **(blobs or {})}, adapter=adapter
    )
    return result


def named(result: ProgramResult, name: str) -> list[Capture]:
    """The captures of one output, in the order of the layers."""
    return [capture for capture in result.captures if capture.name == name]
