"""Measured iteration times to simulate with. No torch here."""

from __future__ import annotations

import csv
from pathlib import Path

from invivo.engine.latency import Sample, Work
from invivo.errors import InvalidRequest

# All linear layers of the Llama-3.1-8B shape on one H200 (bf16, one CUDA graph), ms by rows:
# forward, and the products that the backward needs. Measured with torch 2.11.
_H200_ROWS = {1: 3.87, 8: 4.05, 32: 4.22, 64: 4.35, 128: 4.80, 192: 5.75, 256: 6.30}
_H200_ROWS |= {384: 9.07, 512: 11.1, 1024: 20.4, 2048: 40.8}
_H200_BACKWARD = {64: 4.10, 128: 4.45, 256: 6.81, 512: 12.0, 1024: 22.4, 2048: 45.8}
_H200_LAYERS = 32
# Beside them, computed: a key and value of all layers is 128 KiB, read at 3.5 TB/s; a pair of row
# and key costs 4 * 4096 * 32 operations at 400 T/s; sampling, launches and host take 1 ms.
_H200_KEY = 131072 / 3.5e12
_H200_PAIR = 4 * 4096 * 32 / 400e12
_H200_HOST = 1e-3
# What training adds, from bench/results/finetune-h200.json (LoRA of rank 16 on the down
# projections, everything kept). A window of 2,048 rows with its loss takes 61.7 ms where the
# products and the attention above make 44.5: the rest goes with the rows. A backward of 2,048 rows
# takes 63.1 ms of 45.8 in products, and two of 1,024 take 1.27 times as long as one of 2,048: so
# the rest goes with the layers that a unit passes, however few its rows.
_H200_TRAIN_ROW = (61.7e-3 - 44.5e-3) / 2048
_H200_UNIT = 17.3e-3  # through all layers


def h200_8b() -> list[Sample]:
    """An 8B model on one H200: measured products and training, computed attention."""
    samples = []
    for rows, ms in _H200_ROWS.items():
        for keys in (0, 200_000):
            seconds = ms / 1e3 + _H200_HOST + keys * _H200_KEY
            samples.append(Sample(Work(rows, context=keys), seconds))
        if rows >= 64:
            window = Work(0).with_window(2048, rows)
            seconds = ms / 1e3 + _H200_HOST + window.pairs * _H200_PAIR
            samples.append(Sample(window, seconds + rows * _H200_TRAIN_ROW))
            prefill = Work(rows, pairs=window.pairs)
            samples.append(Sample(prefill, seconds))
    for rows, ms in _H200_BACKWARD.items():
        for layers in (_H200_LAYERS // 4, _H200_LAYERS):
            unit = (ms / 1e3 + _H200_UNIT) * layers / _H200_LAYERS
            seconds = _H200_ROWS[32] / 1e3 + _H200_HOST + unit
            samples.append(Sample(Work(32).with_backward(rows, layers), seconds))
    return samples


def read_profile(path: Path, *, budget: str | None = None) -> list[Sample]:
    """Iterations with 8 decodes, from a table of FlexLLM's form.

    Columns: ``max_tokens_per_batch, ft_fwd_tokens, bwd_layers_of_1024_tokens, n_steps, median_ms``.

    Args:
        budget: rows with that ``max_tokens_per_batch`` only; None takes the largest.

    Raises:
        InvalidRequest: the file is not there or not of that form.
    """
    try:
        with path.open(newline="") as file:
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
    except (OSError, KeyError, ValueError) as error:
        raise InvalidRequest(
            f"is no table of iteration times: {error!r}",
            field="profile",
            given=str(path),
            remedy="Columns: max_tokens_per_batch, ft_fwd_tokens, bwd_layers_of_1024_tokens, "
            "n_steps, median_ms",
        ) from error
    return samples
