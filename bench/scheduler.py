"""Host time of one iteration: schedule() and the flat batch, without a model.

    python bench/scheduler.py [--rows 256] [--steps 400] [--json FILE]

Loads, all on one core with the tables of a 256-row engine:

- decode: 256 sequences decode, one token each and step; nothing else happens.
- mixed: 200 sequences decode beside chunks of long prompts; requests end and arrive all the time.
- behind: as decode, with tokens recorded one step late, as beside a GPU.

The bar: at most 1 ms a step at 256 running decodes, median. Fold (recording the tokens) is shown
beside it. Cyclic garbage collection is left on, as in the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from invivo.engine.batch import BatchBuilder
from invivo.engine.scheduler import Limits, Scheduler
from invivo.engine.types import Plan, Request, SamplingParams, Sequence

BAR_MS = 1.0


@dataclass(slots=True)
class Result:
    """Milliseconds a step; median and 99th percentile over the measured steps."""

    load: str
    steps: int
    rows: float  # token rows a step, mean
    spans: float
    schedule: float
    build: float
    total: float
    total_p99: float
    fold: float


def sequence(rng: random.Random, name: str, n_prompt: int, max_tokens: int) -> Sequence:
    tokens = tuple(rng.randrange(32_000) for _ in range(n_prompt))
    request = Request(id=name, tokens=tokens, params=SamplingParams(max_tokens=max_tokens))
    return Sequence(request, 0, list(tokens), n_prompt)


def fold(scheduler: Scheduler, plan: Plan) -> None:
    """What the engine does at least with a finished step."""
    for span in plan.spans:
        if span.samples:
            seq = span.seq
            scheduler.record(seq, 7)
            if len(seq.tokens) == seq.limit:
                scheduler.finish(seq)


def measure(load: str, rows: int, steps: int, lag: int = 0) -> Result:
    rng = random.Random(0)
    limits = Limits(n_blocks=rows * 140, max_running=rows, max_length=4096)
    scheduler, builder = Scheduler(limits), BatchBuilder(limits)
    n_decode = rows if load != "mixed" else rows * 25 // 32
    for i in range(n_decode):
        scheduler.add(sequence(rng, f"d{i}", rng.randrange(20, 600), 3000))
    in_flight: deque[Plan] = deque()
    times: list[tuple[float, float, float, int, int]] = []
    warm = False
    n_new = 0
    while len(times) < steps:
        if load == "mixed" and scheduler.n_waiting < 2:
            n_new += 1
            prompt, output = rng.randrange(100, 3000), rng.randrange(1, 40)
            scheduler.add(sequence(rng, f"m{n_new}", prompt, output))
        t0 = time.perf_counter()
        plan = scheduler.schedule(t0)
        t1 = time.perf_counter()
        assert plan is not None
        builder.build(plan)
        t2 = time.perf_counter()
        in_flight.append(plan)
        while len(in_flight) > lag:
            fold(scheduler, in_flight.popleft())
        t3 = time.perf_counter()
        warm = warm or plan.n_decode >= n_decode
        if warm:
            times.append((t1 - t0, t2 - t1, t3 - t2, plan.n_tokens, len(plan.spans)))
    schedule, build, folding, n_rows, n_spans = np.array(times).T
    total = 1e3 * (schedule + build)
    return Result(
        load=load,
        steps=steps,
        rows=float(n_rows.mean()),
        spans=float(n_spans.mean()),
        schedule=float(1e3 * np.median(schedule)),
        build=float(1e3 * np.median(build)),
        total=float(np.median(total)),
        total_p99=float(np.percentile(total, 99)),
        fold=float(1e3 * np.median(folding)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="running sequences")
    parser.add_argument("--steps", type=int, default=400, help="measured steps of each load")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, steps = arguments.rows, arguments.steps
    results = [
        measure("decode", rows, steps),
        measure("behind", rows, steps, lag=1),
        measure("mixed", rows, steps),
    ]
    columns = ["load", "rows", "spans", "schedule", "build", "total", "total_p99", "fold"]
    print(" ".join(f"{name:>10}" for name in columns) + "   (ms a step)")
    for result in results:
        values = asdict(result)
        cells = [f"{values[n]:>10}" if n == "load" else f"{values[n]:>10.3f}" for n in columns]
        print(" ".join(cells))
    report = {
        "bench": "scheduler",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "bar_ms": BAR_MS,
        "passes": results[0].total <= BAR_MS,
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(report))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
