"""One model over several processes: sharded parameters, gradients and moments (FSDP2).

``torchrun --nproc-per-node N`` starts the processes. Every process reads rows of its own; each
layer's parameters are gathered before the layer runs and its gradients are summed and scattered
after. Parameters stay float32 and are gathered in the products' dtype; gradients are summed in
float32 and not divided: the loss is divided once, by the labels of all processes. With more than
one replica (HSDP) a group of processes holds the model between them, and the groups add up their
gradients.

Queries, keys and values of a layer are one matrix and so are gate and up: they are split by rows
across processes whatever the rows mean, which tensor parallelism could not do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from invivo.errors import InvalidRequest
from invivo.models.decoder import Decoder
from invivo.training.loss_model import LossModel

PATIENCE = timedelta(minutes=30)  # the first process may prepare the data while others wait


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: 0 writes the run's files.
        world: how many there are.
        device: this process's.
        mesh: (shard,) or (replicate, shard).
        host: group of all for numbers on the host, beside the device's own.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    host: dist.ProcessGroup

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes of x, which is on the host or the device; x stays."""
        x = x.clone()
        dist.all_reduce(x, group=self.host if x.is_cpu else None)
        return x

    def decided(self, value: float) -> float:
        """The first process's ``value``."""
        x = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(x, src=0, group=self.host)
        return float(x)

    def wait(self) -> None:
        """Until every process is here."""
        dist.barrier(group=self.host)

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """The first process does the body, and then the others do."""
        if self.rank:
            self.wait()
        try:
            yield
        finally:
            if not self.rank:
                self.wait()


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(replicas: int = 1, *, device: str | None = None) -> Iterator[Ranks]:
    """This process among those that torchrun started, until the end of the block.

    Args:
        replicas: groups that hold a whole model each.
        device: ``cuda`` or ``cpu``; None: GPUs where there are any.

    Raises:
        InvalidRequest: the processes cannot be divided into so many replicas, or there are more
            of them on this machine than GPUs.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world % replicas:
        raise InvalidRequest(
            f"does not divide the {world} processes", field="parallel.replicas", given=replicas
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        if replicas == 1:
            mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        else:
            shape = (replicas, world // replicas)
            mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        host = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), world, here, mesh, host)
    finally:
        dist.destroy_process_group()


def shard(model: LossModel, ranks: Ranks) -> None:
    """Let every process keep its part of the parameters; their names stay.

    All processes must hold the same parameters, on any device. Make the optimizer afterwards.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    layers = {p for layer in model.layers for p in layer.parameters()}
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, ignored_params=layers)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def add_up_later(model: LossModel, later: bool) -> None:
    """Keep gradients in this process (``later``) until a micro-batch that adds them up.

    Takes the memory of whole float32 gradients and saves the communication.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(not later)


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm together is at most ``max_norm``; the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def whole(model: LossModel) -> Iterator[Decoder]:
    """The decoder with all its parameters in every process, to evaluate and to sample with.

    They have the products' dtype and are not to be changed. Within the block a process may run
    the decoder (not the model) on its own.
    """
    for module in _sharded(model):
        module.unshard()
    try:
        yield model.decoder
    finally:
        for module in _sharded(model):
            module.reshard()


def gathered(decoder: Decoder, ranks: Ranks) -> Decoder | None:
    """A whole copy of a sharded decoder on the host of the first process; None on the others.

    All processes must call it.
    """
    copy = Decoder(decoder.config) if ranks.rank == 0 else None
    into: Mapping[str, nn.Parameter] = {} if copy is None else dict(copy.named_parameters())
    for name, parameter in decoder.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if name in into:
            into[name].data.copy_(whole.detach())
    return copy


def _sharded(model: LossModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
