"""The steps of a run: batches to gradients to weights, with everything measured and kept."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from invivo.errors import Diverged, StorageRefused
from invivo.models.decoder import Decoder
from invivo.training.checkpoint import Checkpoint, checkpoint_path, checkpoints, step_of
from invivo.training.config import TrainConfig
from invivo.training.loss_model import LossModel
from invivo.training.optimizer import (
    empty_moments,
    load_moments,
    make_optimizer,
    moments,
    set_rate,
)
from invivo.training.processes import Processes
from invivo.training.run_folder import RunFolder
from invivo.training.schedule import rate_at
from invivo.training.stream import NO_LABEL, Stream

Told = Callable[[Mapping[str, Any]], None]
Evaluate = Callable[[int | None], Mapping[str, Any]]
Continued = Callable[[int], list[tuple[str, str]]]
Status = Literal["done", "time", "interrupted"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class _Reading:
    """A step's numbers, which may still be on the device.

    Attributes:
        numbers: [2], loss in nats a token and the norm of the gradients.
        position: of the stream, before the step.
    """

    step: int
    tokens: int
    rate: float
    numbers: torch.Tensor
    position: dict[str, Any]


class Training:
    """One run, in one process or several that call the same methods.

    Args:
        decoder: float32 parameters, filled; they are trained in place, and shared among the
            processes.
        stream: each ``next`` gives this process's rows of an optimizer step.
        processes: this one among those that train together.
        steps: of the whole run.
        evaluate: numbers from so many held-out rows (None: all), which go into the metrics; called
            by all processes, with all parameters at hand.
        continued: gives (prompt, text) pairs at a step; called by the first process.
        told: gets every line of the metrics and samples as it is written, by the first process.
        clock: seconds.

    Attributes:
        decoder: what is trained.
        step: steps taken.
        seconds: spent in steps, over all resumptions.
    """

    def __init__(
        self,
        config: TrainConfig,
        decoder: Decoder,
        stream: Stream,
        folder: RunFolder,
        processes: Processes,
        *,
        steps: int,
        evaluate: Evaluate = lambda rows: {},
        continued: Continued | None = None,
        told: Told = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._stream, self._folder = config, stream, folder
        self.decoder = decoder
        self.steps = steps
        self._evaluate, self._continued, self._told = evaluate, continued, told
        self._clock = clock
        self._processes = processes
        self._is_first = processes.rank == 0
        self._device = decoder.embed.device
        self._model = LossModel(
            decoder,
            dtype=DTYPES[config.train.precision],
            recompute=config.train.recompute,
            compile=config.train.compile,
        )
        processes.share(self._model)
        self._parameters: dict[str, nn.Parameter] = dict(decoder.named_parameters())
        self._optimizer = make_optimizer(self._parameters, config.optimizer)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._readings: list[_Reading] = []
        self._read_at = 0.0
        self._read_tokens = 0
        self._slowest = 0.0  # seconds of a round: a step with what followed it
        n_bytes = sum(3 * p.numel() * p.element_size() for p in self._parameters.values())
        self._slowest_save = 1 + n_bytes / 200e6  # until one has been measured
        self._keeper = processes.keeper(folder.checkpoints, config.checkpoint.keep, decoder.config)
        self._saving_since, self._saving_step = 0.0, 0
        self._saved: int | None = None  # step of the newest checkpoint

    # Going on

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of this run."""

        def into() -> dict[str, torch.Tensor]:
            tensors = {f"parameter.{name}": p.detach() for name, p in self._parameters.items()}
            return tensors | (empty_moments(self._parameters) if step_of(path) else {})

        checkpoint = self._keeper.read(path, into)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(checkpoint.tensors[f"parameter.{name}"])
        self.step = self._saved = checkpoint.step
        load_moments(self._optimizer, self._parameters, checkpoint.tensors, self.step)
        self.tokens = int(checkpoint.state["tokens"])
        self.seconds = float(checkpoint.state["seconds"])
        self._stream.load(checkpoint.state["position"])

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"parameter.{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= moments(self._optimizer, self._parameters)
        state = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "position": self._stream.state(),
        }
        return Checkpoint(self.step, state, tensors)

    # The loop

    def run(
        self, *, stop: Callable[[], bool] = lambda: False, deadline: float = math.inf
    ) -> Status:
        """Train until the last step, until ``stop()``, or until a checkpoint just fits before
        ``deadline`` (in the clock's seconds). However it ends, the last step is in a checkpoint.
        After the last step all held-out text is read.

        Raises:
            Diverged: a loss or gradient is not a number; earlier checkpoints stay.
            StorageRefused: the last step could not be saved.
        """
        self._start_reading()
        status: Status = "done"
        while self.step < self.steps:
            began = self._clock()
            ending = self._before_step(stop, deadline)
            if ending is not None:
                status = ending
                break
            self._take_step()
            if self.step % self._config.train.log_every == 0:
                self._read()
            every = self._config.evaluation.every
            if every and self.step % every == 0 and self.step < self.steps:
                self._look(self._config.evaluation.windows)
            if self.step % self._config.checkpoint.every == 0 and self.step < self.steps:
                self._save()
            self._slowest = max(self._slowest, self._clock() - began)
        self._read()
        self._finish_saving()
        if self._saved != self.step:
            self._save(last=True)
        if status == "done":
            # Nothing is lost if this takes too long: the next call begins here.
            late = self._clock() + self._slowest >= deadline
            if self._processes.decided(late):
                status = "time"
            else:
                self._look(None)
        self.tell({"kind": "event", "event": status})
        refused = self._write_lines() if self._is_first else None
        if refused is not None:
            raise _unsaved(self.step, self._folder, refused)
        return status

    def _before_step(self, stop: Callable[[], bool], deadline: float) -> Status | None:
        """What the first process sees before a step: an end, or a checkpoint that is written."""
        out_of_time = self._clock() + self._slowest + 1.5 * self._slowest_save >= deadline
        seen = 4 * self._keeper.is_written + 2 * out_of_time + stop()
        agreed = int(self._processes.decided(seen))
        if agreed & 4:
            self._finish_saving()
        if agreed & 1:
            return "interrupted"
        return "time" if agreed & 2 else None

    def _take_step(self) -> None:
        """One optimizer step; the loss is divided once, by all labels of the step."""
        settings = self._config.train
        position = self._stream.state()
        batch = self._stream.next()
        abreast = self._processes.world // self._processes.readers  # with the same rows
        count = int(self._processes.total((batch.labels != NO_LABEL).sum())) // abreast
        rows = settings.micro_batch or len(batch.tokens)
        total = torch.zeros((), device=self._device)
        tokens, labels = self._sent(batch.tokens), self._sent(batch.labels)
        for first in range(0, len(batch.tokens), rows):
            part = slice(first, first + rows)
            loss, _ = self._model(
                tokens[part],
                labels[part],
                None if batch.starts is None else batch.starts[part],
            )
            loss = loss / max(1, count)
            loss.backward()
            total += loss.detach()
        total = self._processes.total(total) / abreast
        norm = self._processes.clip(self._parameters.values(), settings.clip)
        rate = rate_at(
            self._config.schedule, self._config.optimizer.learning_rate, self.step, self.steps
        )
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += count
        numbers = torch.stack((total, norm.to(total.dtype)))
        self._readings.append(_Reading(self.step, self.tokens, rate, numbers, position))

    def _sent(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` on the device, where nothing is waited for."""
        if self._device.type == "cpu":
            return rows
        return rows.pin_memory().to(self._device, non_blocking=True)

    # What is measured

    def _start_reading(self) -> None:
        self._read_at, self._read_tokens = self._clock(), self.tokens

    def _read(self) -> None:
        """Wait for the steps whose numbers are outstanding, and write them down.

        Raises:
            Diverged: one of them is not a number.
        """
        if not self._readings:
            return
        numbers = torch.stack([r.numbers for r in self._readings]).tolist()
        readings, self._readings = self._readings, []
        took = self._clock() - self._read_at
        speed = (self.tokens - self._read_tokens) / max(took, 1e-9)
        before = self.seconds
        self.seconds += took
        for i, (reading, (loss, norm)) in enumerate(zip(readings, numbers, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._refuse(reading, loss, norm)
            self.tell(
                {
                    "kind": "step",
                    "step": reading.step,
                    "tokens": reading.tokens,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": reading.rate,
                    "tokens_per_s": round(speed, 1),
                    "memory": peak_memory(self._device),
                    "seconds": round(before + took * (i + 1) / len(readings), 3),
                }
            )
        self._start_reading()

    def _refuse(self, reading: _Reading, loss: float, norm: float) -> None:
        self._finish_saving()  # all processes have read the same
        what = "the loss" if not math.isfinite(loss) else "the norm of the gradients"
        value = loss if not math.isfinite(loss) else norm
        position = ", ".join(f"{k} {v}" for k, v in reading.position.items())
        event = {"event": "diverged", "what": what, "value": str(value)}
        self.tell({"kind": "event"} | event | {"position": reading.position}, reading.step)
        saved = checkpoints(self._folder.checkpoints)
        kept = f"{saved[-1].name} is the last good checkpoint" if saved else "Nothing was saved yet"
        raise Diverged(
            f"{what} is {value} at step {reading.step}, which began at {position} in the data",
            field="train",
            remedy=f"{kept}; a lower optimizer.learning_rate, a longer schedule.warmup or a "
            "train.clip may help (--resume with --set goes on with other values)",
        )

    def _look(self, rows: int | None) -> None:
        """Evaluate on ``rows`` of held-out text (None: all), and continue the prompts."""
        self._read()
        with self._processes.whole(self._model):
            found = self._evaluate(rows)
            continued = self._continued if self._is_first else None
            texts = [] if continued is None else continued(self.step)
        if found:  # `tokens` are those learned from, in every line
            names = {"tokens": "held_out_tokens"}
            self.tell({"kind": "evaluation"} | {names.get(n, n): v for n, v in found.items()})
        for prompt, text in texts:
            line = {"step": self.step, "prompt": prompt, "text": text}
            self._folder.samples.add(line)
            self._told({"kind": "sample"} | line)
        self._start_reading()

    def tell(self, line: Mapping[str, Any], step: int | None = None) -> None:
        """Add a line to the metrics."""
        if not self._is_first:
            return
        kind = {"kind": line["kind"], "step": self.step if step is None else step}
        full = kind | {"tokens": self.tokens} | dict(line)
        self._folder.metrics.add(full)
        self._told(full)

    # What is kept

    def _save(self, *, last: bool = False) -> None:
        """Take a checkpoint. One that fails is tried again at the next occasion.

        Raises:
            StorageRefused: it was the ``last`` occasion.
        """
        self._read()
        self._finish_saving()
        self._saving_since, self._saving_step = self._clock(), self.step
        refused = self._write_lines() if self._is_first else None
        try:
            if self._processes.decided(refused is not None):
                raise refused or OSError("the first process could not write its lines")
            self._keeper.begin(self._checkpoint())
        except OSError as error:
            self._not_saved(error, last=last)
        else:
            if last or self._processes.decided(self._keeper.is_written):
                self._finish_saving(last=last)
        self._start_reading()

    def _write_lines(self) -> OSError | None:
        """Lines that came before a checkpoint must not be missing after it."""
        try:
            self._folder.metrics.write(safe=True)
            self._folder.samples.write(safe=True)
        except OSError as error:
            return error
        return None

    def _finish_saving(self, *, last: bool = False) -> None:
        """Wait for the checkpoint that was begun, if any.

        Raises:
            StorageRefused: it failed, and was the ``last`` occasion.
        """
        try:
            step = self._keeper.finish()
        except OSError as error:
            self._not_saved(error, last=last)
            return
        if step is not None:
            self._saved = step
            self._slowest_save = max(self._slowest_save, self._clock() - self._saving_since)
            name = checkpoint_path(self._folder.checkpoints, step).name
            self.tell({"kind": "event", "event": "checkpoint", "name": name}, step)

    def _not_saved(self, error: OSError, *, last: bool) -> None:
        failed = {"kind": "event", "event": "checkpoint_failed", "why": str(error)}
        self.tell(failed, self._saving_step)
        if last:
            raise _unsaved(self._saving_step, self._folder, error) from error


def _unsaved(step: int, folder: RunFolder, error: OSError) -> StorageRefused:
    saved = checkpoints(folder.checkpoints)
    kept = f"goes on from step {step_of(saved[-1])}" if saved else "begins anew"
    return StorageRefused(
        f"step {step} could not be written down: {error}",
        field="checkpoint",
        given=str(folder.checkpoints),
        remedy=f"Make room; the same command then {kept}",
    )


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU by tensors, else of this process (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def latest(folder: RunFolder) -> Path | None:
    """The newest checkpoint of a run."""
    saved = checkpoints(folder.checkpoints)
    return saved[-1] if saved else None
