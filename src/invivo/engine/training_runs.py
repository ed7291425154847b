"""The runs of a program that a training text goes through: those that are read, then its own.

Runs that others read go forward once, and what is read of them stays. The text's own run goes
forward under its touches, and its backward reruns them under autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from invivo.edits.apply import Context
from invivo.edits.program import MAIN, PLAIN
from invivo.edits.resolved import ResolvedProgram, ResolvedRow, RunPlan
from invivo.edits.value_shapes import touched_shape
from invivo.engine.kept_rows import KeptRows
from invivo.engine.run_edits import RunEdits, source_positions
from invivo.errors import InvalidRequest, TooLarge
from invivo.models.config import ModelConfig


@dataclass(slots=True, eq=False)
class TrainingRun:
    """One run of a text; ``kept`` is what later ones read of it."""

    plan: RunPlan
    edits: RunEdits
    kept: list[KeptRows] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.plan.name == MAIN

    @property
    def tokens(self) -> list[int]:
        """Its token ids, those that the program sets among them."""
        ids = list(self.plan.prompt.ids)
        for at, token in self.plan.input.tokens:
            ids[at] = token
        return ids

    def through(self) -> None:
        """It has gone forward: what is kept may enter a backward."""
        for rows in self.kept:
            rows.out_of_inference()


def training_runs(
    resolved: ResolvedProgram,
    context: Context,
    *,
    max_bytes: int,
    reference: KeptRows | None = None,
) -> list[TrainingRun]:
    """The runs that the text's own one needs, sources first, and it last.

    Args:
        resolved: for the text: its tokens are the run "main", with those that are learned behind
            its prompt.
        context: the trained parameters among its ``params``.
        max_bytes: most that may be kept of all runs that are read.
        reference: what else is kept, of the text without the program.

    Raises:
        InvalidRequest: the engine cannot train with this program.
        TooLarge: what the runs read of each other takes more than ``max_bytes``.
    """
    (row,) = resolved.rows
    if row.expanded:
        raise InvalidRequest(
            "query heads with keys of their own are not trained yet", field="program.steps"
        )
    needed, plans = _needed(row), dict(row.runs)
    if reference is not None:
        needed.add(PLAIN)
        plans = {PLAIN: RunPlan(PLAIN, plans[MAIN].prompt)} | plans
    runs: list[TrainingRun] = []
    n_numbers = 0
    done: dict[str, RunEdits] = {}
    for name, plan in plans.items():
        if name not in needed:
            continue
        _check(plan)
        kept = _kept_of(row, needed & row.runs.keys(), name)
        if reference is not None and name == PLAIN:
            kept.append(reference)
        edits = RunEdits(plan, context, dict(done), kept)
        done[name] = edits
        runs.append(TrainingRun(plan, edits, kept))
        n_numbers += sum(_numbers_of(rows, resolved.config, plan) for rows in kept)
    n_bytes = n_numbers * torch.empty((), dtype=context.dtype).element_size()
    if n_bytes > max_bytes:
        raise TooLarge(
            f"what the runs of a text read of each other takes at most {max_bytes} bytes",
            field="program.steps",
            given=n_bytes,
            remedy="Read fewer sites or positions, or train on shorter texts",
        )
    return runs


def _numbers_of(rows: KeptRows, config: ModelConfig, plan: RunPlan) -> int:
    """How many numbers are kept."""
    return math.prod(touched_shape(config, rows.ref, len(rows.positions), plan.prompt.length))


def _needed(row: ResolvedRow) -> set[str]:
    found, waiting = {MAIN}, [MAIN]
    while waiting:
        for touch in row.runs[waiting.pop()].touches:
            for source in touch.sources:
                if source.run is not None and source.run not in found:
                    found.add(source.run)
                    waiting.append(source.run)
    return found


def _check(plan: RunPlan) -> None:
    if plan.adapter is not None:
        raise InvalidRequest(
            "runs of a program that is trained use the base model",
            field=f"program.runs.{plan.name}.adapter",
            given=plan.adapter,
        )
    for touch in plan.touches:
        if any(source.run == plan.name for source in touch.sources):
            raise InvalidRequest(
                "a run that reads itself is not trained yet",
                field=f"program.steps[{touch.step}].from",
                given=plan.name,
                remedy='Add a run with "same": "main" and read it there',
            )
        if plan.name == MAIN and touch.ref.site == "logits":
            raise InvalidRequest(
                "the loss does not see what is done to the logits",
                field=f"program.steps[{touch.step}].at",
                remedy="Take final.norm.out",
            )
    if plan.name == MAIN and plan.stop is not None:
        raise InvalidRequest(
            'the run "main" stops before its end, but its loss is wanted', field="program.steps"
        )


def _kept_of(row: ResolvedRow, needed: set[str], name: str) -> list[KeptRows]:
    """What the needed runs read of one of them."""
    kept: dict[object, KeptRows] = {}
    for reader in needed - {name}:
        for touch in row.runs[reader].touches:
            for source in touch.sources:
                if source.run == name and source.ref is not None and source.positions:
                    at = source_positions(source)
                    kept.setdefault((source.ref, at), KeptRows(source.ref, at))
    return list(kept.values())
