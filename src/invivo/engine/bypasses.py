"""What each bypass computes: its parameters, and its differentiable form.

A bypass reads one tensor X of the frozen model and adds one to a tensor Y:

- ``lora`` (Hu et al., 2021; rank-stabilised: Kalajdzievski, 2023): ``Y += scale * B A X`` beside a
  linear map, scale = alpha / r, or alpha / sqrt(r);
- ``ia3`` (Liu et al., 2022): ``Y += Y * (l - 1)`` on a linear map's output; for ``down`` on its
  input, the MLP's neurons;
- ``adapter`` (Houlsby et al., 2019): ``X += U act(D X)`` at a site;
- ``steering``: ``X += v`` at a site;
- ``prefix`` (Li and Liang, 2021): keys and values of virtual tokens, in every layer;
- ``soft_prompt`` (Lester et al., 2021): embeddings of virtual tokens.

A sequence with a prefix or a soft prompt begins with placeholder tokens; those of the prefix come
first. Where several kinds meet, the order is that of this list. Parameters are a flat dict:

======================================  ===========================================
``layers.3.q.lora_A``, ``.lora_B``      [r, d_in], [d_out, r]
``layers.3.k.ia3``                      [d_out] (``down``: [d_ff])
``layers.3.attn.out.adapter_down``      [r, d]
``layers.3.attn.out.adapter_up``        [d, r]
``layers.3.resid.post.steering``        [d]
``layers.3.prefix_k``, ``.prefix_v``    [n, G, D], keys before rotary, after QK-norm
``soft_prompt``                         [n, d], beside scaled embeddings
======================================  ===========================================
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from invivo.engine.trainable import Kind, Trainable, checked, has_place
from invivo.engine.types import VirtualRows
from invivo.errors import InvalidRequest
from invivo.kernels.activation import ACTIVATIONS, activation
from invivo.models.config import ModelConfig

Parameters = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class BypassSpec:
    """One bypass method on some places of some layers.

    Attributes:
        on, size, layers: see :class:`invivo.engine.trainable.Trainable`.
        alpha: of a LoRA; None = its rank.
        rank_stabilized: divide alpha by the root of the rank.
        activation: of a bottleneck adapter, one of :data:`ACTIVATIONS`.
    """

    kind: Kind
    on: tuple[str, ...] = ()
    size: int = 0
    layers: tuple[int, ...] | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    activation: str = "relu"

    @property
    def trainable(self) -> Trainable:
        return Trainable(self.kind, self.on, self.size, self.layers)

    @property
    def scale(self) -> float:
        """The factor of a LoRA."""
        alpha = self.size if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.size) if self.rank_stabilized else self.size)


def checked_specs(config: ModelConfig, specs: Sequence[BypassSpec]) -> tuple[BypassSpec, ...]:
    """The same specs with places in the graph's spelling and layers given in full.

    Raises:
        InvalidRequest: see :func:`invivo.engine.trainable.checked`; an alpha or activation that
            means nothing, a prefix that leaves layers out.
    """
    plain = checked(config, [spec.trainable for spec in specs])
    for spec, trainable in zip(specs, plain, strict=True):
        alpha = 1.0 if spec.alpha is None else spec.alpha
        if not math.isfinite(alpha):
            raise InvalidRequest("must be a number", field="alpha", given=spec.alpha)
        if spec.activation not in ACTIVATIONS:
            raise InvalidRequest(
                "unknown activation",
                field="activation",
                given=spec.activation,
                remedy=f"Known: {', '.join(ACTIVATIONS)}",
            )
        if spec.kind == "prefix" and len(trainable.layers or ()) != config.n_layers:
            raise InvalidRequest("a prefix is in every layer", field="layers", given=spec.layers)
    return tuple(
        replace(spec, on=trainable.on, layers=trainable.layers)
        for spec, trainable in zip(specs, plain, strict=True)
    )


def n_virtual(specs: Sequence[BypassSpec]) -> int:
    """Placeholder tokens at the start of every sequence that runs with these bypasses."""
    return sum(spec.size for spec in specs if spec.kind in ("prefix", "soft_prompt"))


def places(config: ModelConfig, spec: BypassSpec) -> Iterator[tuple[int, str]]:
    """(layer, place) of every copy of a checked LoRA, IA3, adapter or steering vector."""
    for layer in spec.layers or ():
        for place in spec.on:
            if has_place(config, layer, place):
                yield layer, place


def rows_of(config: ModelConfig, layer: int, place: str) -> tuple[str, int, int]:
    """Which rows [start, stop) of which of a layer's linear maps a place is."""
    if place in ("q", "k", "v", "qkv"):
        q, k, v = _widths(config, layer)
        start, stop = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + k + v)}.get(
            place, (0, q + k + v)
        )
        return "qkv", start, stop
    if place == "r":
        return place, 0, _widths(config, layer)[2]
    if place in ("gate", "up", "gate_up") and config.gated_mlp:
        first, last = {"gate": (0, 1), "up": (1, 2)}.get(place, (0, 2))
        return "gate_up", first * config.d_ff, last * config.d_ff
    return place, 0, config.d_ff if place == "up" else config.d_model


