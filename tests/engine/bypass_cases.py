"""Bypasses of every kind with random parameters, and a forward pass with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from invivo.engine.bypasses import BypassSpec, checked_specs, shapes
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.bypass import Bypass
from invivo.models.cache import allocate_kv_cache
from invivo.models.config import ModelConfig
from invivo.models.load import LoadedModel
from invivo.models.sites import Taps

# Places that every family of the tests has.
KINDS: dict[str, tuple[BypassSpec, ...]] = {
    "lora": (
        BypassSpec("lora", ("q", "v", "up"), 3, alpha=6.0),
        BypassSpec("lora", ("o", "down"), 2, layers=(0, 1), alpha=4.0),
    ),
    "rslora": (BypassSpec("lora", ("k", "down"), 5, alpha=4.0, rank_stabilized=True),),
    "fused lora": (BypassSpec("lora", ("qkv",), 4),),
    "ia3": (BypassSpec("ia3"), BypassSpec("ia3", ("q", "o", "up"), layers=(1,))),
    "adapter": (
        BypassSpec("adapter", size=4, layers=(0, 1)),
        BypassSpec("adapter", ("resid.mid",), 3, layers=(1,), activation="gelu"),
    ),
    "prefix": (BypassSpec("prefix", size=4),),
    "soft_prompt": (BypassSpec("soft_prompt", size=5),),
    "steering": (BypassSpec("steering"), BypassSpec("steering", ("attn.in",), layers=(1,))),
    "all at once": (
        BypassSpec("lora", ("q", "down"), 3),
        BypassSpec("ia3"),
        BypassSpec("adapter", size=4),
        BypassSpec("steering", ("resid.pre", "mlp.out")),
        BypassSpec("prefix", size=3),
        BypassSpec("soft_prompt", size=2),
    ),
}


def random_parameters(
    config: ModelConfig,
    specs: Sequence[BypassSpec],
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """As after training: nothing is zero, nothing dominates."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for spec in checked_specs(config, specs):
        for name, shape in shapes(config, spec).items():
            value = 0.3 * torch.randn(shape, generator=generator)
            made[name] = (value + 1 if name.endswith(".ia3") else value).to(dtype)
    return made


def logits_of(
    model: LoadedModel, tokens: list[int], bypass: Bypass | None, n_virtual: int
) -> torch.Tensor:
    """[T, V] of a whole sequence, those of its virtual tokens left out."""
    with torch.inference_mode():
        return model.decoder.logits(hidden_of(model, tokens, bypass, n_virtual))


def hidden_of(
    model: LoadedModel,
    tokens: list[int],
    bypass: Bypass | None,
    n_virtual: int,
    *,
    taps: Taps | None = None,
) -> torch.Tensor:
    """[T, d], the final states of the same rows."""
    whole = [0] * n_virtual + tokens
    dtype = next(model.decoder.parameters()).dtype
    cache = allocate_kv_cache(
        model.config,
        n_blocks=blocks_needed([len(whole)]),
        block_size=16,
        device="cpu",
        dtype=dtype,
    )
    layout = contiguous_layout([len(whole)])
    with torch.inference_mode():
        hidden: torch.Tensor = model.decoder(
            torch.tensor(whole), layout, cache, bypass=bypass, taps=taps
        )
    return hidden[n_virtual:]
