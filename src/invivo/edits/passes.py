"""Which runs a program needs, in which order, and how many passes that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from invivo.edits.resolved import Touch
from invivo.edits.site_names import SiteRef
from invivo.errors import InvalidRequest

Order = Callable[[SiteRef], tuple[int, int]]


def order_runs(
    touches: Sequence[Touch], wanted: Iterable[str], order: Order
) -> tuple[list[str], tuple[tuple[str, ...], ...]]:
    """The runs that ``wanted`` ones depend on, sources first, and the runs of each pass.

    Runs of one pass go through the layers side by side: a value that is read no earlier than it
    is computed is a row copy. A value that is computed later than it is needed puts its run into
    an earlier pass.

    Raises:
        InvalidRequest: runs depend on each other in a circle.
    """
    needs: dict[str, dict[str, tuple[int, int]]] = {}  # reader -> source -> (waits, step)
    for touch in touches:
        for source in touch.sources:
            if source.run is None or source.run == touch.run or source.ref is None:
                continue
            waits = int(order(source.ref) > order(touch.ref))
            known = needs.setdefault(touch.run, {}).get(source.run, (0, touch.step))
            needs[touch.run][source.run] = max(known, (waits, touch.step))
    found: dict[str, int] = {}  # run -> its pass
    open_runs: list[str] = []

    def visit(run: str, step: int | None) -> int:
        if run in found:
            return found[run]
        if run in open_runs:
            circle = " -> ".join([*open_runs[open_runs.index(run) :], run])
            raise InvalidRequest(
                f"runs depend on each other in a circle: {circle}", field=f"steps[{step}].from"
            )
        open_runs.append(run)
        which = 0
        for source, (waits, at) in needs.get(run, {}).items():
            which = max(which, visit(source, at) + waits)
        open_runs.pop()
        found[run] = which
        return which

    for run in sorted(wanted):
        visit(run, None)
    n = 1 + max(found.values(), default=0)
    return list(found), tuple(tuple(r for r in found if found[r] == p) for p in range(n))
