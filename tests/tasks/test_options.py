"""Scores of options are those of the plain scoring call."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_loaded

from invivo.local import LocalLM
from invivo.tasks.options import OptionScores, best, score_options


def test_options_of_any_length_are_scored_after_every_context(tmp_path) -> None:
    with LocalLM(tiny_loaded(tmp_path, dtype=torch.float64)) as lm:
        contexts = [lm.tokenize("the cat is"), lm.tokenize("hello world and you are")]
        options = [lm.tokenize(" red"), lm.tokenize(" a blue dog"), lm.tokenize(" x")]
        found = score_options(lm, contexts, options)
        for context, scores in zip(contexts, found, strict=True):
            for option, logprobs, total in zip(options, scores.tokens, scores.sums, strict=True):
                alone = lm.score((context, option))
                assert len(logprobs) == len(option)
                assert total == pytest.approx(alone.logprob, abs=1e-9)
                assert logprobs == pytest.approx([t.logprob for t in alone.tokens], abs=1e-9)


def test_sums_means_and_the_best() -> None:
    scores = OptionScores(((-1.0, -2.0), (-2.5,)))
    assert scores.sums == [-3.0, -2.5]
    assert scores.means == [-1.5, -2.5]
    assert (best(scores.sums), best(scores.means), best([0.0, 0.0])) == (1, 0, 0)
