"""What the host needs to launch a prompt and a training window at the size of Llama-3-8B.

    PYTHONPATH=src python bench/host_launches.py [--rows 256] [--layers 32] [--out FILE] [--smoke]

A prompt is a plain forward pass; a window is that of `finetune_gpu.py`: forward under a recording,
then the backward, a LoRA of rank 16 on down_proj in every layer. Nothing waits for the device
until all is launched: what the clock says at that moment is the host's part, and where it is not
less than the whole, the device waited for the host. Random bf16 weights, 256 rows at a time,
medians of many rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from finetune_gpu import LLAMA_8B, Device, Job, description
from invivo.engine.recording import Recording
from invivo.engine.training_rows import Rows, TrainingRows
from invivo.kernels.paging import contiguous_layout
from invivo.models.config import LayerConfig, RopeConfig
from invivo.models.load import random_model

WARM_UP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "host-launches-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on any device")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("bench/host_launches.py needs a CUDA device (or --smoke)")
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(LLAMA_8B, layers=(LayerConfig(),) * args.layers)
    if args.smoke:
        config = replace(
            config, vocab_size=320, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96,
            max_positions=1024, ropes=(RopeConfig(500_000.0, 16),),
        )  # fmt: skip
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    decoder = random_model(config, device=device.name, dtype=dtype)
    job = Job(decoder, args.rows, None, None, device)
    for _ in range(WARM_UP):
        prompt(job)
        window(job)
    gc.collect()
    gc.freeze()  # as `invivo serve` does
    times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for found in (prompt(job), window(job)):
            for what, pair in found.items():
                times[what].append(pair)
    body = description(device) | {"rows": args.rows, "layers": args.layers, "ms": {}}
    print(f"{body['device']}, {args.rows} rows, {args.layers} layers")
    for what, pairs in times.items():
        host, whole = ([1e3 * pair[i] for pair in pairs] for i in range(2))
        row = {
            "host": statistics.median(host),
            "host_least": min(host),
            "whole": statistics.median(whole),
        }
        body["ms"][what] = row
        print(
            f"{what:<16} host {row['host']:7.2f} ms (least {row['host_least']:.2f}, "
            f"{1e3 * row['host'] / args.layers:.0f} us a layer), with the device {row['whole']:.2f}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(body, indent=1) + "\n")


class Clock:
    """Seconds from a moment at which the device had nothing to do."""

    def __init__(self, device: Device) -> None:
        self._device = device
        device.wait()
        self._begun = time.perf_counter()

    def pair(self) -> tuple[float, float]:
        """To now, and to the end of all that was launched."""
        launched = time.perf_counter()
        self._device.wait()
        return launched - self._begun, time.perf_counter() - self._begun


@torch.no_grad()
def prompt(job: Job) -> dict[str, tuple[float, float]]:
    """A forward pass without adapter, with what is worked out once a batch."""
    layout = contiguous_layout([job.length], device=job.device.name)
    clock = Clock(job.device)
    job.decoder(job.sequence.tokens, layout, job.cache)
    return {"prompt": clock.pair()}


@torch.no_grad()
def window(job: Job) -> dict[str, tuple[float, float]]:
    """Forward and backward of a window that is a whole text."""
    trainer, sequence = job.trainer, job.sequence
    layout = contiguous_layout([job.length], device=job.device.name)
    found = {}
    clock = Clock(job.device)
    trainer.begin(sequence)
    rows = TrainingRows(None, [Rows(0, job.length, trainer.bypass.window(0, job.length))])
    piece = trainer.piece(sequence, 0, job.length, 0)
    recording = Recording(job.decoder, job.cache, rows, [piece])
    hidden = job.decoder(
        sequence.tokens, layout, job.cache, bypass=recording.bypass, taps=recording
    )
    found["window forward"] = clock.pair()
    trainer.forward_done(sequence, 0, job.length, hidden)
    del hidden
    clock = Clock(job.device)
    while (unit := trainer.next_unit(sequence, job.length)) is not None:
        trainer.run(sequence, unit)
    found["window backward"] = clock.pair()
    return found


if __name__ == "__main__":
    main()
