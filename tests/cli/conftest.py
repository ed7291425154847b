"""Running the command line in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from invivo.cli.main import main


@dataclass(slots=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Invivo = Callable[..., Ran]


@pytest.fixture
def invivo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invivo:
    """``invivo("score", "text", stdin="...")`` runs the command and returns a :class:`Ran`."""
    for name in ("INVIVO_MODEL", "INVIVO_URL", "INVIVO_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        code = ended.value.code
        captured = capsys.readouterr()
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
