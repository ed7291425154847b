"""Which programs the engine carries, and which go through the interpreter for now."""

from __future__ import annotations

from collections.abc import Iterator

from invivo.edits.program import MAIN
from invivo.edits.resolved import (
    CaptureRef,
    MeasureRef,
    ResolvedRow,
    RunPlan,
    SourceRef,
    Touch,
)
from invivo.engine.types import Request
from invivo.errors import InvalidRequest


def why_not_carried(request: Request) -> str | None:
    """Why the engine cannot carry the request's program yet; None if it can."""
    assert request.intervention is not None
    if request.intervention.resolved.program.numerics == "exact":
        # Matrix products choose their tiles by the number of rows in the batch.
        return 'its numerics are "exact", and rows of one batch round together'
    rows = request.intervention.resolved.rows
    seen: set[int] = set()
    for row in rows:
        if row.expanded:
            return "query heads get keys of their own"
        for plan in row.runs.values():
            if id(plan) in seen:
                continue
            seen.add(id(plan))
            for touch, source in _sources(plan):
                reason = _why_not_read(plan, touch, source, row)
                if reason is not None:
                    return f"steps[{touch.step}]: {reason}"
    return None


def check_carried(request: Request) -> None:
    """Check that a request and its program can go through the engine.

    Raises:
        InvalidRequest: it cannot, or not in this kind of request.
    """
    assert request.intervention is not None
    rows = request.intervention.resolved.rows
    reason = why_not_carried(request)
    if reason is not None:
        raise InvalidRequest(
            f"the engine cannot carry this program yet: {reason}",
            field="interventions",
            remedy="Use run, which falls back on the interpreter",
        )
    if request.kind == "run":
        return
    if request.n != 1:
        raise InvalidRequest("a program takes one continuation", field="n", given=request.n)
    if len(rows) != 1:
        raise InvalidRequest(
            f"the sweep has {len(rows)} rows, text comes from one",
            field="interventions.sweep",
            remedy="Use run for sweeps",
        )
    (row,) = rows
    if row.runs[MAIN].adapter is not None:
        raise InvalidRequest(
            'the weights of the run "main" are the request\'s own where it gives text or numbers',
            field="interventions.steps",
            given=row.runs[MAIN].adapter,
            remedy='Ask for "model:adapter", or use run',
        )
    if row.runs[MAIN].stop is not None:
        raise InvalidRequest(
            'the run "main" stops before its end, but its text is wanted',
            field="interventions.steps",
            remedy="Use run, or stop another run",
        )
    for plan in row.runs.values():
        for touch, source in _sources(plan):
            if plan.name != MAIN and source.run == MAIN:
                raise InvalidRequest(
                    f'the run "{plan.name}" reads "main", which is still being written',
                    field=f"interventions.steps[{touch.step}].from",
                    remedy='Read a run with "same": "main"',
                )
    _check_looks(row)


def adapters_of(request: Request) -> list[str]:
    """The adapters that the request and the runs of its program use, its own first."""
    own = [] if request.adapter is None else [request.adapter]
    rows = [] if request.intervention is None else request.intervention.resolved.rows
    plans = (plan for row in rows for plan in row.runs.values())
    return list(dict.fromkeys([*own, *(p.adapter for p in plans if p.adapter is not None)]))


def _sources(plan: RunPlan) -> Iterator[tuple[Touch, SourceRef]]:
    for touch in plan.touches:
        for source in touch.sources:
            if source.run is not None:
                yield touch, source


def _check_looks(row: ResolvedRow) -> None:
    """Raises InvalidRequest where an output looks at tokens that another run does not write."""
    looks: tuple[CaptureRef | MeasureRef, ...] = (*row.captures, *row.measures)
    for look in looks:
        ends = row.runs[look.run].prompt.n_prompt
        if look.run != MAIN and look.positions.first >= ends:
            raise _writes_nothing(look.run, look.output)
    for measure in row.measures:
        other = measure.other
        if other is None or other == MAIN:
            continue
        if max(measure.other_positions) >= row.runs[other].prompt.n_prompt:
            raise _writes_nothing(other, measure.output)


def _writes_nothing(run: str, output: int) -> InvalidRequest:
    return InvalidRequest(
        f'the run "{run}" writes no tokens: what is generated is of "main" alone',
        field=f"interventions.out[{output}].pos",
        remedy="Choose positions of its prompt",
    )


def _why_not_read(plan: RunPlan, touch: Touch, source: SourceRef, row: ResolvedRow) -> str | None:
    assert source.run is not None
    assert source.ref is not None
    if not source.positions:
        return None
    if source.run != plan.name:
        if max(source.positions) >= row.runs[source.run].prompt.n_prompt:
            return f'the run "{source.run}" writes no tokens: choose positions of its prompt'
        return None
    own = touch.positions.indices()
    if (source.ref.site, source.ref.layer) == (touch.ref.site, touch.ref.layer):
        same = not source.pooled and list(source.positions) == own
        return None if same else "a run reads other positions of the site that it changes"
    if source.pooled:
        later = bool(own) and max(source.positions) > own[0]
    else:
        later = any(there > here for there, here in zip(source.positions, own, strict=True))
    return "a run reads its own later positions" if later else None
