"""``invivo simulate``: the table, JSON and figure of a small sweep, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

SMALL = ("--seconds", "3", "--rates", "3,6", "--policies", "co-serve,temporal:30,none")


def test_the_table_has_a_row_a_policy_and_rate(invivo: Invivo) -> None:
    ran = invivo("simulate", *SMALL)
    assert ran.code == 0
    assert ran.out.count("co-serve") == ran.out.count("temporal:30") == 2


def test_json_and_figure_of_a_trace(invivo: Invivo, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{i / 4},{20 + i},{10 + i}" for i in range(20)]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,response_tokens", *lines]))
    for kind, start in (("png", b"\x89PNG"), ("html", b"<!doctype html>")):
        figure = tmp_path / f"sweep.{kind}"
        ran = invivo("simulate", *SMALL, "--trace", str(trace), "-o", str(figure), "--json")
        assert figure.read_bytes().startswith(start)
    found = ran.json()
    assert [r["policy"] for r in found] == ["co-serve", "temporal:30", "none"] * 2
    assert found[0]["finetune"] > 0
    assert found[2]["finetune"] == 0


def test_what_makes_no_sense_is_refused_by_field(invivo: Invivo, tmp_path: Path) -> None:
    cases = {
        "policy": ("--policies", "fastest"),
        "--rates": ("--rates", "4,-1"),
        "tpot_ms": ("--tpot-ms", "0"),
        "trace": ("--trace", str(tmp_path / "none.csv")),
        "profile": ("--profile", str(tmp_path / "none.csv")),
        "--out": ("-o", str(tmp_path / "figure.bmp")),
        "--burstiness": ("--burstiness", "0"),
    }
    for field, arguments in cases.items():
        ran = invivo("simulate", "--seconds", "1", "--rates", "2", *arguments)
        assert (ran.code, field in ran.err) == (2, True), ran.err
