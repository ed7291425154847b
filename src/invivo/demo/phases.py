"""The demo's two phases: the load alone, and the same load while the model learns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invivo.demo.learning import NAME, Learning, held_out_loss
from invivo.demo.workload import Done, Task, rounds, run_load
from invivo.errors import Unavailable
from invivo.lm_jobs import ENDED, JobInfo

if TYPE_CHECKING:
    from invivo.lm import LM
    from invivo.lm_jobs import Job

HEAD_START = 3.0  # seconds of load before the job is asked for, as a job comes to a busy server
LONGEST = 60.0  # seconds of load beside the job; on a slow machine it learns the rest alone
LOOK = 0.5  # seconds between two looks at the job

OnDone = Callable[[Done], None]


@dataclass(slots=True)
class Phase:
    """A time of the demo and what the clients saw in it.

    Attributes:
        began, ended: Unix seconds.
        before, after: live snapshots.
    """

    name: str
    began: float
    ended: float
    results: list[Done]
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def counted(self, total: str) -> int:
        """How much one of the snapshot's totals has grown."""
        return int(self.after["totals"][total] - self.before["totals"][total])

    def rate(self, total: str) -> float:
        """The same, a second."""
        return self.counted(total) / self.seconds


async def serve_alone(lm: LM, load: list[Task], finished: OnDone) -> Phase:
    """One round of the load."""
    before, began = await lm.astats(), time.time()
    results = await run_load(lm, rounds(load, n=1), finished=finished)
    return Phase("serving alone", began, time.time(), results, before, await lm.astats())


async def serve_and_learn(
    lm: LM,
    start: Callable[[], Job],
    load: list[Task],
    learning: Learning,
    finished: OnDone,
    looked: Callable[[JobInfo], None],
) -> Phase:
    """Rounds of the load, soon a job beside it, until that has ended; ``looked`` hears of it.

    Raises:
        Unavailable: the job has failed.
    """
    before, began = await lm.astats(), time.time()
    watching = asyncio.create_task(_watch(lm, start, learning, looked))
    until = time.monotonic() + LONGEST
    results = await run_load(
        lm,
        rounds(load, first=1),
        going_on=lambda: not watching.done() and time.monotonic() < until,
        finished=finished,
    )
    phase = Phase("with fine-tuning", began, time.time(), results, before, await lm.astats())
    learning.job = await watching
    if learning.job.status != "succeeded":
        reason = (learning.job.error or {}).get("message", "it was ended")
        raise Unavailable(f"the fine-tuning job {learning.job.status}: {reason}")
    return phase


async def _watch(
    lm: LM, start: Callable[[], Job], learning: Learning, looked: Callable[[JobInfo], None]
) -> JobInfo:
    """Start the job, follow it to its end; halfway the version published by then is measured."""
    await asyncio.sleep(HEAD_START)
    job, began = await asyncio.to_thread(start), time.time()
    measured: asyncio.Task[None] | None = None

    async def measure(step: int) -> None:
        learning.held_out.append((step, await held_out_loss(lm, NAME)))

    while True:
        info = await asyncio.to_thread(job.info)
        looked(info)
        if info.status in ENDED:
            learning.seconds = time.time() - began
            if measured is not None:
                await measured
            return info
        halfway = measured is None and 2 * info.step >= info.n_steps > 0
        if halfway and any(adapter.name == NAME for adapter in await lm.aadapters()):
            measured = asyncio.create_task(measure(info.step))
        await asyncio.sleep(LOOK)
