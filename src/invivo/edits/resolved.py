"""What a program means for one model and its prompts: integers only, ready to be lowered.

A touch is one operation at one site of one layer. Touches of the same kernel and site, of however
many requests, become one launch: their positions only have to be laid end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from invivo.edits.arguments import Arguments
from invivo.edits.program import Program, Scalar
from invivo.edits.prompt_text import PromptText
from invivo.edits.selectors import Positions
from invivo.edits.site_names import SiteRef
from invivo.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class SourceRef:
    """Where the rows of a replacement are read.

    Attributes:
        run: the source run; None for a blob.
        blob: name of the tensor; None for a run.
        ref: the site, read as the model goes on with it.
        positions: one position of the source run for each position of the touch.
        pooled: the mean over all these positions goes to every position of the touch.
    """

    run: str | None = None
    blob: str | None = None
    ref: SiteRef | None = None
    positions: tuple[int, ...] = ()
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class Touch:
    """One operation at one site of one layer, in one run.

    Attributes:
        step: number of the step in the program.
        do: name of the operation; freeze, mean and resample have become "replace".
        kernel: what it lowers to (:class:`~invivo.edits.operations.Operation`).
        positions: rows that change; of edges the queries.
        args: values (numbers, vectors, blobs, parameters) and flags by name.
        sources: none, one, or those whose mean is taken.
        keys: of edges, the keys.
    """

    step: int
    run: str
    ref: SiteRef
    do: str
    kernel: str
    positions: Positions
    args: Arguments = field(default_factory=dict)
    sources: tuple[SourceRef, ...] = ()
    keys: Positions | None = None


@dataclass(frozen=True, slots=True)
class CaptureRef:
    """One capture at one site of one layer.

    Attributes:
        output: number of the output in the program.
        shape: of what comes back; n_bytes in float32 (lens with top: float32 and int32).
        args: arguments of the reduction, tokens as ids.
        keep: whether it is kept as a named tensor.
    """

    output: int
    name: str
    run: str
    ref: SiteRef
    positions: Positions
    reduce: str
    args: Arguments
    after: bool
    shape: tuple[int, ...]
    n_bytes: int
    keep: bool = False


@dataclass(frozen=True, slots=True)
class MeasureRef:
    """One measure: a number for each position, from the logits there.

    Attributes:
        tokens: the tokens it is about (logit_diff: a and b).
        other, other_positions: for kl, the run compared with, position by position.
        other_row: number of the row whose run that is; None: of the same row.
    """

    output: int
    name: str
    run: str
    kind: str
    positions: Positions
    tokens: tuple[int, ...] = ()
    other: str | None = None
    other_positions: tuple[int, ...] = ()
    other_row: int | None = None


@dataclass(frozen=True, slots=True)
class RunInput:
    """What a run sees in place of its prompt as it stands.

    Attributes:
        tokens: (position, token id) pairs that replace the prompt's.
        numbers: position number of each prompt token; () for 0, 1, 2, ... Generated tokens go on
            from the largest. Sliding windows count these numbers too.
        hidden: (queries, keys) pairs that do not see each other in any layer.
    """

    tokens: tuple[tuple[int, int], ...] = ()
    numbers: tuple[int, ...] = ()
    hidden: tuple[tuple[Positions, Positions], ...] = ()

    def number_of(self, index: int) -> int:
        """The position number of the token at ``index``."""
        if not self.numbers:
            return index
        n = len(self.numbers)
        return self.numbers[index] if index < n else max(self.numbers) + 1 + index - n


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One forward pass: its prompt, input and touches in forward order.

    Attributes:
        stop: the last layer that is computed; None: everything.
    """

    name: str
    prompt: PromptText
    touches: tuple[Touch, ...] = ()
    input: RunInput = RunInput()
    stop: int | None = None
    adapter: str | None = None

    @property
    def first_layer(self) -> int | None:
        """The first layer whose result differs from a plain run's; None if none does."""
        if self.input != RunInput() or self.adapter is not None:
            return 0
        touched = [t.ref for t in self.touches if t.ref.layer >= 0 or t.ref.site == "embed.out"]
        return min((max(ref.layer, 0) for ref in touched), default=None)


@dataclass(frozen=True, slots=True)
class ResolvedRow:
    """One row of the sweep.

    Attributes:
        runs: every run that is needed, in an order in which sources come before their readers.
        passes: the runs by pass; runs of one pass go through the layers side by side, a source
            that is read at a later site than it is needed at goes first.
        expanded: query heads get keys and values of their own.
    """

    binding: Mapping[str, Scalar]
    runs: Mapping[str, RunPlan]
    captures: tuple[CaptureRef, ...]
    measures: tuple[MeasureRef, ...]
    passes: tuple[tuple[str, ...], ...]
    expanded: bool = False


@dataclass(frozen=True, slots=True)
class ResolvedProgram:
    """A program for one model and its prompts.

    Attributes:
        varying: the runs that differ between rows of the sweep; all others are run once, and their
            plans are the same objects in all rows.
        n_bytes: bytes of all captures of all rows.
    """

    program: Program
    config: ModelConfig
    hash: str
    rows: tuple[ResolvedRow, ...]
    varying: frozenset[str]
    n_bytes: int
