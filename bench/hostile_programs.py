"""Hostile programs: how soon is each refused, and do plain requests beside it stay as they were?

    PYTHONPATH=src python bench/hostile_programs.py [--model smollm2-135m] [--rounds 5] [--out FILE]

Every hostile program is handed in while plain generations run in the same engine. The claims: a
typed error within 50 ms (the worst of all rounds is told), and neighbours that write the very
tokens that they write alone. Programs that are carried (infinities, masks that hide everything)
must end, and are told without a time of refusal.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import invivo
from invivo.errors import InvivoError
from invivo.lm import LM

LIMIT_MS = 50.0
NEIGHBOURS = ["The capital of Poland is", "Once upon a time", "Water boils at"]
PROMPT = "The capital of Italy is"


@dataclass(frozen=True)
class Row:
    """One hostile program: milliseconds until its error over the rounds; None: carried out."""

    what: str
    error: str
    median_ms: float | None
    worst_ms: float | None


class Neighbours:
    """Plain generations that go on and on while the block lasts.

    Attributes:
        rounds: how often all of them were written.
        changed: texts that were not what they are alone.
    """

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._alone = written(lm)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_on)
        self.rounds = 0
        self.changed: list[str] = []

    def __enter__(self) -> Neighbours:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._stop.is_set():
            texts = written(self._lm)
            self.changed += [new for new, old in zip(texts, self._alone, strict=True) if new != old]
            self.rounds += 1


def deep(n: int) -> object:
    """Brackets in brackets."""
    value: object = []
    for _ in range(n):
        value = [value]
    return value


def hostile(width: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Keywords of ``run`` by what is wrong with them; made anew for each attempt, so that nothing
    is remembered from the one before."""
    rng = np.random.default_rng()

    def step(**fields: object) -> dict[str, Any]:
        # A number that is new each time: the program's hash is, too.
        fresh = {"at": "embed.out", "do": "scale", "a": 1 + 1e-6 * float(rng.random())}
        return {"program": {"steps": [fresh, {"at": "layers.0.resid.post", "do": "zero"} | fields]}}

    def swept(n: int, m: int) -> dict[str, Any]:
        kwargs = step(a="$a", do="scale")
        kwargs["program"]["sweep"] = {"a": f"0..{n - 1}", "b": f"0..{m - 1}"}
        return kwargs

    nan = np.full(width, np.nan, np.float32)
    large = np.zeros((17 << 20) // 4 * 4, np.float32)  # 68 MiB
    circle = [
        {"at": "layers.0.resid.post", "do": "replace", "from": "b"},
        {"run": "b", "at": "layers.0.resid.post", "do": "replace", "from": "main"},
    ]
    everything = [{"capture": "layers.*.resid.post", "pos": "@all"}]
    return {
        "sweep of 10,000 rows": lambda: swept(100, 100),
        "sweep of 10^12 rows": lambda: swept(10**6, 10**6),
        "1,024 steps in 4,096 rows": lambda: {
            "program": {
                "steps": [{"at": "layers.0.resid.post", "do": "scale", "a": "$a"}] * 1024,
                "sweep": {"a": "0..4095"},
                "out": [{"measure": "logit", "token": int(rng.integers(1000))}],
            }
        },
        "2,000 steps": lambda: {"program": {"steps": step()["program"]["steps"] * 1000}},
        "runs in a circle": lambda: {
            "program": {"runs": {"b": {"prompt": PROMPT}}, "steps": circle}
        },
        "unknown site": lambda: step(at="layers.0.attn.heads.z"),
        "layer that is not there": lambda: step(at="layers.999.resid.post"),
        "selector without a match": lambda: step(pos={"span": "nowhere"}),
        "range without end": lambda: step(pos={"range": [0, 10**15]}),
        "pattern that backtracks": lambda: step(pos={"regex": "(a*)*" * 30 + "b"}),
        "brackets 100,000 deep": lambda: {"program": {"steps": deep(100_000)}},
        "JSON text of 4 MB": lambda: {"program": '{"steps": [' + '{"do": "zero"},' * 270_000},
        "vector of another width": lambda: step(do="add", v=[1.0, 2.0]),
        "NaN in a blob": lambda: step(do="add", v="blob:v") | {"blobs": {"v": nan}},
        "NaN in the program": lambda: step(do="scale", a=float("nan")),
        "68 MiB blob": lambda: step(do="add", v="blob:v") | {"blobs": {"v": large}},
        "a blob of somebody else": lambda: step(do="add", v="blob:sha256:" + "0" * 64),
        "captures beyond the budget": lambda: {
            "program": {
                "steps": [{"at": "layers.0.resid.post", "do": "scale", "a": "$a"}],
                "sweep": {"a": "0..3999"},
                "out": everything,
            }
        },
        "basis that is not orthonormal": lambda: step(do="project_out", basis=[[1.0] * width]),
        "an operation nobody knows": lambda: step(do="explode"),
    }


def carried() -> dict[str, dict[str, Any]]:
    """Programs that are carried out and must harm nobody."""
    last = last_logit()
    huge = {"at": "layers.*.resid.post", "do": "scale", "a": 1e30}
    hidden = {"at": "input.mask", "do": "edge_block", "from": "@all", "to": "@all"}
    keys = {"at": "layers.*.attn.kvhead.*.k", "do": "scale", "a": 1e38}
    return {
        "infinities in every layer": {"steps": [huge, huge], "out": last},
        "infinite keys": {"steps": [keys, keys], "out": last},
        "nobody sees anybody": {"steps": [hidden], "out": last},
    }


def measured(lm: LM, what: str, make: Callable[[], dict[str, Any]], rounds: int) -> Row:
    """Hand one program in ``rounds`` times."""
    times, error = [], "none: it was carried out"
    for _ in range(rounds):
        kwargs = make()
        started = time.perf_counter()
        try:
            lm.run(prompt=PROMPT, **kwargs)
        except InvivoError as refused:
            times.append(1e3 * (time.perf_counter() - started))
            error = type(refused).__name__
    median = statistics.median(times) if times else None
    return Row(what, error, median, max(times, default=None))


def written(lm: LM) -> list[str]:
    """What the neighbours write."""
    return [c.text for c in lm.generate(NEIGHBOURS, temperature=0, max_tokens=8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    default = Path(__file__).parent / "results" / "hostile-programs.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    with invivo.load(args.model) as lm:
        lm.run({"out": last_logit()}, PROMPT)  # what is made at the first use is made
        gc.collect()
        gc.freeze()  # as `invivo serve` does
        with Neighbours(lm) as neighbours:
            rows = [
                measured(lm, what, make, args.rounds)
                for what, make in hostile(lm.info().hidden_size).items()
            ]
            for what, program in carried().items():
                rows.append(measured(lm, what, partial(dict, program=program), 1))
    print(f"{'hostile program':32} {'error':24} {'median':>8} {'worst':>8} ms")
    for row in rows:
        shown = ["-" if t is None else f"{t:.1f}" for t in (row.median_ms, row.worst_ms)]
        print(f"{row.what:32} {row.error:24} {shown[0]:>8} {shown[1]:>8}")
    print(f"neighbours: {neighbours.rounds} rounds, {len(neighbours.changed)} texts changed")
    report = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": args.model,
        "limit_ms": LIMIT_MS,
        "rows": [asdict(row) for row in rows],
        "neighbours": {"rounds": neighbours.rounds, "changed": len(neighbours.changed)},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    late = [row.what for row in rows if row.worst_ms is not None and row.worst_ms > LIMIT_MS]
    if late or neighbours.changed:
        raise SystemExit(f"later than {LIMIT_MS:.0f} ms: {late}; changed: {neighbours.changed}")


def last_logit() -> list[dict[str, Any]]:
    """One number of the last token."""
    return [{"capture": "logits", "pos": "@last", "reduce": "norm"}]


if __name__ == "__main__":
    main()
