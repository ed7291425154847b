"""Measures: numbers that are read off logits."""

from __future__ import annotations

import torch

from invivo.edits.resolved import MeasureRef


def measure_rows(
    measure: MeasureRef, rows: torch.Tensor, other: torch.Tensor | None = None
) -> torch.Tensor:
    """[positions] from logits [positions, V] at the measure's positions.

    Args:
        other: kl: logits [positions, V] of the run compared with; all positions are given, tokens
            that are not known yet have no row in ``rows``.
    """
    log = torch.log_softmax(rows, -1)
    match measure.kind:
        case "logit":
            return rows[:, measure.tokens[0]]
        case "logprob":
            return log[:, measure.tokens[0]]
        case "prob":
            return log[:, measure.tokens[0]].exp()
        case "rank":
            return (rows > rows[:, measure.tokens[0], None]).sum(-1)
        case "logit_diff":
            return rows[:, measure.tokens[0]] - rows[:, measure.tokens[1]]
        case _:
            assert other is not None
            other = torch.log_softmax(other, -1)
            return (log.exp() * (log - other)).sum(-1)
