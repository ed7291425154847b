"""The cheapest set of tensors from which all needed ones can be had: a minimum vertex cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

_Side = tuple[str, bool]  # a tensor, and whether it is its leaving half
_SOURCE: _Side = ("", False)
_SINK: _Side = ("", True)


def cheapest_kept(
    needed: Collection[str],
    made_from: Mapping[str, tuple[str, ...] | None],
    cost: Mapping[str, int],
) -> frozenset[str]:
    """Choose what to keep so that every needed tensor is kept or can be rebuilt.

    A tensor can be had if it is kept, or if all that it is made from can be had. So every way
    from a tensor that cannot be rebuilt to a needed one must pass a kept tensor, and the cheapest
    choice is a minimum cut (Edmonds and Karp 1972); of several the one nearest to the needs.

    Args:
        needed: tensors that must be had.
        made_from: by tensor, what a cheap operation rebuilds it from; None if nothing cheap does.
            Holds every tensor named in ``needed`` and in its own values.
        cost: of keeping a tensor, at least 0, an integer. What costs nothing counts as kept where
            it is used.
    """
    capacity: dict[_Side, dict[_Side, int]] = {_SOURCE: {}, _SINK: {}}
    unbounded = sum(cost.values()) + 1

    def edge(a: _Side, b: _Side, width: int) -> None:
        capacity.setdefault(a, {})[b] = width
        capacity.setdefault(b, {}).setdefault(a, 0)

    todo, seen = list(needed), set(needed)
    while todo:
        name = todo.pop()
        edge((name, False), (name, True), cost[name])
        origins = made_from[name]
        if origins is None:
            edge(_SOURCE, (name, False), unbounded)
            continue
        for origin in origins:
            edge((origin, True), (name, False), unbounded)
            if origin not in seen:
                seen.add(origin)
                todo.append(origin)
    for name in needed:
        edge((name, True), _SINK, unbounded)
    while _push_one_path(capacity):
        pass
    near = _reaching_sink(capacity)
    return frozenset(n for n in seen if (n, True) in near and (n, False) not in near)


def _push_one_path(capacity: dict[_Side, dict[_Side, int]]) -> bool:
    """Send what fits along a shortest path with room; False if there is none."""
    came: dict[_Side, _Side] = {_SOURCE: _SOURCE}
    queue = deque([_SOURCE])
    while queue and _SINK not in came:
        at = queue.popleft()
        for to, room in capacity[at].items():
            if room > 0 and to not in came:
                came[to] = at
                queue.append(to)
    if _SINK not in came:
        return False
    path = [_SINK]
    while path[-1] != _SOURCE:
        path.append(came[path[-1]])
    steps = list(zip(path[1:], path, strict=False))
    flow = min(capacity[a][b] for a, b in steps)
    for a, b in steps:
        capacity[a][b] -= flow
        capacity[b][a] += flow
    return True


def _reaching_sink(capacity: dict[_Side, dict[_Side, int]]) -> set[_Side]:
    """Everything from which the sink can still be reached when the flow is greatest."""
    near = {_SINK}
    queue = deque([_SINK])
    while queue:
        at = queue.popleft()
        for origin in capacity[at]:
            if origin not in near and capacity[origin].get(at, 0) > 0:
                near.add(origin)
                queue.append(origin)
    return near
