"""Where the rows of a sweep part from each other, and what lies before that and is done once.

Rows that differ only from a layer and a token on share everything before: the keys of earlier
tokens, and the residual stream below that layer. Both are those of a run with the edits that all
rows have in common, the trunk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from invivo.edits.resolved import RunPlan
from invivo.edits.site_names import SiteRef
from invivo.engine.kept_rows import KeptRows


@dataclass(frozen=True, slots=True)
class Branch:
    """Where one run leaves the trunk: the first token and the first layer that it computes."""

    token: int
    layer: int


@dataclass(slots=True)
class Trunk:
    """What the runs of one name have in common.

    Attributes:
        plan: the run with the edits of all.
        branches: by number of the row.
        entries: by layer, the residual stream of the trunk before it, as far as branches need it.
    """

    plan: RunPlan
    branches: dict[int, Branch]
    entries: dict[int, KeptRows]

    def n_numbers(self, width: int) -> int:
        """How many numbers the entries hold."""
        return width * sum(len(kept.positions) for kept in self.entries.values())


def find_trunk(
    plans: Mapping[int, RunPlan],
    kept: Mapping[int, Iterable[KeptRows]],
    n_layers: int,
    common: Collection[int],
) -> Trunk:
    """The trunk of runs that differ in their touches alone.

    Args:
        plans: the runs of one name, by number of the row.
        kept: what is kept of each.
        common: the steps that do the same in all of them.
    """
    first = next(iter(plans.values()))
    branches = {i: _branch(plan, kept[i], n_layers, common) for i, plan in plans.items()}
    n = len(first.prompt.ids)
    starts: dict[int, int] = {}
    for branch in branches.values():
        if branch.layer > 0:
            starts[branch.layer] = min(branch.token, starts.get(branch.layer, n))
    entries = {
        layer: KeptRows(SiteRef("resid.post", layer - 1), range(token, n), after=False)
        for layer, token in starts.items()
    }
    touches = tuple(touch for touch in first.touches if touch.step in common)
    return Trunk(replace(first, touches=touches, stop=None), branches, entries)


def deepest_layer(kept: Iterable[KeptRows], n_layers: int) -> int | None:
    """How many layers are needed for what is kept of a run; None: all, and what comes behind."""
    layers = [_leaves(rows.ref, n_layers) for rows in kept if rows.positions]
    deepest = max(layers, default=n_layers)
    return deepest if deepest < n_layers else None


def _branch(
    plan: RunPlan, kept: Iterable[KeptRows], n_layers: int, common: Collection[int]
) -> Branch:
    tokens = [len(plan.prompt.ids) - 1]  # one has to go through
    layers = [n_layers]
    for touch in plan.touches:
        if touch.positions.ranges and touch.step not in common:
            tokens.append(touch.positions.first)
            layers.append(_enters(touch.ref, n_layers))
    for rows in kept:
        if rows.positions:
            tokens.append(rows.positions[0])
            layers.append(_enters(rows.ref, n_layers) if rows.ref.layer < 0 else rows.ref.layer)
    return Branch(min(tokens), min(layers))


def _enters(ref: SiteRef, n_layers: int) -> int:
    """The layer before which the residual stream is the same, whatever is done at ``ref``."""
    if ref.layer < 0:
        return 0 if ref.site == "embed.out" else n_layers
    return ref.layer + 1 if ref.site == "resid.post" else ref.layer


def _leaves(ref: SiteRef, n_layers: int) -> int:
    """How many layers are needed to see ``ref``, at least one."""
    if ref.layer < 0:
        return 1 if ref.site == "embed.out" else n_layers
    return ref.layer + 1
