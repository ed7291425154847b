"""One model over several processes: sharded parameters, gradients and moments (FSDP2).

``torchrun --nproc-per-node N`` starts the processes. Every process reads rows of its own; each
layer's parameters are gathered before the layer runs and its gradients are summed and scattered
after. Parameters stay float32 and are gathered in the products' dtype; gradients are summed in
float32 and not divided: the loss is divided once, by the labels of all processes. With more than
one replica (HSDP) a group of processes holds the model between them, and the groups add up their
gradients. With ``tensor`` processes abreast these share every layer by heads and neurons and read
the same rows (:mod:`invivo.training.tensor_parallel`); their parts are sharded over the others.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.sharding.moves import replicated
from invivo.sharding.placed_lora import PlacedLora
from invivo.training.loss_model import LossModel
from invivo.training.processes import Keeper
from invivo.training.tensor_parallel import put_together, split, whole_of

# The first process may prepare data for hours while others wait; torchrun ends all if one is gone.
PATIENCE = timedelta(days=7)
STALLED = timedelta(minutes=30)  # between GPUs: the first may write samples while others wait


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among several; see :class:`~invivo.training.processes.Processes`.

    Attributes:
        mesh: (shard,) or (replicate, shard).
        tensor: of the processes that share every layer between them; None: each has all of it.
        host: group of all for numbers on the host, beside the device's own.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    host: dist.ProcessGroup
    tensor: DeviceMesh | None = None

    @property
    def reader(self) -> int:
        return self.rank // self._abreast

    @property
    def readers(self) -> int:
        return self.world // self._abreast

    @property
    def _abreast(self) -> int:
        return 1 if self.tensor is None else self.tensor.size()

    def total(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self.host if x.is_cpu else None)
        return x

    def decided(self, value: float) -> float:
        x = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(x, src=0, group=self.host)
        return float(x)

    @contextmanager
    def first_first(self) -> Iterator[None]:
        if self.rank:
            dist.barrier(group=self.host)
        try:
            yield
        finally:
            if not self.rank:
                dist.barrier(group=self.host)

    def share(
        self, model: LossModel, loras: Mapping[tuple[int, str], PlacedLora] | None = None
    ) -> None:
        """Shard ``model``, which all processes must hold with the same numbers; names stay.

        Args:
            loras: beside linear maps that are shared by heads and neurons (``tensor``); they
                become parameters of the layers.
        """
        assert loras is None or self.tensor is not None
        policy = MixedPrecisionPolicy(
            param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if self.tensor is not None:
            split(model, self.tensor, loras)
        for layer in model.layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        layers = {p for layer in model.layers for p in layer.parameters()}
        fully_shard(model, mesh=self.mesh, mp_policy=policy, ignored_params=layers)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        parameters = list(parameters)
        norm = self._norm([cast(DTensor, p.grad) for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, most or math.inf, norm)
        return norm

    def _norm(self, gradients: Sequence[DTensor]) -> torch.Tensor:
        """Of all gradients together; the same bits in all processes."""
        mesh = gradients[0].device_mesh
        by_copies: dict[int, list[torch.Tensor]] = {}  # how many processes hold the same part
        for gradient in gradients:
            sizes = zip(mesh.shape, gradient.placements, strict=True)
            copies = math.prod(n for n, placement in sizes if placement.is_replicate())
            by_copies.setdefault(copies, []).append(gradient.to_local())
        shares = [nn.utils.get_total_norm(g) ** 2 / n for n, g in by_copies.items()]
        summed = DTensor.from_local(
            torch.stack(shares).sum(), mesh, [Partial()] * mesh.ndim, run_check=False
        )
        return replicated(summed).sqrt()

    @contextmanager
    def whole(self, model: LossModel) -> Iterator[None]:
        """In the products' dtype: as much memory as the model's weights are served in."""
        for module in _sharded(model):
            module.unshard()
        try:
            with put_together(model.decoder, self.tensor):
                yield
        finally:
            for module in _sharded(model):
                module.reshard()

    def gathered(self, decoder: Decoder) -> Decoder | None:
        copy = Decoder(decoder.config) if self.rank == 0 else None
        into = {} if copy is None else dict(copy.named_parameters())
        for name, parameter in decoder.named_parameters():
            whole = whole_of(decoder.config, name, parameter, self.tensor)
            if name in into:
                into[name].data.copy_(whole)
        return copy

    def keeper(self, folder: Path, keep: int, config: ModelConfig) -> Keeper:
        from invivo.training.sharded_checkpoint import ShardedCheckpoints

        return ShardedCheckpoints(folder, self, config, keep=keep)


@contextmanager
def joined(replicas: int, kind: str, tensor: int = 1) -> Iterator[Ranks]:
    """This process among those that torchrun started, until the end of the block.

    Args:
        replicas: groups that hold a whole model each.
        kind: of device, ``cuda`` or ``cpu``.
        tensor: processes that share every layer by heads and neurons; they follow each other in
            rank, so that they are neighbours on one machine.

    Raises:
        InvalidRequest: the processes cannot be divided into so many replicas and shares, or there
            are more of them on this machine than GPUs.
    """
    world = int(os.environ["WORLD_SIZE"])
    for name, divisor, among in (
        ("parallel.tensor", tensor, world),
        ("parallel.replicas", replicas, world // tensor),
    ):
        if among % divisor:
            what = "processes" if among == world else "groups of processes"
            raise InvalidRequest(f"does not divide the {among} {what}", field=name, given=divisor)
    here = torch.device(kind)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if here.index >= torch.cuda.device_count():
            raise InvalidRequest(
                f"this machine has {torch.cuda.device_count()} GPUs",
                field="nproc-per-node",
                given=os.environ.get("LOCAL_WORLD_SIZE"),
            )
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=STALLED)
    # A thread of gloo that lets go of a tensor while Python shuts down ends the process by SIGABRT;
    # the threads end with their group, and groups that are left then hang in cycles.
    atexit.register(gc.collect)
    whole: DeviceMesh | None = None
    try:
        sizes = {"replicate": replicas, "shard": world // replicas // tensor, "tensor": tensor}
        named = {name: n for name, n in sizes.items() if n > 1 or name == "shard"}
        whole = init_device_mesh(kind, tuple(named.values()), mesh_dim_names=tuple(named))
        mesh = whole["shard"] if replicas == 1 else whole["replicate", "shard"]
        abreast = whole["tensor"] if tensor > 1 else None
        host = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), world, here, mesh, host, abreast)
    finally:
        dist.destroy_process_group()
        # DTensor's caches keep the mesh, and the mesh its groups (in a field of newer torch).
        getattr(whole, "_pg_registry", {}).clear()


def _sharded(model: LossModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
