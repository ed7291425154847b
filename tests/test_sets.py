"""Sets in prompts: no order can be told from the answer, with rotary and with learned positions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.oracle_lm import oracle_run
from tests.tiny import tiny_loaded

from invivo.engine.config import EngineConfig
from invivo.local import LocalLM
from invivo.marked_prompt import MarkedPrompt

MEMBERS = [" the red dog", " you", " blue cat and hello"]
LOGITS = {"out": [{"capture": "logits", "pos": "@last", "name": "logits"}]}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def lm(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    folder: Path = tmp_path_factory.mktemp("model")
    model = tiny_loaded(folder, request.param, dtype=torch.float64)
    with LocalLM(model, EngineConfig(max_batch_tokens=16)) as made:  # prompts come in chunks
        yield made


def prompt(order, end=" is"):
    return ["Which? ", {"set": [MEMBERS[i] for i in order]}, " or ", {"set": ["a", "bc"]}, end]


def test_every_order_gives_the_same_bits(lm):
    found = [
        lm.run(LOGITS, prompt(order)).array("logits") for order in itertools.permutations(range(3))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    np.testing.assert_allclose(
        found[0], oracle_run(lm, LOGITS, prompt([0, 1, 2])).array("logits"), atol=1e-9
    )


def test_it_is_the_mask_and_the_numbers_that_do_it(lm):
    """Members in any other order in memory give the same numbers, and a plain prompt others."""
    marked = lm.marked(prompt([0, 1, 2]))
    first, members = marked.sets[0], [marked.ids[a:b] for a, b in marked.sets[0]]
    begin, end = min(a for a, _ in first), max(b for _, b in first)
    expected = lm.run(LOGITS, marked).array("logits")
    for order in itertools.permutations(range(3)):
        ids = marked.ids[:begin]
        ranges = [(0, 0)] * 3
        for i in order:
            ranges[i] = (len(ids), len(ids) + len(members[i]))
            ids += members[i]
        other = MarkedPrompt(ids + marked.ids[end:], (tuple(ranges), marked.sets[1]))
        got = lm.run(LOGITS, other).array("logits")
        np.testing.assert_allclose(got, expected, atol=1e-9)
        plain = lm.run(LOGITS, list(other.ids)).array("logits")
        assert not np.allclose(plain, expected, atol=1e-3)


def test_generation_goes_on_behind_the_longest_member(lm):
    greedy = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    done = lm.generate(prompt([2, 0, 1]), **greedy).choices[0]
    marked = lm.marked(prompt([0, 1, 2]))
    ids, sets = marked.ids, marked.sets
    for token, scored in zip(done.tokens, done.logprobs, strict=True):
        measure = {"out": [{"measure": "logprob", "token": token}]}
        expected = oracle_run(lm, measure, MarkedPrompt(ids, sets)).measures[0].values[0]
        assert scored.logprob == pytest.approx(expected, abs=1e-9)
        ids += (token,)


def test_scores_of_what_follows_are_its_log_probabilities(lm):
    context = prompt([1, 0, 2])
    scored = lm.score((context, " red"))
    whole = lm.marked(prompt([1, 0, 2], " is red"))
    n = len(scored.tokens)
    for k, token in enumerate(scored.tokens):
        until = MarkedPrompt(whole.ids[: len(whole.ids) - n + k], whole.sets)
        measure = {"out": [{"measure": "logprob", "token": token.id}]}
        expected = oracle_run(lm, measure, until).measures[0].values[0]
        assert token.logprob == pytest.approx(expected, abs=1e-9)
