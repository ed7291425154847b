"""What the programs of a batch of decodes do, worked out once for as long as it stays the same.

From token to token the same runs mostly do the same things to the same rows. What changes by
constants goes into tables that graphs read; only the runs of which more is wanted are asked in
every step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence

from invivo.engine.edit_tables import Change
from invivo.engine.run_edits import LOGITS, Key, Steady
from invivo.engine.step_cuts import tabled_sites
from invivo.models.config import ModelConfig

Rows = list[tuple[int, Steady]]


class DecodeEdits:
    """Programs in one composition of a batch: which runs are its rows, and what they do there.

    Args:
        rows: rows of the batch, ascending, each with what its run does.
        fits: whether there is room for tables of these sites.

    Attributes:
        tabled: sites whose changes are constants in tables, by row.
        asked: places in ``rows`` of the runs whose taps are asked in every step.
        loose: the sites at which they are, those of logits left out; None: they say so anew in
            every step.
    """

    def __init__(
        self, config: ModelConfig, rows: Rows, fits: Callable[[Collection[Key]], bool]
    ) -> None:
        self.rows = rows
        loose = {key for _, steady in rows for key in steady.other}
        constant = {key for _, steady in rows for key in steady.alone} - loose
        opens = any(steady.opens for _, steady in rows)
        sites = frozenset[Key]()
        if not opens:
            sites = tabled_sites(config, constant - {LOGITS}, loose - {LOGITS})
            sites = sites if fits(sites) else frozenset()
        self.tabled: dict[Key, list[Change]] = {key: [] for key in sites}
        for row, steady in rows:
            for key, (touch, by) in steady.alone.items():
                if key in sites:
                    self.tabled[key].append((row, touch, by))
        self.asked = [
            i
            for i, (_, steady) in enumerate(rows)
            if steady.opens or steady.other or not sites.issuperset(steady.alone)
        ]
        self.loose = None if opens else (loose | constant) - sites - {LOGITS}
        self._starts = [steady.start for _, steady in rows]
        self._stops = [steady.stop for _, steady in rows]

    def last_at(self, lengths: Sequence[int]) -> bool:
        """Whether its runs are known to do the same at the last tokens of texts that are this
        long; no where any of them is asked, for then it may have failed since.

        Args:
            lengths: by row of the batch.
        """
        if self.asked:
            return False
        now = [lengths[row] for row, _ in self.rows]
        return all(map(operator.lt, self._starts, now)) and all(map(operator.le, now, self._stops))
