"""A decoder over several processes by heads and neurons: tensor parallelism.

After Shoeybi et al. (2019, arXiv 1909.08053, section 3). A process holds H / n heads and f / n
neurons of every layer and runs a layer that is narrower by as much; what the layer's two halves
add to the residual stream is summed over the processes. Queries, keys and values are rows of one
matrix, gate and up of another: their rows are *dealt*, so that a process's part has its own rows
of each. Parameters are DTensors, placements and collectives torch's; the decoder itself knows
nothing of it.

Embedding, positions and head are kept by columns and gathered where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.func import functional_call

from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder, Layer
from invivo.sharding.moves import entered, local_weight, moved, replicated, spread
from invivo.sharding.parallel_plan import State
from invivo.sharding.placed_lora import PlacedLora
from invivo.training.forward import Table, linear_map, run_layer
from invivo.training.loss_model import LossModel, TextLayer
from invivo.training.shape import check_divisible
from invivo.training.texts import Texts

# The states of what a map reads and gives. gate_a is narrow: every process computes all of it.
COLUMNS, ROWS = (State.REPLICATED, State.FEATURES), (State.FEATURES, State.PARTIAL)
STATES = {
    **dict.fromkeys(("qkv", "gate_up", "up", "r", "gate_b"), COLUMNS),
    **dict.fromkeys(("o", "down"), ROWS),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a parameter lies over the processes.

    Attributes:
        sections: rows of the matrices that lie below each other in it, and are dealt out one by
            one; none where it is not dealt.
        use: the placement in which it is used; None: its own.
        gradient: the placement of the gradient where it is used; None: that of ``use``.
    """

    placement: Placement
    sections: tuple[int, ...] = ()
    use: Placement | None = None
    gradient: Placement | None = None


def layout_of(config: ModelConfig, name: str) -> Layout:
    """How the decoder's parameter ``name`` lies."""
    path = name.split(".")
    kind, everywhere = path[-1], Layout(Replicate())
    if path[0] != "layers":
        gathered = Layout(Shard(1), use=Replicate())
        return gathered if kind in ("embed", "positions", "head") else everywhere
    if path[2] == "feedforward":
        if kind.startswith("gate_up"):
            return Layout(Shard(0), (config.d_ff, config.d_ff))
        if kind.startswith("up"):
            return Layout(Shard(0), (config.d_ff,))
        return Layout(Shard(1)) if kind == "down" else everywhere
    if path[2] != "mixer" or kind in ("o_bias", "gate_a"):
        return everywhere
    if kind == "o":
        return Layout(Shard(1))
    if kind in ("q_norm", "k_norm", "norm"):  # of each head, and a process sees its own heads
        return Layout(Replicate(), gradient=Partial())
    q, k, v = _widths(config, int(path[1]))
    sections = {"r": (v,), "gate_b": (k,), "gate_b_bias": (k,)}
    return Layout(Shard(0), sections.get(kind, (q, k, v)))


