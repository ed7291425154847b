"""One text that is being learned: what lives from the first row forward to the last one back.

Several short texts may be one of these (``packing``): no row sees another text, positions start
anew, and losses and gradients add up.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
import torch

from invivo.engine.packing import Packing, Part, parts
from invivo.engine.program_goals import Goal
from invivo.engine.run_edits import RunEdits
from invivo.engine.tape import Tape
from invivo.engine.transfer import index_on, to_device
from invivo.kernels.cross_entropy import IGNORED

Sums = tuple[torch.Tensor | None, torch.Tensor | None]


def next_token_labels(tokens: torch.Tensor, learned: torch.Tensor | None = None) -> torch.Tensor:
    """What each row must predict: the token after it.

    Args:
        tokens: [L] int64.
        learned: [L] bool, which tokens are to be learned; None = all. The label of row t is
            ignored where token t + 1 is not learned.

    Returns:
        [L] int64, the last one :data:`~invivo.kernels.cross_entropy.IGNORED`.
    """
    labels = torch.full_like(tokens, IGNORED)
    labels[:-1] = tokens[1:] if learned is None else tokens[1:].where(learned[1:], IGNORED)
    return labels


@dataclass(slots=True, eq=False)
class TrainSequence:
    """A text of L tokens on the engine's device, and the state of its micro-step.

    Attributes:
        tokens: [L] int64; virtual tokens of a prefix or soft prompt included.
        labels: [L] int64, what row t must predict, -100 for nothing.
        blocks: physical blocks in the paged cache, enough for L tokens.
        weights: [L] factor of each row's loss; None = 1.
        position_offset: added to the index to give the position (LongRoPE).
        edits: the program that it runs under.
        goal: what its loss is in place of the labels' cross-entropy.
        numbers: [L] int64 position numbers in place of the indices.
        job: name that its backward units bear.
        packing: of several texts; None: one.
        forwarded: rows that have run forward.
        loss: [] sum so far, on the device.
        n_labels: labelled rows so far.
        labelled: all rows with a label, in order; None: found when they are needed, for which the
            host waits for the device.
        n_correct: [] int64 those of them whose label was the most probable token.
        held_out: its loss is all that is wanted; nothing is kept and there is no backward.
        dx: [L, d] first the loss's gradient by the final states, then, as the backward goes down,
            by the residual stream.
        sums: gradients of keys and values by layer, each [L, G, D], None where nobody reads them.
            In a recurrent layer those by the state and tail at the end of the rows that are next.
        entering: states and tails of all recurrent layers, [n, ...] each, before the row at which
            a forward window began.
        tape: what the forward keeps; None when the backward reruns it from the tokens.
        d_embeddings: [L, d] gradient by the first residual stream, where it was asked for.
        row, layer: how far the backward is: rows from ``row`` on are done for the layers under
            way, layers from ``layer`` on are done for the rows under way.
        window, layers: rows and layers under way.
        placed: the rows whose positions were last asked for, and these.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    blocks: list[int]
    weights: torch.Tensor | None = None
    position_offset: int = 0
    job: str = ""
    held_out: bool = False
    edits: RunEdits | None = None
    goal: Goal | None = None
    numbers: torch.Tensor | None = None
    packing: Packing | None = None
    forwarded: int = 0
    loss: torch.Tensor | None = None
    n_labels: int = 0
    labelled: list[int] | None = None
    n_correct: torch.Tensor | None = None
    dx: torch.Tensor | None = None
    sums: dict[int, Sums] = field(default_factory=dict)
    entering: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    tape: Tape | None = None
    d_embeddings: torch.Tensor | None = None
    row: int = 0
    layer: int = 0
    window: tuple[int, int] = (0, 0)
    layers: tuple[int, int] = (0, 0)
    placed: tuple[int, int, torch.Tensor] | None = None
    table: torch.Tensor | None = None  # blocks on the device
    labelled_rows: torch.Tensor | None = None  # ``labelled`` on the device
    indices: torch.Tensor | None = None  # of rows within their texts, where there are several

    @property
    def length(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def begins(self) -> tuple[int, ...]:
        """Rows at which its texts begin."""
        return (0,) if self.packing is None else self.packing.begins

    def drop_tape(self) -> None:
        """Let go of the tape, wherever it lies."""
        if self.tape is not None:
            self.tape.close()
        self.tape = None

    def table_of(self, part: Part) -> torch.Tensor:
        """Blocks of a part's text, and those behind them."""
        assert self.table is not None
        return self.table[part.block :] if part.block else self.table

    def labelled_within(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) with a label, counted from ``start``: [n] int64 on the device."""
        if self.labelled is None:
            self.labelled = (self.labels != IGNORED).nonzero().squeeze(1).tolist()
        if self.labelled_rows is None:
            self.labelled_rows = index_on(self.labelled, self.labels.device)
        first, last = bisect_left(self.labelled, start), bisect_left(self.labelled, stop)
        return self.labelled_rows[first:last] - start

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start] int64; every layer of a unit asks for the same."""
        if self.placed is None or self.placed[:2] != (start, stop):
            self.placed = start, stop, self._positions(start, stop)
        return self.placed[2]

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        offset = self.position_offset
        if self.numbers is not None:
            return self.numbers[start:stop] + offset
        if self.packing is not None:
            if self.indices is None:
                own = parts(self.packing, 0, self.length)
                found = [np.arange(part.stop - part.start, dtype=np.int64) for part in own]
                self.indices = to_device(np.concatenate(found), self.tokens.device)
            return self.indices[start:stop] + offset
        return torch.arange(start + offset, stop + offset, device=self.tokens.device)
