"""Continued texts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.models.decoder import Decoder
from invivo.models.gla_config import gla_model
from invivo.models.load import random_model
from invivo.training.forward import dense_forward
from invivo.training.sample import continue_texts

SHAPE = gla_model(
    vocab_size=20,
    d_model=16,
    n_layers=2,
    n_heads=2,
    d_ff=16,
    max_positions=70,
    conv_size=3,
    attention_layers=(1,),
)


def decoder() -> Decoder:
    return random_model(SHAPE, seed=3, dtype=torch.float64)


def test_the_likeliest_token_each_time_whatever_stands_beside() -> None:
    model, prompts = decoder(), [[3], list(range(17)), [5] * 69]
    found = continue_texts(model, prompts, 4, temperature=0, seed=0)
    for prompt, more in zip(prompts, found, strict=True):
        text = list(prompt)
        for token in more:
            hidden = dense_forward(model, torch.tensor([text[-70:]]))
            assert int(model.logits(hidden[0, -1:]).argmax()) == token
            text.append(token)
        assert len(more) == 4


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_draws_depend_on_seed_and_prompt_alone(seed: int) -> None:
    model = decoder()
    alone = continue_texts(model, [[1, 2]], 5, temperature=1.0, seed=seed)
    beside = continue_texts(model, [[1, 2], [4]], 5, temperature=1.0, seed=seed)
    assert alone[0] == beside[0]


def test_the_end_is_left_out() -> None:
    model = decoder()
    found = continue_texts(model, [[1, 2], [7]], 6, temperature=0, seed=0)
    end = found[0][3]
    cut = continue_texts(model, [[1, 2], [7]], 6, temperature=0, seed=0, end=end)
    assert cut[0] == found[0][: found[0].index(end)]
    assert end not in cut[1]
