"""Random models of a few thousand parameters, prompts over a made-up vocabulary, one-line runs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from invivo.edits.blobs import Blobs
from invivo.edits.oracle import RowResult, run_program
from invivo.edits.program import parse_program
from invivo.edits.prompt_text import PromptText, prompt_of_pieces
from invivo.edits.resolve import resolve
from invivo.edits.resolved import ResolvedProgram
from invivo.models.config import LayerConfig, ModelConfig, MoEConfig, RopeConfig
from invivo.models.decoder import Decoder
from invivo.models.load import random_model

_PLAIN = ModelConfig(
    family="llama",
    vocab_size=40,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_ff=24,
    max_positions=64,
    layers=(LayerConfig(), LayerConfig(), LayerConfig()),
    ropes=(RopeConfig(10_000.0, 4),),
)

CONFIGS: dict[str, ModelConfig] = {
    "llama": _PLAIN,
    "gemma": replace(
        _PLAIN,
        family="gemma2",
        layers=(LayerConfig(window=5), LayerConfig(), LayerConfig(window=5)),
        post_norm=True,
        norm_unit_offset=True,
        activation="gelu_tanh",
        attn_softcap=3.0,
        logit_softcap=4.0,
        embed_scale=4.0,
        tie_embeddings=True,
        qk_norm="head",
    ),
    "gpt2": replace(
        _PLAIN,
        family="gpt2",
        n_kv_heads=4,
        layers=(LayerConfig(rope=None),) * 3,
        ropes=(),
        learned_positions=True,
        norm="layer",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    ),
    "moe": replace(
        _PLAIN,
        family="qwen2_moe",
        layers=(
            LayerConfig(feedforward="moe"),
            LayerConfig(),
            LayerConfig(feedforward="moe"),
        ),
        qkv_bias=True,
        moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, normalize_weights=False, d_shared=8),
    ),
    "olmo2": replace(
        _PLAIN, family="olmo2", pre_norm=False, post_norm=True, qk_norm="full", n_kv_heads=2
    ),
}


@cache
def model(name: str, seed: int = 0) -> Decoder:
    """A float64 model with weights large enough that nothing is nearly uniform."""
    decoder = random_model(CONFIGS[name], dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
        else:
            parameter.data *= 1.5
    return decoder


def words(ids: Sequence[int], **fields: Any) -> PromptText:
    """A prompt whose token i reads " wi"."""
    return prompt_of_pieces([(i, f" w{i}") for i in ids], **fields)


def encode(text: str) -> list[int]:
    return [int(piece.removeprefix("w")) for piece in text.split()]


def random_ids(seed: int, n: int = 9) -> list[int]:
    return random.Random(seed).choices(range(40), k=n)


MAIN, OTHER = words(random_ids(1)), words(random_ids(2))


def resolved(
    decoder: Decoder,
    program: Mapping[str, Any],
    prompts: Mapping[str, PromptText] | None = None,
    blobs: Blobs | None = None,
) -> ResolvedProgram:
    """``program`` for the main prompt; the other run is called cf unless prompts are given."""
    data = dict(program)
    if prompts is None:
        prompts = {"main": MAIN, "cf": OTHER}
        data = {"runs": {"cf": {"prompt": "other"}}} | data
    return resolve(parse_program(data), decoder.config, prompts, blobs=blobs, encode=encode)


def run_rows(
    decoder: Decoder,
    program: Mapping[str, Any],
    prompts: Mapping[str, PromptText] | None = None,
    blobs: Blobs | None = None,
    **more: Any,
) -> list[RowResult]:
    return run_program(decoder, resolved(decoder, program, prompts, blobs), blobs=blobs, **more)


def run(
    decoder: Decoder,
    program: Mapping[str, Any],
    prompts: Mapping[str, PromptText] | None = None,
    blobs: Blobs | None = None,
    **more: Any,
) -> RowResult:
    """The only row."""
    (row,) = run_rows(decoder, program, prompts, blobs, **more)
    return row


def plain_logits(decoder: Decoder, prompt: PromptText = MAIN) -> torch.Tensor:
    return run(decoder, {}, {"main": prompt}).logits["main"]


def captured(result: RowResult, name: str) -> dict[int, torch.Tensor]:
    """The values of one output by layer."""
    return {c.ref.ref.layer: c.value for c in result.captures if c.ref.name == name}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
