"""bench/gla_quality.py from text to results with tiny models, and on after its time was over."""

from __future__ import annotations

import importlib
import json
import sys
import tarfile
from pathlib import Path

import pytest
from tests.training.texts import books

pytest.importorskip("matplotlib")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.slow
def test_the_comparison_resumes_and_measures_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("gla_quality")
    text, corpus = tmp_path / "books.txt", tmp_path / "corpus.tar.xz"
    work, out = tmp_path / "work", tmp_path / "out"
    text.write_text(books(20), encoding="utf-8")

    def call(*words: object) -> object:
        monkeypatch.setattr(sys, "argv", ["gla_quality.py", "--work", str(work), *map(str, words)])
        try:
            return bench.main()
        except SystemExit as ended:
            return ended.code

    assert call("--sources", text, "--vocab", 280, "--pack", corpus) is None
    words = ("--prepared", corpus, "--out", out, "--small", "--steps", 2, "--seeds", 1)
    assert call(*words, "--seconds", 0) == 3  # speeds are measured, nothing is trained
    plan = json.loads((work / "results.json").read_text())["plan"]
    assert call(*words, "--seconds", 1000) == 0

    found = json.loads((out / "gla_quality.json").read_text())
    assert found["plan"] == plan
    trained = ("gla-seed0", "transformer-seed0", "recall-gla-seed0", "recall-transformer-seed0")
    assert set(found["runs"]) == {*trained, "recall-gla-conv-seed0", "gla-small"}
    assert {"gla", "transformer", "gla-conv"} <= set(found["recall"])
    for run in found["runs"].values():
        assert (run["status"], run["steps"]) == ("done", 2)
    one, other = (found["runs"][name] for name in trained[:2])
    assert one["tokens"] == other["tokens"]
    gap = found["text"]["gla less transformer"]["value"]
    assert gap == pytest.approx(one["bits_per_byte"] - other["bits_per_byte"])
    tested = {name: run["bits_per_byte"] for name, run in found["test"]["runs"].items()}
    assert tested["gla less transformer-seed0"] == pytest.approx(
        tested["gla-seed0"] - tested["transformer-seed0"]
    )
    assert {row["kind"] for row in found["decode"]} == {"gla", "transformer"}
    memory = {(r["kind"], r["context"]): r["bytes_a_sequence"] for r in found["decode"]}
    assert memory["gla", 16] == memory["gla", 64]
    assert memory["transformer", 64] == 4 * memory["transformer", 16]
    assert [b["last"] for b in found["positions"]["gla-seed0"]] == [64, 128]
    with tarfile.open(out / "runs.tar.gz") as packed:
        names = packed.getnames()
    assert {"text.html", "recall.html", "gla-small/tokenizer.json"} <= set(names)
    assert (out / "gla-small.safetensors").exists()

    figure = importlib.import_module("gla_quality_figure")
    drawn = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["figure", str(out / "runs.tar.gz"), str(drawn)])
    figure.main()
    assert drawn.read_bytes().startswith(b"\x89PNG")
