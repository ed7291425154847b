"""Running the command line in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model_folder

from invivo.cli.main import main
from invivo.demo.adapters import write_random_adapter


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model."""
    return str(tiny_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def adapter(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a LoRA adapter for it."""
    folder = tmp_path_factory.mktemp("adapter")
    return str(write_random_adapter(folder, Path(tiny), seed=3, strength=4.0))


@pytest.fixture(scope="session")
def url(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server in this process."""
    import invivo
    from invivo.server.run import ServerThread

    state = tmp_path_factory.mktemp("state")
    with invivo.load(tiny, kv_bytes=8 << 20, state=state) as lm, ServerThread(lm) as server:
        yield server.url
