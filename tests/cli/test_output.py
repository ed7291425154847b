"""Tables lose nothing, however narrow the place is where they are printed."""

from __future__ import annotations

import pytest

from invivo.cli.output import print_table

ROWS = [["a-name-of-some-length", "the reason for it is a long one", "12,345"]]


def test_a_pipe_gets_one_line_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table("", ["name", "why", "bytes>"], [[cell * 9 for cell in ROWS[0]]])
    lines = capsys.readouterr().out.splitlines()
    assert any(all(cell * 9 in line for cell in ROWS[0]) for line in lines)


def test_a_narrow_terminal_wraps_all_but_the_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    print_table("", ["name", "why", "bytes>"], ROWS)
    out = capsys.readouterr().out
    assert "a-name-of-some-length" in out
    assert "…" not in out
    assert all(word in out for word in ROWS[0][1].split())
    assert "12,345" in out
