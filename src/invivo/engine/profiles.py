"""Measured iteration times to simulate with. No torch here."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

from invivo.engine.h200_iterations import ITERATIONS
from invivo.engine.latency import Sample, Work
from invivo.errors import InvalidRequest

_MOST = 50  # iterations that one entry stands for: rare kinds matter as much to a plan


def h200_8b() -> list[Sample]:
    """An 8B model on one H200, as the engine measured it (:mod:`.h200_iterations`)."""
    return [Sample(Work(*sizes), ms / 1e3, min(count, _MOST)) for *sizes, ms, count in ITERATIONS]


def read_profile(path: Path, *, budget: str | None = None) -> list[Sample]:
    """Iterations with 8 decodes, from a table of FlexLLM's form (CSV, plain or gzip).

    Columns: ``max_tokens_per_batch, ft_fwd_tokens, bwd_layers_of_1024_tokens, n_steps, median_ms``.

    Args:
        budget: rows with that ``max_tokens_per_batch`` only; None takes the largest.

    Raises:
        InvalidRequest: the file is not there or not of that form.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="") as file:
            rows = list(csv.DictReader(file))
        budget = budget or max((row["max_tokens_per_batch"] for row in rows), key=int)
        samples = []
        for row in rows:
            if row["max_tokens_per_batch"] != budget:
                continue
            work = Work(8)
            if tokens := int(row["ft_fwd_tokens"]):
                work = work.with_window(0, tokens)
            if layers := int(row["bwd_layers_of_1024_tokens"]):
                work = work.with_backward(1024, layers)
            samples.append(Sample(work, float(row["median_ms"]) / 1e3, float(row["n_steps"])))
    except (OSError, KeyError, ValueError, EOFError) as error:
        # The text of a UnicodeDecodeError is short; its repr holds the whole file.
        raise InvalidRequest(
            f"is no table of iteration times: {type(error).__name__}: {error}",
            field="profile",
            given=str(path),
            remedy="Columns: max_tokens_per_batch, ft_fwd_tokens, bwd_layers_of_1024_tokens, "
            "n_steps, median_ms",
        ) from error
    return samples
