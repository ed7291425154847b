"""Paged keys and values: the memory that attention layers share between requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from invivo.models.config import ModelConfig


@dataclass(slots=True)
class KVCache:
    """Keys and values of all attention layers, in blocks of ``block_size`` tokens.

    Attributes:
        k, v: [n_layers, n_blocks, block_size, n_kv_heads, head_dim].
        layers: (keys, values) of each layer, views of ``k`` and ``v`` made once.
    """

    k: torch.Tensor
    v: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [(self.k[i], self.v[i]) for i in range(self.k.shape[0])]

    @property
    def n_blocks(self) -> int:
        return int(self.k.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.k.shape[2])

    @property
    def n_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()


def bytes_per_block(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block of ``block_size`` tokens takes over all layers, K and V together."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return per_token * block_size * torch.empty((), dtype=dtype).element_size()


def allocate_kv_cache(
    config: ModelConfig,
    *,
    n_blocks: int,
    block_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> KVCache:
    """Zeroed cache of ``n_blocks`` blocks for every layer of ``config``."""
    shape = (config.n_layers, n_blocks, block_size, config.n_kv_heads, config.head_dim)
    return KVCache(
        k=torch.zeros(shape, device=device, dtype=dtype),
        v=torch.zeros(shape, device=device, dtype=dtype),
    )
