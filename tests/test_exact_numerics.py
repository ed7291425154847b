"""Law 12: with ``"numerics": "exact"`` the bits of a row do not depend on the batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.models.gla_models import tiny_decoder
from tests.tiny import tiny_loaded, tiny_model_folder
from transformers import AutoTokenizer

from invivo.errors import InvalidRequest
from invivo.local import LocalLM
from invivo.models.load import LoadedModel

OUT = [
    {"capture": "logits", "pos": "@all", "name": "logits"},
    {"capture": "layers.1.resid.post", "pos": "@all", "name": "stream"},
]
EDIT = {"at": "layers.1.attn.head.*.z", "pos": "@last", "do": "scale", "a": 0.5}
EXACT: dict[str, Any] = {"numerics": "exact", "steps": [EDIT], "out": OUT}
PROMPTS = ["the cat is red", "hello world and you", "the dog", "not the red cat of the blue world"]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "qwen2_moe", "hybrid gla"])
def lm(request, tmp_path_factory) -> Iterator[LocalLM]:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "hybrid gla":
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(folder))
        decoder = tiny_decoder("hybrid", vocab_size=len(tokenizer)).float()
        model = LoadedModel("gla", folder, decoder.config, decoder, tokenizer, "fingerprint")
    else:
        model = tiny_loaded(folder, request.param, dtype=torch.float32)
    with LocalLM(model) as made:
        yield made


def bits(result: Any) -> bytes:
    return b"".join(result.array(name).tobytes() for name in ("logits", "stream"))


@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(order=st.permutations(range(len(PROMPTS))), n=st.integers(1, 4), writing=st.booleans())
def test_law_12_no_batch_and_no_order_changes_a_bit(lm, order, n, writing):
    alone = [bits(lm.run(EXACT, prompt)) for prompt in PROMPTS]
    chosen = order[:n]
    # Meanwhile the engine may be in the middle of something else.
    stream = lm.stream("the", max_tokens=40, ignore_eos=True) if writing else iter([None])
    next(stream)
    together = lm.run(EXACT, [PROMPTS[i] for i in chosen])
    for i, result in zip(chosen, together, strict=True):
        assert bits(result) == alone[i]
        assert result.meta["numerics"] == "exact"
    stream.close() if writing else None


def test_law_12_callers_at_the_same_time(lm):
    alone = [bits(lm.run(EXACT, prompt)) for prompt in PROMPTS]
    found: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: bits(lm.run(EXACT, PROMPTS[i]))}))
        for i in range(len(PROMPTS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == alone


def test_fast_and_exact_say_the_same_within_the_tolerance(lm):
    fast = {**EXACT, "numerics": "fast"}
    for prompt in PROMPTS:
        one, other = lm.run(fast, prompt), lm.run(EXACT, prompt)
        np.testing.assert_allclose(one.array("logits"), other.array("logits"), rtol=1e-4, atol=1e-4)


def test_what_shares_a_batch_by_nature_refuses_it(lm):
    program = {"numerics": "exact", "steps": [EDIT]}
    for call in (
        lambda: lm.generate("the", interventions=program, max_tokens=2),
        lambda: lm.score(("the", " cat"), interventions=program),
    ):
        with pytest.raises(InvalidRequest, match="round together") as refused:
            call()
        assert "run" in refused.value.remedy
