"""LoRAs beside the linear maps of a tensor-parallel decoder, each placed at the least cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from invivo.errors import InvalidRequest
from invivo.kernels.cross_entropy import IGNORED
from invivo.models.config import ModelConfig
from invivo.sharding.moves import replicated
from invivo.sharding.parallel_plan import Backbone, Candidate, Mesh, lora_stages, plan_parallel
from invivo.sharding.placed_lora import PlacedLora
from invivo.training.config import AdamW
from invivo.training.loss_model import LossModel
from invivo.training.optimizer import make_optimizer
from invivo.training.parallel import Ranks
from invivo.training.shape import check_divisible
from invivo.training.tensor_parallel import (
    STATES,
    mixed_width,
    place_of,
    sections_of,
)

Place = tuple[int, str]  # layer, part


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRAs of one rank.

    Attributes:
        on: parts of the layers: q, k, v, r (the output gate of gated linear attention), o, gate,
            up, down.
        alpha: the factor is alpha / rank; None: 1.
    """

    on: tuple[str, ...]
    rank: int
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def candidates(
    config: ModelConfig, place: Place, rank: int, *, rows: int, element_bytes: int, mesh: Mesh
) -> tuple[Candidate, ...]:
    """Every placement of a LoRA that is worth considering, the cheapest first.

    Args:
        rows: tokens that the mesh's devices compute together.
        element_bytes: of a number of the states.
    """
    d_in, d_out, name = _sizes(config, place)
    backbone = Backbone(*STATES[name], rows, element_bytes)
    return plan_parallel(lora_stages(d_in, d_out, rank), backbone, mesh)


def placed_loras(
    config: ModelConfig,
    spec: LoraSpec,
    mesh: DeviceMesh,
    *,
    rows: int,
    dtype: torch.dtype,
    seed: int = 0,
    chosen: Mapping[Place, Candidate] | None = None,
    speeds: Mesh | None = None,
) -> dict[Place, PlacedLora]:
    """Fresh LoRAs in all layers, for :func:`~invivo.training.tensor_parallel.split`.

    A is drawn, B is zero, so that they begin as nothing.

    Args:
        rows: tokens that the mesh's processes compute together, for which the plan is made.
        dtype: of states and products; the parameters are float32 (float64 for float64).
        chosen: placements, in place of the cheapest ones.
        speeds: of the devices; their number is the mesh's. None: those of a plan's default.

    Raises:
        InvalidRequest: a part that no layer has, a rank below 1.
    """
    if spec.rank < 1:
        raise InvalidRequest("must be at least 1", field="rank", given=spec.rank)
    places = [*_places(config, spec.on)]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    speeds = Mesh(mesh.size()) if speeds is None else speeds
    generator = torch.Generator().manual_seed(seed)
    made: dict[Place, PlacedLora] = {}
    for place in places:
        d_in, d_out, name = _sizes(config, place)
        a = (2 * torch.rand(spec.rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
        b = torch.zeros(d_out, spec.rank)
        candidate = (chosen or {}).get(place)
        if candidate is None:
            found = candidates(
                config,
                place,
                spec.rank,
                rows=rows,
                element_bytes=dtype.itemsize,
                mesh=speeds,
            )
            candidate = found[0]
        a, b = (t.to(mesh.device_type, kept) for t in (a, b))
        made[place] = PlacedLora(a, b, spec.scale, candidate, STATES[name][0], mesh)
    return made


def tune(
    model: LossModel,
    ranks: Ranks,
    spec: LoraSpec,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    settings: AdamW,
    clip: float = 1.0,
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train LoRAs on a frozen model that the processes share; all call this alike.

    Args:
        model: the same numbers in all processes; it is sharded and stays so.
        ranks: with ``tensor`` processes abreast.
        batches: (tokens, labels) [B, T] of each step, one at least; processes abreast get the
            same ones, other groups rows of their own.
        clip: largest norm of all gradients together; 0: no limit.

    Returns:
        The LoRAs, whole in every process, by the names of the engine's adapters, and each step's
        loss in nats a label.

    Raises:
        InvalidRequest, UnsupportedModel: no processes abreast, or a model or LoRAs that cannot be
            shared like this.
    """
    abreast = ranks.tensor
    if abreast is None:
        raise InvalidRequest(
            "needs processes that share every layer",
            field="parallel.tensor",
            given=1,
            remedy="joined(1, kind, tensor=2) under torchrun --nproc-per-node 2",
        )
    decoder = model.decoder.requires_grad_(False)
    check_divisible(decoder.config, abreast.size())
    loras = placed_loras(
        decoder.config,
        spec,
        abreast,
        rows=batches[0][0].numel(),
        dtype=model.dtype or decoder.embed.dtype,
        seed=seed,
    )
    ranks.share(model, loras)
    parameters = {
        f"{place}.{name}": parameter
        for place, lora in loras.items()
        for name, parameter in lora.named_parameters()
    }
    optimizer = make_optimizer(parameters, settings)
    losses = []
    for tokens, labels in batches:
        count = ranks.total((labels != IGNORED).sum()) / abreast.size()
        loss = model(tokens, labels)[0] / count.clamp(min=1)
        loss.backward()
        ranks.clip(parameters.values(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(ranks.total(loss.detach())) / abreast.size())
    return whole_loras(loras), losses


def lora_tensors(loras: Mapping[Place, PlacedLora]) -> dict[str, torch.Tensor]:
    """The LoRAs' parameters by the names that the engine's adapters have, as they lie."""
    return {
        f"layers.{layer}.{part}.lora_{name}": getattr(lora, name.lower()).detach()
        for (layer, part), lora in loras.items()
        for name in "AB"
    }


def whole_loras(loras: Mapping[Place, PlacedLora]) -> dict[str, torch.Tensor]:
    """The same, whole in every process: A [r, d_in], B [d_out, r]; all must call this."""
    return {
        name: replicated(tensor) if isinstance(tensor, DTensor) else tensor
        for name, tensor in lora_tensors(loras).items()
    }


def _places(config: ModelConfig, on: Sequence[str]) -> Iterator[Place]:
    for part in on:
        layers = [i for i in range(config.n_layers) if place_of(config, i, part) is not None]
        if not layers:
            raise InvalidRequest(
                "no layer has such a part",
                field="on",
                given=part,
                remedy="Known: q, k, v, o, up, down; gate, r where the model has them",
            )
        for layer in layers:
            yield layer, part


def _sizes(config: ModelConfig, place: Place) -> tuple[int, int, str]:
    """What a part reads and gives, and the linear map that it is a section of."""
    layer, part = place
    found = place_of(config, layer, part)
    assert found is not None
    name, section = found
    d_in = config.d_model
    if name in ("o", "down"):
        d_in = config.d_ff if name == "down" else mixed_width(config, layer)
    return d_in, sections_of(config, layer, name)[section], name
