"""A process that trains beside requests, to be killed by tests at any moment."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tests.engine.drive import ask, small_engine

from invivo.engine.bypasses import BypassSpec
from invivo.engine.job_spec import JobSpec, Text
from invivo.models.load import load_model

SPEC = JobSpec(
    "job",
    (BypassSpec("lora", ("q", "v", "down"), 4, alpha=8.0),),
    90,
    0.01,
    schedule="cosine",
    gradient_accumulation=2,
    checkpoint_every=5,
)


@dataclass
class Texts:
    """The same random texts in the same order, for ever."""

    at: int = 0

    def next(self) -> Text:
        rng = random.Random(self.at)
        self.at += 1
        tokens = [rng.randrange(290) for _ in range(rng.randint(8, 40))]
        return Text(tokens, [*tokens[1:], -100])

    def position(self) -> Any:
        return self.at

    def seek(self, position: Any) -> None:
        self.at = position


def kill_9() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(
    model: str,
    dtype: str,
    policy: str,
    folder: str,
    pipe: Connection,
    doom: tuple[int, float] | None,
) -> None:
    """Run SPEC to its end beside requests; every event goes into the pipe, then the result.

    Args:
        doom: (steps, seconds): killed that long after so many steps, and two steps later at the
            latest, so that no busy machine lets it get away.
    """
    torch.set_num_threads(1)
    loaded = load_model(model, dtype=getattr(torch, dtype))
    engine = small_engine(loaded, policy=policy, max_batch_tokens=32, max_running=8)
    done = 0

    def tell(event: dict[str, Any]) -> None:
        nonlocal done
        pipe.send(event)
        done += event["event"] == "step"
        if doom is None or event["event"] != "step":
            return
        if done == doom[0]:
            timer = threading.Timer(doom[1], kill_9)
            timer.daemon = True
            timer.start()
        elif done == doom[0] + 2:
            kill_9()

    job = engine.finetune(SPEC, Texts(), tell, Path(folder))
    rng, asked = random.Random(1), []
    while not job.ended.is_set():
        while sum(not one.done for one in asked) < 3:
            prompt = [rng.randrange(290) for _ in range(rng.randint(2, 40))]
            asked.append(ask(engine, prompt, max_tokens=20, seed=rng.randrange(99)))
        engine.step()
    errors = [one.outputs[-1].error for one in asked if one.done and one.outputs[-1].error]
    pipe.send({"event": "result", "losses": job.losses, "state": job.state, "errors": errors})


def train_on_a_full_disk(model: str, folder: str, pipe: Connection) -> None:
    """Files may not grow any more after the first checkpoint, until the job has paused."""
    torch.set_num_threads(1)
    engine = small_engine(load_model(model, dtype=torch.float32))
    events: list[dict[str, Any]] = []
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def hear(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "checkpoint" and event["path"].endswith("step-00000005"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))

    job = engine.finetune(SPEC, Texts(), hear, Path(folder))
    while job.state != "paused":
        engine.step()
    left = sorted(path.name for path in Path(folder).iterdir())
    held = engine.scheduler.blocks_used
    asked = ask(engine, [5, 6, 7], max_tokens=20, ignore_eos=True)
    while not asked.done:
        engine.step()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    job.resume()
    while not job.ended.is_set():
        engine.step()
    pipe.send(
        {
            "events": [event for event in events if event["event"] != "step"],
            "left": left,
            "held": held,
            "answered": len(asked.tokens()),
            "state": job.state,
            "losses": job.losses,
        }
    )