def _widths(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Of all queries, keys and values of a layer."""
    if config.layers[layer].mixer == "gla":
        assert config.gla is not None
        return config.gla.k_width, config.gla.k_width, config.gla.v_width
    kv = config.n_kv_heads * config.head_dim
    return config.n_heads * config.head_dim, kv, kv


def width_in(config: ModelConfig, layer: int, place: str) -> int:
    """What a place of a layer reads."""
    q, _, v = _widths(config, layer)
    mixed = v if config.layers[layer].mixer == "gla" else q
    known = {"o": mixed, "down": config.d_ff}
    return known.get(place, config.d_model)


def shapes(config: ModelConfig, spec: BypassSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a checked spec."""
    d, n = config.d_model, spec.size
    found: dict[str, tuple[int, ...]] = {}
    if spec.kind == "soft_prompt":
        return {"soft_prompt": (n, d)}
    if spec.kind == "prefix":
        for layer in spec.layers or ():
            for name in ("prefix_k", "prefix_v"):
                found[f"layers.{layer}.{name}"] = (n, config.n_kv_heads, config.head_dim)
        return found
    for layer, place in places(config, spec):
        base = f"layers.{layer}.{place}"
        if spec.kind == "lora":
            _, start, stop = rows_of(config, layer, place)
            found[f"{base}.lora_A"] = (n, width_in(config, layer, place))
            found[f"{base}.lora_B"] = (stop - start, n)
        elif spec.kind == "ia3":
            _, start, stop = rows_of(config, layer, place)
            found[f"{base}.ia3"] = (config.d_ff if place == "down" else stop - start,)
        elif spec.kind == "adapter":
            found[f"{base}.adapter_down"] = (n, d)
            found[f"{base}.adapter_up"] = (d, n)
        else:
            found[f"{base}.steering"] = (d,)
    return found


def init_parameters(
    spec: BypassSpec,
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Fresh parameters; all kinds but the two with virtual tokens begin as nothing at all.

    The draws are those of the CPU in float32 whatever the device and dtype.
    """
    (spec,) = checked_specs(config, [spec])
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes(config, spec).items():
        if name.endswith((".lora_A", ".adapter_down")):
            value = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
        elif name.endswith((".lora_B", ".adapter_up", ".steering")):
            value = torch.zeros(shape)
        elif name.endswith(".ia3"):
            value = torch.ones(shape)
        else:
            value = 0.02 * torch.randn(shape, generator=generator)
        made[name] = value.to(device, dtype)
    return made


def check_parameters(
    config: ModelConfig, specs: Sequence[BypassSpec], parameters: Parameters
) -> None:
    """Every parameter of checked specs is there, in its shape, and no other.

    Raises:
        InvalidRequest: naming the parameter.
    """
    wanted = {name: shape for spec in specs for name, shape in shapes(config, spec).items()}
    for name in wanted.keys() ^ parameters.keys():
        problem = "is missing" if name in wanted else "belongs to no bypass"
        raise InvalidRequest(problem, field="parameters", given=name)
    for name, shape in wanted.items():
        if tuple(parameters[name].shape) != shape:
            raise InvalidRequest(
                f"does not fit the model: {name} is {tuple(parameters[name].shape)}, "
                f"expected {shape}",
                field="parameters",
                given=name,
                remedy="Use an adapter that was trained on this model",
            )


def virtual_rows(
    start: int, stop: int, segments: Sequence[int], n: int, *, slot: int = 0
) -> list[VirtualRows]:
    """The virtual tokens among tokens [start, stop), of which the first is row 0.

    Args:
        segments: tokens at which a sequence begins (more than one where they are packed).
        n: virtual tokens of each.
    """
    found = []
    for begin in segments:
        first, last = max(start, begin), min(stop, begin + n)
        if first < last:
            found.append(VirtualRows(first - start, last - start, first - begin, slot))
    return found


def overlay(
    value: torch.Tensor, fills: Sequence[tuple[VirtualRows, torch.Tensor, int]]
) -> torch.Tensor:
    """``value`` with rows of virtual tokens replaced; differentiable in everything.

    Args:
        value: [T, ...]; not changed.
        fills: rows, and what virtual tokens ``offset``, ``offset + 1``, ... become: [n, ...] and
            ``offset``. Rows beyond it stay.
    """
    changed = value
    for piece, source, offset in fills:
        first = max(piece.first, offset)
        last = min(piece.first + piece.stop - piece.start, offset + source.shape[0])
        if first >= last:
            continue
        if changed is value:
            changed = value.clone()
        at = piece.start + first - piece.first
        new = source[first - offset : last - offset]
        changed[at : at + last - first] = new.to(value.device, value.dtype)
    return changed


@dataclass(slots=True)
class LowRank:
    """``scale b a x`` beside rows [start, stop) of a linear map's output."""

    start: int
    stop: int
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    _cast: tuple[tuple[object, ...], torch.Tensor, torch.Tensor] | None = None

    def cast(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """``a`` and ``b`` in ``dtype`` without autograd; made again once a step changed them."""
        a, b = self.a, self.b
        state = dtype, a._version, b._version, a.data_ptr(), b.data_ptr()
        if self._cast is None or self._cast[0] != state:
            self._cast = state, a.detach().to(dtype), b.detach().to(dtype)
        return self._cast[1:]

    def of(self, y: torch.Tensor) -> torch.Tensor:
        """The part of the map's output [s, d_out], or of its gradient, that this adds to."""
        whole = self.stop - self.start == y.shape[1]
        return y if whole else y[:, self.start : self.stop]


class TrainBypass:
    """A set of bypasses under autograd, for rows that all use the same parameters.

    Torch operations only, any dtype: parameters are cast to the activations'. It keeps references
    to ``parameters``, so that an optimizer's changes are seen.

    Raises:
        InvalidRequest: see :func:`checked_specs` and :func:`check_parameters`.
    """

    def __init__(
        self, config: ModelConfig, specs: Sequence[BypassSpec], parameters: Parameters
    ) -> None:
        specs = checked_specs(config, specs)
        check_parameters(config, specs, parameters)
        self._parameters = parameters
        self._low_rank: dict[tuple[int, str], list[LowRank]] = {}
        self._scales: dict[tuple[int, str], list[tuple[int, int, torch.Tensor]]] = {}
        self._bottlenecks: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, str]] = {}
        self._virtual: list[VirtualRows] = []
        self.n_virtual = n_virtual(specs)
        self.n_prefix = n_virtual([s for s in specs if s.kind == "prefix"])
        at = set()
        for spec in specs:
            if spec.kind == "prefix":
                at |= {"attn.kvhead.k", "attn.kvhead.v"}
            elif spec.kind == "soft_prompt":
                at.add("embed")
            elif spec.kind in ("adapter", "steering"):
                at |= set(spec.on)
            elif spec.kind == "ia3" and "down" in spec.on:
                at.add("mlp.neuron")
            for layer, place in places(config, spec):
                self._add(config, spec, layer, place)
        self.at = frozenset(at)

    def _add(self, config: ModelConfig, spec: BypassSpec, layer: int, place: str) -> None:
        base, p = f"layers.{layer}.{place}", self._parameters
        if spec.kind == "lora":
            linear, start, stop = rows_of(config, layer, place)
            part = LowRank(start, stop, p[f"{base}.lora_A"], p[f"{base}.lora_B"], spec.scale)
            self._low_rank.setdefault((layer, linear), []).append(part)
        elif spec.kind == "ia3" and place != "down":
            linear, start, stop = rows_of(config, layer, place)
            scale = (start, stop, p[f"{base}.ia3"])
            self._scales.setdefault((layer, linear), []).append(scale)
        elif spec.kind == "adapter":
            matrices = (p[f"{base}.adapter_down"], p[f"{base}.adapter_up"])
            self._bottlenecks[layer, place] = (*matrices, spec.activation)

    def window(self, start: int, stop: int, segments: Sequence[int] = (0,)) -> TrainBypass:
        """The same bypasses for rows [start, stop) of a training sequence.

        Args:
            segments: tokens at which the packed sequences begin, each with its placeholders.
        """
        if not self.n_virtual:
            return self
        view = copy.copy(self)
        view._virtual = virtual_rows(start, stop, segments, self.n_virtual)
        return view

    def beside(self, layer: int, linear: str) -> bool:
        """Whether a call for this map would change anything."""
        return (layer, linear) in self._low_rank or (layer, linear) in self._scales

    def low_rank(self, layer: int, linear: str) -> Sequence[LowRank] | None:
        """The LoRAs beside a map; None where there is anything else, or nothing."""
        if (layer, linear) in self._scales:
            return None
        return self._low_rank.get((layer, linear))

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        width = y.shape[-1]
        for part in self._low_rank.get((layer, linear), ()):
            if not torch.is_grad_enabled():
                a, b = part.cast(x.dtype)
                part.of(y).addmm_(F.linear(x, a), b.T, alpha=part.scale)
                continue
            delta = part.scale * ((x @ part.a.to(x.dtype).T) @ part.b.to(x.dtype).T)
            y = y + F.pad(delta, (part.start, width - part.stop))
        for start, stop, scale in self._scales.get((layer, linear), ()):
            y = y + y * F.pad(scale.to(y.dtype) - 1, (start, width - stop))
        return y

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        if name == "embed":
            prompt = self._parameters["soft_prompt"]
            return overlay(value, [(piece, prompt, self.n_prefix) for piece in self._virtual])
        if name in ("attn.kvhead.k", "attn.kvhead.v"):
            prefix = self._parameters[f"layers.{layer}.prefix_{name[-1]}"]
            return overlay(value, [(piece, prefix, 0) for piece in self._virtual])
        if name == "mlp.neuron":
            scale = self._parameters.get(f"layers.{layer}.down.ia3")
            return value if scale is None else value + value * (scale.to(value.dtype) - 1)
        bottleneck = self._bottlenecks.get((layer, name))
        if bottleneck is not None:
            down, up, kind = bottleneck
            neuron = activation(value @ down.to(value.dtype).T, kind)
            value = value + neuron @ up.to(value.dtype).T
        vector = self._parameters.get(f"layers.{layer}.{name}.steering")
        return value if vector is None else value + vector.to(value.dtype)
