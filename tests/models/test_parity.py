"""Logits equal transformers', for every family and every way through the paged cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.models.oracle import Oracle
from tests.models.pages import Pages, Text, logits_of
from tests.tiny import FAMILIES, tiny_model_folder

from invivo.models.load import LoadedModel, load_model
from invivo.models.rope import long_text_offset

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class Pair:
    """Our model and the oracle, of the same weights and dtype."""

    ours: LoadedModel
    oracle: Oracle
    tolerance: float

    def assert_same(self, tokens: list[int], logits: torch.Tensor) -> None:
        expected = self.oracle.logits(tokens)
        assert expected.std() > 0.3  # a comparison of flat logits would say little
        assert (logits - expected).abs().max().item() < self.tolerance


def make_pair(tmp_path: Path, family: str, dtype: torch.dtype, **overrides: object) -> Pair:
    folder = tiny_model_folder(tmp_path, family, **overrides)
    ours = load_model(str(folder), dtype=dtype)
    return Pair(ours, Oracle(folder, dtype), TOLERANCE[dtype])


@pytest.fixture(
    scope="module",
    params=[(family, dtype) for family in FAMILIES for dtype in TOLERANCE],
    ids=lambda p: f"{p[0]}-{str(p[1]).removeprefix('torch.')}",
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, dtype = request.param
    return make_pair(tmp_path_factory.mktemp(family), family, dtype)


def text(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(290), k=n)


def test_whole_prefill(pair: Pair) -> None:
    tokens = text(41)
    pair.assert_same(tokens, logits_of(pair.ours.decoder, tokens))


def test_chunked_prefill(pair: Pair) -> None:
    tokens = text(41, seed=1)
    pages, one = Pages(pair.ours.decoder), Text(tokens)
    chunks = [pages.run([(one, n)])[0] for n in (11, 1, 17, 8, 4)]
    pair.assert_same(tokens, torch.cat(chunks))


def test_decode_through_the_cache(pair: Pair) -> None:
    tokens = text(30, seed=2)
    pages, one = Pages(pair.ours.decoder), Text(tokens)
    steps = [pages.run([(one, n)])[0] for n in [17, *[1] * 13]]
    pair.assert_same(tokens, torch.cat(steps))


def test_neighbours_in_one_flat_batch(pair: Pair) -> None:
    texts = [Text(text(n, seed=n)) for n in (29, 13, 21, 34, 5)]
    pages = Pages(pair.ours.decoder)
    # Each row: tokens of each text in this iteration; single tokens first, as the engine does.
    plan = [
        {0: 9, 1: 12},
        {1: 1, 0: 7, 2: 15},
        {0: 1, 2: 1, 3: 20},
        {2: 1, 0: 6, 3: 13, 4: 5},
        {0: 1, 3: 1, 2: 4},
        {0: 5},
    ]
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(texts))}
    for iteration in plan:
        results = pages.run([(texts[i], n) for i, n in iteration.items()])
        for i, logits in zip(iteration, results, strict=True):
            found[i].append(logits)
    for i, one in enumerate(texts):
        assert one.n_done == len(one.tokens)
        pair.assert_same(one.tokens, torch.cat(found[i]))


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings(tmp_path: Path, scaling: str, dtype: torch.dtype) -> None:
    parameters = {"rope_theta": 500.0} | SCALINGS[scaling]
    pair = make_pair(tmp_path, "llama", dtype, rope_parameters=parameters)
    tokens = text(50, seed=3)
    pair.assert_same(tokens, logits_of(pair.ours.decoder, tokens))


@pytest.mark.parametrize("n_tokens", [20, 50])
def test_longrope_of_phi3_within_and_beyond_the_pretrained_length(
    tmp_path: Path, n_tokens: int
) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.2],
        "long_factor": [2.0, 9.0],
    }
    pair = make_pair(
        tmp_path,
        "phi3",
        torch.float64,
        rope_parameters=parameters,
        original_max_position_embeddings=32,
    )
    tokens = text(n_tokens, seed=4)
    offset = long_text_offset(pair.ours.config, n_tokens)
    assert (offset > 0) == (n_tokens > 32)
    pages = Pages(pair.ours.decoder)
    pair.assert_same(tokens, pages.run([(Text(tokens), n_tokens)], offset=offset)[0])


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu"}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 20}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gpt2", {"n_inner": 40, "activation_function": "relu"}),
        ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
        ("mixtral", {"sliding_window": 6, "num_experts_per_tok": 3}),
        ("qwen2_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "qkv_bias": False}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0]}),
        ("olmoe", {"clip_qkv": 0.4, "norm_topk_prob": True, "attention_bias": True}),
    ],
    ids=lambda p: p if isinstance(p, str) else "-".join(p),
)
def test_variants_of_families(tmp_path: Path, family: str, overrides: dict[str, object]) -> None:
    pair = make_pair(tmp_path, family, torch.float64, **overrides)
    tokens = text(33, seed=5)
    pair.assert_same(tokens, logits_of(pair.ours.decoder, tokens))
