"""A line for every iteration in which something is trained: what was planned, and what it took."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invivo.engine.coserve import Coserver, work_of
from invivo.engine.engine import Engine
from invivo.engine.finetune import FineTuning
from invivo.engine.types import Plan


def log_iterations(engine: Engine, path: Path) -> None:
    """Write JSON lines to ``path`` from now on. Times are seconds.

    ``busy`` is until when the step before is expected to run, from ``now`` on; ``pred`` and
    ``real`` are this iteration's time; ``tl`` is rows times layers of backward; ``left`` and
    ``length`` are rows of the texts at hand that have yet to run forward, and all of them.
    """
    out = path.open("w", encoding="utf-8")
    waiting: deque[tuple[Plan, dict[str, Any]]] = deque()
    tuning: FineTuning = engine._finetuning
    plan_of, folded_of = tuning.plan, tuning.folded

    def plan(now: float, busy: float | None) -> Plan | None:
        started = time.perf_counter()
        made = plan_of(now, busy)
        coserver: Coserver | None = tuning._coserver
        if made is None or coserver is None:
            return made
        trainees: Sequence[Any] = [job for job in tuning._jobs if job.state == "running"]
        work = work_of(made)
        line = {
            "now": now,
            "busy": None if busy is None else busy - now,
            "rows": work.rows,
            "train": work.train_rows,
            "context": work.context,
            "tl": work.backward,
            "layers": work.layers,
            "closing": len(made.closing),
            "left": [len(job.seq.tokens) - job.seq.n_computed for job in trainees],
            "length": [len(job.seq.tokens) for job in trainees],
            "safety": coserver.latency.safety,
            "pred": coserver.latency.predict(work),
            "plan": time.perf_counter() - started,
            "running": coserver.scheduler.n_running,
            "waiting": coserver.scheduler.n_waiting,
        }
        waiting.append((made, line))
        return made

    def folded(made: Plan, seconds: float, at: float) -> None:
        while waiting and waiting[0][0] is not made:  # it did not run
            waiting.popleft()
        if waiting:
            _, line = waiting.popleft()
            out.write(json.dumps(line | {"real": seconds, "at": at}) + "\n")
            out.flush()
        folded_of(made, seconds, at)

    tuning.plan, tuning.folded = plan, folded  # type: ignore[method-assign]