def _widths(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Of all queries, keys and values."""
    if config.layers[layer].mixer == "gla":
        assert config.gla is not None
        return config.gla.k_width, config.gla.k_width, config.gla.v_width
    kv = config.n_kv_heads * config.head_dim
    return config.n_heads * config.head_dim, kv, kv


def dealt(whole: torch.Tensor, sections: tuple[int, ...], processes: int) -> torch.Tensor:
    """Rows in the order in which their n equal parts are those of the processes."""
    parts = [part.unflatten(0, (processes, -1)) for part in whole.split(sections)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def in_order(rows: torch.Tensor, sections: tuple[int, ...], processes: int) -> torch.Tensor:
    """The inverse of :func:`dealt`."""
    own = rows.unflatten(0, (processes, -1)).split([s // processes for s in sections], dim=1)
    return torch.cat([part.flatten(0, 1) for part in own])


def place_of(config: ModelConfig, layer: int, part: str) -> tuple[str, int] | None:
    """The linear map that ``part`` (q, k, v, r, o, gate, up or down) is one section of, and which.

    None where the layer has no such part.
    """
    gla = config.layers[layer].mixer == "gla"
    found = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "o": ("o", 0), "down": ("down", 0)}
    if gla:
        found["r"] = ("r", 0)
    if config.gated_mlp:
        found |= {"gate": ("gate_up", 0), "up": ("gate_up", 1)}
    else:
        found["up"] = ("up", 0)
    return found.get(part)


def sections_of(config: ModelConfig, layer: int, name: str) -> tuple[int, ...]:
    """How wide what a linear map gives is, section by section."""
    q, k, v = _widths(config, layer)
    known = {"qkv": (q, k, v), "r": (v,), "gate_up": (config.d_ff,) * 2, "up": (config.d_ff,)}
    return known.get(name, (config.d_model,))


def mixed_width(config: ModelConfig, layer: int) -> int:
    """What ``o`` reads: the heads' outputs side by side."""
    q, _, v = _widths(config, layer)
    return v if config.layers[layer].mixer == "gla" else q


def narrowed(config: ModelConfig, processes: int) -> ModelConfig:
    """What one of the processes runs."""
    gla = config.gla
    return replace(
        config,
        n_heads=config.n_heads // processes,
        n_kv_heads=config.n_kv_heads // processes,
        d_ff=config.d_ff // processes,
        gla=None if gla is None else replace(gla, n_heads=gla.n_heads // processes),
    )


def split(
    model: LossModel,
    mesh: DeviceMesh,
    loras: Mapping[tuple[int, str], PlacedLora] | None = None,
) -> None:
    """Let every process keep its part of ``model``, which all must hold with the same numbers.

    ``fully_shard`` may follow, over another dimension of the same mesh.

    Args:
        mesh: of one dimension; its processes must be given the same texts.
        loras: by layer and part (see :func:`place_of`); they become parameters of the layers.

    Raises:
        InvalidRequest, UnsupportedModel: see :func:`~invivo.training.shape.check_divisible`.
    """
    decoder, n = model.decoder, mesh.size()
    check_divisible(decoder.config, n)
    narrow = Decoder(narrowed(decoder.config, n), device="meta", dtype=decoder.embed.dtype)
    for name, parameter in list(decoder.named_parameters()):
        layout = layout_of(decoder.config, name)
        whole = parameter.detach()
        whole = dealt(whole, layout.sections, n) if layout.sections else whole
        own = nn.Parameter(spread(whole, mesh, layout.placement), parameter.requires_grad)
        _put(decoder, name, own)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, TextLayer)
        beside = {part: lora for (at, part), lora in (loras or {}).items() if at == i}
        layer.add_module("loras", nn.ModuleDict(beside))
        share = _Share(decoder.config, i, cast(Layer, narrow.layers[i]), mesh, beside)
        layer.run_as(share.run)
    model.around = partial(_with_stem, decoder, narrow)


@contextmanager
def put_together(decoder: Decoder, mesh: DeviceMesh | None) -> Iterator[None]:
    """Plain and whole parameters in every process, until the end of the block."""
    if mesh is None:
        yield
        return
    parts = dict(decoder.named_parameters())
    for name, part in parts.items():
        _put(decoder, name, nn.Parameter(whole_of(decoder.config, name, part, mesh), False))
    try:
        yield
    finally:
        for name, part in parts.items():
            _put(decoder, name, part)


def whole_of(
    config: ModelConfig, name: str, part: torch.Tensor, mesh: DeviceMesh | None
) -> torch.Tensor:
    """All of a parameter, or of a tensor that lies like it, with its rows in order.

    Args:
        part: a DTensor over ``mesh`` or a larger one, or a plain tensor.
        mesh: of the tensor-parallel processes; None: there are none.
    """
    part = part.detach()
    whole = replicated(part) if isinstance(part, DTensor) else part
    sections = () if mesh is None else layout_of(config, name).sections
    return in_order(whole, sections, mesh.size()) if mesh is not None and sections else whole


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, parameter)


