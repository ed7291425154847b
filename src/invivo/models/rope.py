"""Tables of rotary angles: default, linear, dynamic, llama3, yarn and longrope frequencies.

A table has one row a position. It is computed in float32 for half precisions too, because that is
how the checkpoints were trained, and in float64 for a float64 model. The formulas are those of the
papers: linear position interpolation (Chen et al., 2023), Llama 3.1's piecewise scaling (Dubey et
al., 2024), YaRN (Peng et al., 2023), LongRoPE (Ding et al., 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from invivo.errors import UnsupportedModel
from invivo.models.config import ModelConfig, RopeConfig


def rope_frequencies(
    rope: RopeConfig,
    *,
    max_positions: int,
    long: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, float]:
    """Angle per position of every turning pair, and the factor on cosine and sine.

    ``dynamic`` scaling only changes frequencies of texts longer than ``max_positions``, which
    the engine does not admit: here it equals the default.

    Args:
        rope: what to compute.
        max_positions: the model's context, from which some scalings derive their factor.
        long: for ``longrope``, the set for texts above the pretrained length.

    Returns:
        ([rotary_dim / 2] of ``dtype``, factor).

    Raises:
        UnsupportedModel: unknown ``rope_type``.
    """
    dim = rope.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(dtype) / dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.scaling is None:
        return inverse, 1.0
    scaling: dict[str, Any] = dict(rope.scaling)
    kind = scaling["rope_type"]
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "dynamic":
        return inverse, 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    if kind == "yarn":
        return _yarn(rope, exponents, scaling, max_positions)
    if kind == "longrope":
        return _longrope(rope, exponents, scaling, max_positions, long)
    raise UnsupportedModel("unknown kind of rotary embedding", field="rope_type", given=kind)


def _llama3(inverse: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inverse / factor + blend * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, blended)
    return torch.where(wavelength < original / high, inverse, scaled)


def _yarn(
    rope: RopeConfig, exponents: torch.Tensor, scaling: dict[str, Any], max_positions: int
) -> tuple[torch.Tensor, float]:
    dim, base = rope.rotary_dim, rope.theta
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original

    def attention_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def dimension_of(turns: float) -> float:
        """The (fractional) pair that turns this often within the pretrained length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = attention_scale(mscale) / attention_scale(mscale_all)
        else:
            attention_factor = attention_scale(1.0)
    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=exponents.dtype) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    powers = base**exponents
    return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept, float(attention_factor)


def _longrope(
    rope: RopeConfig,
    exponents: torch.Tensor,
    scaling: dict[str, Any],
    max_positions: int,
    long: bool,
) -> tuple[torch.Tensor, float]:
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = (
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        )
    chosen = scaling["long_factor" if long else "short_factor"]
    stretch = torch.tensor(chosen, dtype=exponents.dtype)
    return 1.0 / (stretch * rope.theta**exponents), float(attention_factor)


def rope_table(
    rope: RopeConfig,
    *,
    max_positions: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all positions, each [rows, rotary_dim / 2] of ``dtype``.

    ``rows`` is ``max_positions``; with ``longrope`` twice that, first the angles for texts within
    the pretrained length, then those for longer ones (see :func:`long_text_offset`).
    """
    sets = (False, True) if is_longrope(rope) else (False,)
    cos, sin = [], []
    positions = torch.arange(max_positions, dtype=dtype, device=device)
    for long in sets:
        inverse, factor = rope_frequencies(
            rope, max_positions=max_positions, long=long, dtype=dtype
        )
        angles = positions[:, None] * inverse.to(device)[None, :]
        cos.append(angles.cos() * factor)
        sin.append(angles.sin() * factor)
    return torch.cat(cos), torch.cat(sin)


def is_longrope(rope: RopeConfig) -> bool:
    return rope.scaling is not None and ("rope_type", "longrope") in rope.scaling


def long_text_offset(config: ModelConfig, n_tokens: int) -> int:
    """What to add to the positions of a sequence that will grow to ``n_tokens``.

    LongRoPE models turn all tokens of a text by one set of angles when it stays within the
    pretrained length and by another set when it grows beyond. The table holds both, one after the
    other, so the choice is an offset of the sequence's positions; 0 for every other model.
    """
    for rope in config.ropes:
        if is_longrope(rope):
            original: int = dict(rope.scaling or ())["original_max_position_embeddings"]
            return config.max_positions if n_tokens > original else 0
    return 0
