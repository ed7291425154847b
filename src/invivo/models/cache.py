"""What layers keep of past tokens: paged keys and values, and the states of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from invivo.models.config import ModelConfig


@dataclass(slots=True)
class KVCache:
    """Memory of all layers: keys and values in blocks of tokens, states in slots of sequences.

    Attributes:
        k, v: [n_attention_layers, n_blocks, block_size, n_kv_heads, head_dim].
        states: [n_recurrent_layers, n_slots, H, K, V] float32 (float64 for float64 models); slot
            0 is scratch.
        tails: [n_recurrent_layers, n_slots, width, conv_size - 1], the last inputs of the short
            convolution; empty without one.
        recurrent: which layers those of ``states`` are.
        layers: (keys, values) or (states, tails) of each layer, views made once.
    """

    k: torch.Tensor
    v: torch.Tensor
    states: torch.Tensor | None = None
    tails: torch.Tensor | None = None
    recurrent: tuple[int, ...] = ()
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        memory = [(self.k[i], self.v[i]) for i in range(self.k.shape[0])]
        if self.states is not None and self.tails is not None:
            for i, layer in enumerate(self.recurrent):
                memory.insert(layer, (self.states[i], self.tails[i]))
        self.layers = memory

    @property
    def n_blocks(self) -> int:
        return int(self.k.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.k.shape[2])

    @property
    def n_bytes(self) -> int:
        held = [self.k, self.v, *(t for t in (self.states, self.tails) if t is not None)]
        return sum(t.numel() * t.element_size() for t in held)

    def clear_states(self, slots: list[int]) -> None:
        """These sequences begin."""
        for memory in (self.states, self.tails):
            if memory is not None and slots:
                memory[:, slots] = 0.0

    def copy_states(self, pairs: list[tuple[int, int]]) -> None:
        """Copy states from the first to the second slot of each pair; no slot is both.

        One by one: there are few, and a list of indices would have to be sent to the device.
        """
        for memory in (self.states, self.tails):
            if memory is not None:
                for source, target in pairs:
                    memory[:, target].copy_(memory[:, source])

    def copy_block(self, source: int, target: int, tokens: int, layer: int) -> None:
        """Copy keys and values of a block's first tokens, of attention layers from ``layer`` on."""
        for memory in (self.k, self.v):
            memory[layer:, target, :tokens].copy_(memory[layer:, source, :tokens])

    def states_at(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A copy of what these slots hold, for :meth:`put_states`; None without states."""
        if self.states is None or self.tails is None:
            return None
        return self.states[:, slots], self.tails[:, slots]

    def put_states(self, slots: list[int], held: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Put back what :meth:`states_at` gave."""
        if held is not None and self.states is not None and self.tails is not None:
            self.states[:, slots], self.tails[:, slots] = held


def bytes_per_block(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block of ``block_size`` tokens takes over all layers, K and V together."""
    n_layers = config.n_layers - len(config.recurrent)
    per_token = 2 * n_layers * config.n_kv_heads * config.head_dim
    return per_token * block_size * torch.empty((), dtype=dtype).element_size()


def bytes_per_slot(config: ModelConfig, *, dtype: torch.dtype) -> int:
    """Bytes that the states of one sequence take over all recurrent layers."""
    gla = config.gla
    if gla is None:
        return 0
    wide = 8 if dtype == torch.float64 else 4
    state = gla.n_heads * gla.head_k * gla.head_v * wide
    tail = max(0, gla.conv_size - 1) * gla.qkv_width
    return len(config.recurrent) * (state + tail * torch.empty((), dtype=dtype).element_size())


def allocate_kv_cache(
    config: ModelConfig,
    *,
    n_blocks: int,
    block_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    n_slots: int = 1,
) -> KVCache:
    """Zeroed cache of ``n_blocks`` blocks and ``n_slots`` slots for every layer of ``config``."""
    gla, recurrent = config.gla, config.recurrent
    n_attention = config.n_layers - len(recurrent)
    shape = (n_attention, n_blocks, block_size, config.n_kv_heads, config.head_dim)
    k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
    if gla is None or not recurrent:
        return KVCache(k, v)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = (len(recurrent), n_slots, gla.n_heads, gla.head_k, gla.head_v)
    tail = (len(recurrent), n_slots, gla.qkv_width, max(0, gla.conv_size - 1))
    return KVCache(
        k,
        v,
        states=torch.zeros(state, device=device, dtype=wide),
        tails=torch.zeros(tail, device=device, dtype=dtype),
        recurrent=recurrent,
    )