# --- the run --------------------------------------------------------------------------------------
class _Called(nn.Module):
    """A module whose parameters ``functional_call`` can lend to a function of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
        return run(self.module, *inputs)


def _lent(
    module: nn.Module, weights: Mapping[str, torch.Tensor], run: Callable[..., Any], *inputs: object
) -> torch.Tensor:
    named = {f"module.{name}": weight for name, weight in weights.items()}
    found: torch.Tensor = functional_call(_Called(module), named, (run, *inputs))
    return found


def _at_hand(config: ModelConfig, prefix: str, module: nn.Module, *, deep: bool) -> dict[str, Any]:
    """What this process computes with in place of ``module``'s parameters."""
    found = {}
    for name, parameter in module.named_parameters(recurse=deep):
        layout = layout_of(config, prefix + name)
        found[name] = local_weight(parameter, use=layout.use, gradient=layout.gradient)
    return found


def _with_stem(
    decoder: Decoder, narrow: Decoder, run: Callable[[Decoder], torch.Tensor]
) -> torch.Tensor:
    weights = _at_hand(decoder.config, "", decoder, deep=False)
    last = _at_hand(decoder.config, "final_norm.", decoder.final_norm, deep=True)
    weights |= {f"final_norm.{name}": weight for name, weight in last.items()}
    return _lent(narrow, weights, run)


@dataclass(frozen=True, slots=True)
class _Share:
    """One process's heads and neurons of a layer.

    Attributes:
        config: of the whole decoder.
        narrow: the layer that has so many; its own parameters are never made.
        loras: by part.
    """

    config: ModelConfig
    index: int
    narrow: Layer
    mesh: DeviceMesh
    loras: Mapping[str, PlacedLora]

    def run(
        self,
        layer: Layer,
        x: torch.Tensor,
        rope: Table | None,
        mask: torch.Tensor | None,
        texts: Texts,
    ) -> torch.Tensor:
        """:func:`run_layer`, summed over the processes where their shares meet."""
        weights = _at_hand(self.config, f"layers.{self.index}.", layer, deep=True)
        return _lent(self.narrow, weights, run_layer, x, rope, mask, texts, _Maps(self))


class _Maps:
    """The linear maps of a share in one pass, with the LoRAs beside them."""

    def __init__(self, share: _Share) -> None:
        self._share = share
        self._entered: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if name not in STATES:
            return linear_map(name, x, weight, bias)
        _, given = STATES[name]
        if given is State.FEATURES:
            y = linear_map(name, self._enter(x), weight, bias)
            return self._beside(name, x, y)
        y = self._beside(name, x, linear_map(name, x, weight, None)).flatten(0, -2)
        shape = y.shape[0], y.shape[1]
        y = moved(y, self._share.mesh, shape, State.PARTIAL, State.REPLICATED)
        y = y if bias is None else y + bias
        summed: torch.Tensor = y.unflatten(0, x.shape[:-1])
        return summed

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        """Once for all maps that read ``x``, so that their gradients are summed together."""
        if self._entered is None or self._entered[0] is not x:
            self._entered = x, entered(x, self._share.mesh)
        return self._entered[1]

    def _beside(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        share = self._share
        placed = {
            section: lora
            for part, lora in share.loras.items()
            for at, section in [place_of(share.config, share.index, part) or ("", 0)]
            if at == name
        }
        if not placed:
            return y
        sections = sections_of(share.config, share.index, name)
        widths = [y.shape[-1] * section // sum(sections) for section in sections]
        rows = x.flatten(0, -2)
        parts = list(y.split(widths, dim=-1))
        for section, lora in placed.items():
            more: torch.Tensor = lora(rows, rows.shape[0]).unflatten(0, x.shape[:-1])
            parts[section] = parts[section] + more
        summed: torch.Tensor = torch.cat(parts, dim=-1)
        return summed
