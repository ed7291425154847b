"""Programs whose parameters a job trains: what may be trained, and the parameters' values.

A parameter is what a program declares under ``params``: the weight of a ``lerp`` (a mask), the
vector of an ``add`` (steering), the coordinates of a ``set_coords``, the basis of a low-rank
operation (a rotation), any other number that an operation takes. What an optimizer changes are
*masters*. Those of a basis are unconstrained numbers behind torch's orthogonal parametrisation
(``torch.nn.utils.parametrizations.orthogonal``, Householder), all others are the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from invivo.edits.blobs import Blobs
from invivo.edits.program import MAIN, Parameter, Program, Step
from invivo.edits.site_names import SiteRef, resolve_site
from invivo.edits.values import Param
from invivo.engine.program_goals import Objective
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

# Where a gradient would meet infinities, or the loss does not look.
_NOT_TRAINED_AT = {
    "attn.head.score": "hidden keys have infinite scores: take attn.head.prob",
    "logits": "the loss is taken from the logits of the model: take final.norm.out",
}

# A window that runs again would have to know what the keys before it have left.
_FOLLOWED = frozenset({"gla.edge", "gla.head.edge"})


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """What a job trains in a program.

    Attributes:
        program: one row, no sweep; its outputs are passed over.
        train: names of parameters.
        blobs: the tensors that it names.
        sparsity: times the distance (sum of absolute values) of the trained masks, factors and
            vectors from what changes nothing: 1 for a lerp's w and a factor, 0 for the others. It
            is added to the mean loss of each step.
        objective: see :mod:`invivo.engine.program_goals`.
    """

    program: Program
    train: tuple[str, ...]
    blobs: Blobs = field(default_factory=Blobs)
    sparsity: float = 0.0
    objective: Objective = "cross_entropy"

    def identity(self) -> dict[str, Any]:
        """What must be the same for a job that goes on from a checkpoint, as JSON has it."""
        return {
            "hash": self.program.hash,
            "train": sorted(self.train),
            "blobs": [list(pair) for pair in self.blobs.digest()],
            "sparsity": self.sparsity,
            "objective": self.objective,
        }


@dataclass(frozen=True, slots=True)
class _Use:
    """One place of a program where a parameter stands."""

    step: int
    do: str
    argument: str
    run: str
    refs: tuple[SiteRef, ...]


def _uses(program: Program, config: ModelConfig) -> Iterator[tuple[str, _Use]]:
    for i, step in enumerate(program.steps):
        if not isinstance(step, Step):
            continue
        for argument, value in step.args.items():
            if isinstance(value, Param):
                refs: list[SiteRef] = []
                for pattern in step.at:
                    path = f"steps[{i}].at"
                    refs += resolve_site(pattern, config, program.sets, path, expand=step.expand)
                yield value.name, _Use(i, step.do, argument, step.run, tuple(refs))


def check_trained(spec: ProgramSpec, config: ModelConfig, *, weight_decay: float = 0.0) -> None:
    """
    Raises:
        InvalidRequest: nothing is trained, a name is unknown or used nowhere, the program has a
            sweep, or a parameter stands where no gradient reaches it.
    """
    program = spec.program
    if program.sweep:
        raise InvalidRequest("a program that is trained has no sweep", field="program.sweep")
    for i, step in enumerate(program.steps):
        if isinstance(step, Step) and any(pattern.site in _FOLLOWED for pattern in step.at):
            raise InvalidRequest(
                "a program that is trained follows no keys through states",
                field=f"program.steps[{i}].at",
                remedy="Change the keys themselves: gla.head.h.k",
            )
    if not spec.train:
        raise InvalidRequest(
            "nothing to train",
            field="train",
            remedy=f"Name parameters of the program: {', '.join(program.params) or 'it has none'}",
        )
    if spec.objective not in get_args(Objective):
        raise InvalidRequest(
            f"must be one of {', '.join(get_args(Objective))}",
            field="objective",
            given=spec.objective,
        )
    if not spec.sparsity >= 0 or spec.sparsity == float("inf"):
        raise InvalidRequest("must be >= 0", field="sparsity", given=spec.sparsity)
    for name in spec.train:
        if name not in program.params:
            raise InvalidRequest(
                "the program declares no such parameter",
                field="train",
                given=name,
                remedy=f"Declared: {', '.join(program.params) or 'none'}",
            )
        uses = [use for used, use in _uses(program, config) if used == name]
        if not uses:
            raise InvalidRequest("no step uses this parameter", field="train", given=name)
        for use in uses:
            where = f"program.steps[{use.step}].{use.argument}"
            if use.run != MAIN:
                raise InvalidRequest(
                    f'the run "{use.run}" is only read: gradients do not go through it',
                    field=where,
                    given=name,
                    remedy='Use trained parameters in the run "main"',
                )
            for ref in use.refs:
                if ref.site in _NOT_TRAINED_AT:
                    raise InvalidRequest(
                        f"nothing is trained at {ref.site}: {_NOT_TRAINED_AT[ref.site]}",
                        field=f"program.steps[{use.step}].at",
                        given=name,
                    )
        if {use.argument for use in uses} > {"basis"}:
            raise InvalidRequest("a basis is nothing else besides", field="train", given=name)
        if weight_decay and uses[0].argument == "basis":
            raise InvalidRequest(
                "a basis does not decay", field="weight_decay", given=weight_decay, remedy="Use 0"
            )


def lowest_layer(spec: ProgramSpec, config: ModelConfig) -> int:
    """The lowest layer in which a trained parameter acts."""
    layers = [
        config.n_layers - 1 if ref.layer < 0 and ref.site != "embed.out" else max(ref.layer, 0)
        for name, use in _uses(spec.program, config)
        if name in spec.train
        for ref in use.refs
    ]
    return min(layers)


class _Basis(nn.Module):
    """Orthonormal rows [r, d]."""

    rows: torch.Tensor

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start)
        orthogonal(self, "rows", orthogonal_map="householder", use_trivialization=False)

    @property
    def master(self) -> torch.Tensor:
        (original,) = self.parameters()
        return original


class ProgramParameters(Mapping[str, torch.Tensor]):
    """Values of all parameters of a program, made anew at every look, so that each rerun of a
    window has a graph of its own; differentiable in the masters of those that are trained.

    Args:
        like: whose dtype and device the values have; masters are float32 (float64 for float64).
        seed: of bases that start from no tensor.

    Attributes:
        masters: what an optimizer changes, by name; leaves that require gradients.

    Raises:
        InvalidRequest: a start value has another shape, or a basis is not orthonormal.
    """

    def __init__(
        self, spec: ProgramSpec, config: ModelConfig, like: torch.Tensor, *, seed: int = 0
    ) -> None:
        self._like = like
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        uses = list(_uses(spec.program, config))
        self.masters: dict[str, torch.Tensor] = {}
        self._fixed: dict[str, torch.Tensor] = {}
        self._bases: dict[str, _Basis] = {}
        self._neutral: dict[str, float] = {}
        self._masks: list[str] = []
        for name, parameter in spec.program.params.items():
            places = {(use.do, use.argument) for used, use in uses if used == name}
            is_basis = any(argument == "basis" for _, argument in places)
            if is_basis and name in spec.train:
                start = _start_of_basis(name, parameter, spec.blobs, seed).to(like.device, wide)
                self._bases[name] = _Basis(start)
                self.masters[name] = self._bases[name].master
                continue
            value = _start(name, parameter, spec.blobs).to(like.device, wide)
            if name not in spec.train:
                self._fixed[name] = value.to(like.dtype)
                continue
            self.masters[name] = value.clone().requires_grad_()
            keeps = ("lerp", "w") in places or any(argument == "a" for _, argument in places)
            self._neutral[name] = 1.0 if keeps else 0.0
            if ("lerp", "w") in places:
                self._masks.append(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._fixed:
            return self._fixed[name]
        return self._value(name).to(self._like.dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._fixed
        yield from self.masters

    def __len__(self) -> int:
        return len(self._fixed) + len(self.masters)

    def _value(self, name: str) -> torch.Tensor:
        return self._bases[name].rows if name in self._bases else self.masters[name]

    def trained(self) -> dict[str, torch.Tensor]:
        """The trained values as they are now, on the host."""
        with torch.no_grad():
            return {name: self._value(name).to("cpu", copy=True) for name in self.masters}

    @torch.no_grad()
    def penalise(self, gradients: Mapping[str, torch.Tensor], sparsity: float) -> float:
        """Add the gradient of ``sparsity`` times the distance from changing nothing; the term."""
        total = 0.0
        for name, neutral in self._neutral.items():
            distance = self.masters[name] - neutral
            gradients[name].add_(torch.sign(distance), alpha=sparsity)
            total += sparsity * float(distance.abs().sum())
        return total

    @torch.no_grad()
    def confine(self) -> None:
        """Masks stay between 0 and 1."""
        for name in self._masks:
            self.masters[name].clamp_(0.0, 1.0)


def _start(name: str, parameter: Parameter, blobs: Blobs) -> torch.Tensor:
    if not isinstance(parameter.init, str):
        return torch.full(parameter.shape, parameter.init, dtype=torch.float64)
    value = blobs.get(parameter.init.removeprefix("blob:"), f"params.{name}")
    if tuple(value.shape) != parameter.shape:
        raise InvalidRequest(
            f"the declared shape is {list(parameter.shape)}",
            field=f"params.{name}.init",
            given=list(value.shape),
        )
    return value


def _start_of_basis(name: str, parameter: Parameter, blobs: Blobs, seed: int) -> torch.Tensor:
    """The start of a trained basis: its tensor, or drawn at random where there is none."""
    if isinstance(parameter.init, str):
        rows = _start(name, parameter, blobs).double()
        off = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()
        if off > 1e-3:
            raise InvalidRequest(
                f"the rows are not orthonormal (off by {off:.2g})",
                field=f"params.{name}.init",
                remedy="torch.linalg.qr(rows.T).Q.T makes them so",
            )
        return rows
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    made: torch.Tensor = torch.linalg.qr(drawn.T).Q.T.contiguous()
    return made
