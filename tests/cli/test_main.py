"""The command as a whole: help, version, errors in one line."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

COMMANDS = (
    ["serve"], ["chat"], ["generate"], ["score"], ["look"], ["explain"], ["bench"], ["demo"],
    ["models"], ["models", "list"], ["models", "pull"], ["models", "info"], ["models", "convert"],
    ["keys"], ["keys", "add"], ["keys", "list"], ["keys", "revoke"],
)  # fmt: skip


def test_version_is_the_package_s(invivo: Invivo) -> None:
    ran = invivo("--version")
    assert (ran.code, ran.out.strip()) == (0, f"invivo {version('invivo')}")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_helps_with_examples(invivo: Invivo, command: list[str]) -> None:
    ran = invivo(*command, "--help")
    assert ran.code == 0
    assert "Examples" in ran.out
    assert f"invivo {command[0]}" in ran.out


def spent(code: str) -> float:
    """Seconds of the processor for a Python process, which a busy machine hardly stretches."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()
    return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def test_help_costs_a_few_times_its_libraries_and_no_torch() -> None:
    """0.3 s against 0.1 s where this was written; importing torch costs 1.4 s."""
    code = (
        "import sys\nfrom invivo.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    spent(code)  # whatever is compiled or read from the disk for the first time
    assert spent(code) < 8 * spent("import typer, rich.console, rich.panel")


def test_unknown_command_is_a_usage_error(invivo: Invivo) -> None:
    ran = invivo("sing")
    assert ran.code == 2
    assert "sing" in ran.err


def test_unknown_option_is_a_usage_error(invivo: Invivo) -> None:
    assert invivo("score", "text", "--loud").code == 2


def test_typed_errors_are_one_line_with_field_value_and_remedy(invivo: Invivo) -> None:
    ran = invivo("bench", "--concurrency", "1,none")
    assert ran.code == 2
    assert ran.err == (
        "error: --concurrency: is not a list of positive numbers (given '1,none'). Write 1,8,32\n"
    )
    assert "Traceback" not in ran.err


def test_a_model_that_does_not_exist_fails_with_a_remedy(invivo: Invivo) -> None:
    ran = invivo("generate", "x", "--model", "./no-such-folder")
    assert ran.code in (1, 2)
    assert ran.err.startswith("error: ")
    assert "no-such-folder" in ran.err


def test_an_extra_that_is_not_installed_is_named(
    invivo: Invivo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delitem(sys.modules, "invivo.server.keys", raising=False)
    ran = invivo("keys", "list")
    assert ran.code == 1
    assert "invivo[serve]" in ran.err


def as_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "invivo.cli", *arguments], check=False, **options)


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        ran = as_process("models", "list", "--json", stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert ran.stderr == b"error: No space left on device\n"


def test_closed_streams_and_readers_that_have_seen_enough_are_no_crash() -> None:
    closed = as_process("--version", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (0, b"")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        gone = as_process("models", "list", "--json", stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (gone.returncode, gone.stderr) == (1, b"")


def test_what_the_machine_refuses_is_one_line(invivo: Invivo, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/locked")

    monkeypatch.setattr("invivo.models.resolve.list_models", refuse)
    ran = invivo("models", "list")
    assert (ran.code, ran.err) == (1, "error: /locked: Permission denied\n")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_remarks_of_examples_fit_a_terminal_of_80_columns(
    invivo: Invivo, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def shown(columns: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", columns)
        text = invivo(*command, "--help").out.split("Examples")[1]
        return [line.strip() for line in text.splitlines()]

    remarks = [line for line in shown("200") if "  " in line or line.startswith("#")]
    assert set(remarks) <= set(shown("80"))


def test_an_address_that_is_none_is_wrongly_asked(invivo: Invivo) -> None:
    ran = invivo("generate", "x", "--url", "localhost:8000")
    assert ran.code == 2
    assert "http://HOST:PORT" in ran.err
