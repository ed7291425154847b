"""What a program brings back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from invivo.edits.resolved import CaptureRef, MeasureRef, ResolvedRow


@dataclass(slots=True)
class Captured:
    """One capture at one site of one layer.

    Attributes:
        value: of shape ``ref.shape``, shorter where not all positions came to be; lens with top:
            log-probabilities.
        tokens: lens with top: the token ids, of the same shape.
    """

    ref: CaptureRef
    value: torch.Tensor
    tokens: torch.Tensor | None = None


@dataclass(slots=True)
class Measured:
    """One measure: ``values`` [positions]."""

    ref: MeasureRef
    values: torch.Tensor


@dataclass(slots=True)
class RowOutput:
    """Captures and measures of one row of the sweep, in the order of the row's references."""

    row: ResolvedRow
    captures: list[Captured] = field(default_factory=list)
    measures: list[Measured] = field(default_factory=list)


@dataclass(slots=True)
class ProgramOutput:
    """The rows of a program: one, or those of its sweep in order.

    An engine's tensors lie on the host, in float32 (float64 for a float64 model).
    """

    rows: list[RowOutput]
