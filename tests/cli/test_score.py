"""``invivo score`` on a tiny model."""

from __future__ import annotations

import json
import math
from ast import literal_eval
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import invivo as library

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

TEXT = "the cat and the dog. you are not red, world"


def test_the_figures_agree_with_the_library(invivo: Invivo, tiny: str) -> None:
    with library.load(tiny, kv_bytes=8 << 20) as lm:
        expected = lm.score(TEXT)
        first = lm.detokenize(lm.tokenize(TEXT)[:1])
    got = invivo("score", TEXT, "-m", tiny, "--json").json()
    assert got["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
    assert got["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert got["tokens"] == len(expected.tokens)
    assert got["bytes"] == len(TEXT) - len(first)
    assert got["bits_per_byte"] == pytest.approx(-got["logprob"] / math.log(2) / got["bytes"])


def test_windows_score_every_token_once(invivo: Invivo, tiny: str) -> None:
    whole = invivo("score", TEXT, "-m", tiny, "--json", "--tokens").json()
    parts = invivo(
        "score", TEXT, "-m", tiny, "--json", "--tokens", "--window", "7", "--overlap", "3"
    ).json()
    assert [t["id"] for t in parts["token_list"]] == [t["id"] for t in whole["token_list"]]
    assert parts["bytes"] == whole["bytes"]
    # The first window has the same context as the whole.
    for mine, theirs in zip(parts["token_list"][:6], whole["token_list"][:6], strict=True):
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


def test_a_text_longer_than_the_context_is_scored(invivo: Invivo, tiny: str) -> None:
    got = invivo("score", "-m", tiny, "--json", stdin=TEXT * 20).json()
    assert got["tokens"] > 256


def test_after_a_context_all_bytes_count(invivo: Invivo, tiny: str) -> None:
    got = invivo("score", "red", "--context", "the cat is ", "-m", tiny, "--json").json()
    assert got["bytes"] == len(" red")


def test_a_batch_is_scored_here_and_over_http(
    invivo: Invivo, tiny: str, url: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    records = [{"id": "a", "text": TEXT}, {"id": "b", "context": "the", "text": " cat"}]
    source.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    here = invivo("score", "-i", str(source), "-m", tiny)
    there = invivo("score", "-i", str(source), "--url", url)
    assert here.code == there.code == 0
    mine = {line["id"]: line for line in here.lines()}
    theirs = {line["id"]: line for line in there.lines()}
    assert mine.keys() == theirs.keys() == {"a", "b"}
    for name, line in mine.items():
        assert line["logprob"] == pytest.approx(theirs[name]["logprob"], abs=1e-4)
    assert "2 texts" in here.err
    alone = invivo("score", TEXT, "-m", tiny, "--json").json()
    assert mine["a"]["logprob"] == pytest.approx(alone["logprob"], abs=1e-4)
    assert mine["a"]["bytes"] == alone["bytes"]


def test_tokens_are_shown(invivo: Invivo, tiny: str) -> None:
    ran = invivo("score", TEXT, "-m", tiny, "--tokens")
    assert "perplexity" in ran.out
    tokens = [line.split(maxsplit=1)[1] for line in ran.out.splitlines() if "'" in line]
    assert TEXT.endswith("".join(map(literal_eval, tokens)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a"], "fewer than two tokens"),
        ([TEXT, "--window", "4", "--overlap", "4"], "--overlap"),
        ([TEXT, "--file", "x"], "one of TEXT"),
    ],
)
def test_what_cannot_be_scored_is_a_usage_error(
    invivo: Invivo, tiny: str, arguments: list[str], text: str
) -> None:
    ran = invivo("score", *arguments, "-m", tiny)
    assert ran.code == 2
    assert text in ran.err
