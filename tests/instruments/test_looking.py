"""Lens, direct attribution and attention patterns: what they read is what the model computes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.models.gla_models import tiny_decoder
from tests.oracle_lm import OracleLM
from tests.tiny import tiny_loaded, tiny_model_folder
from transformers import AutoTokenizer

from invivo.errors import InvalidRequest
from invivo.instruments.attention_pattern import attention_pattern
from invivo.instruments.direct_attribution import direct_attribution
from invivo.instruments.logit_lens import logit_lens
from invivo.local import LocalLM
from invivo.models.load import LoadedModel

PROMPT = "the cat is red and the dog"
FAMILIES = ["llama", "gemma2", "gpt2", "olmo2", "qwen2_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def local(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_loaded(folder, request.param, dtype=torch.float64)
    with LocalLM(model) as lm:
        yield lm


@pytest.fixture(params=["oracle", "engine"])
def lm(request, local):
    return OracleLM(local) if request.param == "oracle" else local


def test_the_lens_of_the_last_layer_is_the_models_own_answer(lm):
    lens = logit_lens(lm, PROMPT, top=3)
    n = lm.model.config.n_layers
    assert lens.layers == list(range(n))
    assert "".join(lens.tokens) == PROMPT
    assert lens.logprobs.shape == lens.ids.shape == lens.words.shape == (n, len(lens.tokens), 3)
    assert (np.diff(lens.logprobs, axis=-1) <= 0).all()
    answer = lm.generate(PROMPT, max_tokens=1, temperature=0, logprobs=1)
    assert lens.ids[-1, -1, 0] == answer.choices[0].tokens[0]
    assert lens.logprobs[-1, -1, 0] == pytest.approx(answer.choices[0].logprobs[0].logprob)
    assert lens.words[-1, -1, 0] == lm.detokenize([int(lens.ids[-1, -1, 0])])


@pytest.mark.parametrize("minus", [None, " cat"])
def test_shares_add_up_to_the_logit(lm, minus):
    found = direct_attribution(lm, PROMPT, minus=minus)
    config = lm.model.config
    assert found.heads.shape == (config.n_layers, config.n_heads)
    # attn, heads and bias, and the whole, are sums by definition; the biases must be the weights'.
    head = lm.model.decoder.head if lm.model.decoder.head is not None else lm.model.decoder.embed
    read = head[found.token] - (0 if found.minus is None else head[found.minus])
    constant = 0.0
    if config.norm == "layer":
        constant = float(read @ lm.model.decoder.final_norm.bias)
    assert found.constant == pytest.approx(constant, abs=1e-9)
    if not config.o_bias:
        np.testing.assert_allclose(found.bias, 0, atol=1e-9)
    total = found.embed + np.nansum(found.heads) + found.bias.sum() + found.mlp.sum()
    assert total + constant == pytest.approx(found.logit, abs=1e-9)


def test_the_logit_is_that_of_the_likeliest_token(lm):
    found = direct_attribution(lm, PROMPT)
    measures = [
        {"measure": "logit", "token": found.token},
        {"measure": "rank", "token": found.token},
    ]
    logit, rank = (m.values[0] for m in lm.run({"out": measures}, PROMPT).measures)
    cap = lm.model.config.logit_softcap
    assert rank == 0
    assert logit == pytest.approx(found.logit if cap is None else cap * np.tanh(found.logit / cap))
    assert (found.at, found.word) == (" dog", lm.detokenize([found.token]))
    assert len(found.largest(4)) == 4
    assert abs(found.largest(4)[0][1]) >= abs(found.largest(4)[3][1])


def test_patterns_are_distributions_over_what_can_be_seen(lm):
    found = attention_pattern(lm, PROMPT, pos="@prompt")
    n = len(found.keys)
    config = lm.model.config
    assert found.probs.shape == (config.n_layers, config.n_heads, n, n)
    np.testing.assert_allclose(found.probs.sum(-1), 1, atol=1e-9)
    assert (found.probs[..., *np.triu_indices(n, 1)] == 0).all()
    one = attention_pattern(lm, PROMPT, at="layers.1.attn.head.2.prob")
    assert (one.layers, one.heads, one.queries) == ([1], [2], [" dog"])
    np.testing.assert_allclose(one.probs[0, 0, 0], found.probs[1, 2, -1], atol=1e-9)


def test_edits_are_in_place_while_looking(lm):
    # Without any layer the lens reads the embedding everywhere.
    skip = {"steps": [{"at": "layers.*", "do": "skip"}], "out": [{"measure": "logit", "token": 1}]}
    lens = logit_lens(lm, PROMPT, edits=skip, top=1)
    assert (lens.ids == lens.ids[:1]).all()
    with pytest.raises(InvalidRequest, match="one program at a time"):
        logit_lens(lm, PROMPT, edits={"sweep": {"L": [0, 1]}})
    with pytest.raises(InvalidRequest, match="one position"):
        direct_attribution(lm, PROMPT, pos="@prompt")


def test_everything_can_be_written_as_json(lm):
    for one in (
        logit_lens(lm, PROMPT),
        direct_attribution(lm, PROMPT),
        attention_pattern(lm, PROMPT),
    ):
        assert isinstance(one.to_dict(), dict)


@pytest.mark.parametrize("shape", ["plain", "hybrid"])
def test_recurrent_layers_have_a_share_as_a_whole(shape, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder(tmp_path))
    decoder = tiny_decoder(shape, vocab_size=len(tokenizer))
    model = LoadedModel(shape, tmp_path, decoder.config, decoder, tokenizer, "fingerprint")
    with LocalLM(model) as lm:
        found = direct_attribution(lm, PROMPT)
        assert found.constant == pytest.approx(0, abs=1e-9)  # all that is written adds up
        assert np.isnan(found.heads[0]).all()
        assert ("layers.0.attn", found.attn[0]) in found.largest(99)
        if shape == "hybrid":
            assert found.bias[1] == pytest.approx(0, abs=1e-9)
        assert found.to_dict()["bias"][0] is None
        assert len(logit_lens(lm, PROMPT).layers) == 3
