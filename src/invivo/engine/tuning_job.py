"""One fine-tuning job: its text under way, its gradients, its optimizer, its place in the data.

Decides nothing about memory, time or other jobs (:mod:`invivo.engine.finetune` does) and is used
from the engine's thread alone. Gradients of a text count only once the text is through: a text
that loses its memory, or is interrupted, begins anew and leaves no trace.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from invivo.edits.apply import Context
from invivo.edits.site_names import SiteRef
from invivo.engine.bypasses import (
    BypassSpec,
    check_parameters,
    checked_specs,
    init_parameters,
    n_virtual,
)
from invivo.engine.checkpoint import CheckpointWriter, Snapshot
from invivo.engine.closings import Closing, Part
from invivo.engine.host_shelf import HostShelf
from invivo.engine.job_spec import DataSource, JobSpec, OnEvent, Text, check_text
from invivo.engine.kept_rows import KeptRows
from invivo.engine.optimizer import Optimizer, clip_factor, learning_rate, total_norm
from invivo.engine.packing import packing_of
from invivo.engine.program_goals import Goal
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.trained_hooks import TrainedHooks, hooks_from
from invivo.engine.trained_program import ProgramParameters, check_trained, lowest_layer
from invivo.engine.training_runs import TrainingRun, training_runs
from invivo.engine.transfer import index_on, to_device, to_host
from invivo.engine.types import BackwardUnit, Request, Sequence
from invivo.engine.window import Mode, Order, WindowTrainer
from invivo.errors import Conflict, InvalidRequest
from invivo.kernels.cross_entropy import IGNORED
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.rope import long_text_offset

State = Literal[
    "queued", "running", "paused", "finishing", "succeeded", "failed", "cancelled", "stopped"
]
BAD_STEPS = 3  # without a finite loss in a row, after which a job fails


@dataclass(slots=True)
class Sums:
    """Over texts that are through; on the device, so that nobody waits for them."""

    loss: torch.Tensor
    n_correct: torch.Tensor
    n_labels: int = 0

    def add(self, sequence: TrainSequence) -> None:
        assert sequence.loss is not None
        assert sequence.n_correct is not None
        self.loss += sequence.loss
        self.n_correct += sequence.n_correct
        self.n_labels += sequence.n_labels


def nothing_yet(device: torch.device) -> Sums:
    """Sums over no text."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return Sums(zero, torch.zeros((), dtype=torch.int64, device=device))


@dataclass(slots=True)
class Taken:
    """An optimizer step whose numbers are on their way to the host.

    Attributes:
        numbers: [3] loss (a sum), norm of the gradients, right tokens.
        arrived: passes when they are there; None: they are.
        applied: whether the update was made without waiting for them.
    """

    event: dict[str, Any]
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None
    applied: bool


class TuningJob:
    """A job as the policy sees it (:class:`invivo.engine.coserve.Trainee`), and its arithmetic.

    Attributes:
        step: optimizer steps done, those without a finite loss included.
        losses: of every step, per labelled token.
        complete: no step is left.
        error: why it failed, or what the last checkpoint met.
        idle_since, n_idle: since when, and for how many iterations, it had no piece of training.
        waits_for: what has kept it from training for long.
        forward_tokens, backward_tokens: rows run so far, repeated ones included.
    """

    def __init__(
        self,
        spec: JobSpec,
        data: DataSource,
        on_event: OnEvent,
        decoder: Decoder,
        cache: KVCache,
        writer: CheckpointWriter | None,
        validation: DataSource | None = None,
        max_kept_bytes: int = 1 << 30,
        pack_rows: int = 0,
        shelf: HostShelf | None = None,
    ) -> None:
        """
        Args:
            validation: held-out texts, from the first to the last at every look.
            max_kept_bytes: what the runs of a program may read of each other, in each text.
            pack_rows: most rows of texts that run as one sequence.
            shelf: host memory for tapes.

        Raises:
            InvalidRequest: the bypasses do not fit the model or each other.
        """
        config = decoder.config
        self.spec = spec
        self.on_event = on_event
        self.writer = writer
        wide = torch.float64 if decoder.embed.dtype == torch.float64 else torch.float32
        device = decoder.embed.device
        # Recurrent layers know one way; it needs no tape, so nothing is lost by it. So do programs.
        one_way = bool(config.recurrent) or spec.program is not None
        mode: Mode = "rerun" if one_way else spec.mode
        order: Order = "window" if one_way else spec.order
        hooks: TrainedHooks | None = None
        self.program: ProgramParameters | None = None
        self.specs: tuple[BypassSpec, ...] = ()
        self.parameters: dict[str, torch.Tensor]
        if spec.program is not None:
            check_trained(spec.program, config, weight_decay=spec.weight_decay)
            self.program = ProgramParameters(spec.program, config, decoder.embed, seed=spec.seed)
            self.parameters = self.program.masters
            hooks = hooks_from(config, lowest_layer(spec.program, config))
            self._context = Context(decoder.embed.dtype, device, spec.program.blobs, self.program)
        else:
            self.specs = checked_specs(config, spec.bypasses)
            self.parameters = {
                name: value.requires_grad_()
                for i, each in enumerate(self.specs)
                for name, value in init_parameters(
                    each, config, seed=spec.seed + i, dtype=wide, device=device
                ).items()
            }
            if spec.first is not None:
                check_parameters(config, self.specs, spec.first)
                with torch.no_grad():
                    for name, value in self.parameters.items():
                        value.copy_(spec.first[name])
        self.trainer = WindowTrainer(
            decoder,
            cache,
            self.specs,
            self.parameters,
            mode=mode,
            order=order,
            tape_bytes=spec.tape_bytes,
            hooks=hooks,
            shelf=shelf,
        )
        self.optimizer = Optimizer(spec, self.parameters)
        self.n_layers = config.n_layers - self.trainer.bottom
        self.cuts_layers = not (mode == "rerun" and order == "window")
        self.state: State = "queued"
        self.step = 0
        self.losses: list[float] = []
        self.complete = False
        self.resumed_from: Path | None = None
        self.error: Exception | None = None
        self.saved = 0  # step of the newest checkpoint
        self.closing: Closing | None = None  # the optimizer step that waits for its end
        self.published = 0  # version last published
        self.forward_tokens = 0
        self.backward_tokens = 0.0
        self.n_restarts = 0
        self.idle_since: float | None = None
        self.n_idle = 0
        self.waits_for: str | None = None
        self.told_waiting: float | None = None
        self.seq = Sequence(Request(spec.name, ()), 0, [], 0)
        self.sequence: TrainSequence | None = None
        self._runs: deque[TrainingRun] = deque()  # of the text at hand, that are yet to come
        self._run: TrainingRun | None = None  # to which the sequence belongs
        self._goal: Goal | None = None  # of the text at hand
        self._text: tuple[Text, bool] | None = None  # to which they belong; whether it is held out
        self.held: list[int] = []  # blocks that the text has written to
        # Recurrent layers have one state a row, and a program says what happens to one text.
        packs = spec.pack and not one_way
        self._pack_rows = pack_rows if packs else 0
        self._block_size = cache.block_size
        self._n_at_hand = 0  # texts of the sequence
        self._ahead: Text | None = None  # fetched, but it did not fit beside those before it
        self._config = config
        self._device = device
        self._wide = wide
        self._data = data
        self._position = data.position()  # after the texts of the last optimizer step
        self._validation = validation
        self._max_kept_bytes = max_kept_bytes
        self._validation_start = None if validation is None else validation.position()
        self._validated = 0  # the last step after which the held-out texts were run through
        self._held_out: Sums | None = None  # under way
        self._gradients: dict[str, torch.Tensor] = {}
        self._sums = nothing_yet(device)
        self._n_texts = self._bad = 0
        self._taken: deque[Taken] = deque()  # steps that are yet to be told of

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def share(self) -> float:
        return self.spec.share

    def next_unit(self, tokens: int, layers: int | None) -> BackwardUnit | None:
        assert self.sequence is not None
        return self.trainer.next_unit(self.sequence, tokens, layers)

    # --- texts ------------------------------------------------------------------------------
    def next_text(self, longest: int) -> bool:
        """Fetch the next text, of at most ``longest`` tokens; False when there is none.

        Raises:
            InvalidRequest: the text cannot be learned.
        """
        if self._runs:
            self._next_run(longest)
            return True
        text = self._next_of(self._data)
        if text is None:
            return False
        left = self.spec.gradient_accumulation - self._n_texts
        self._take_up(self._packed(text, longest, left, self._data), longest, held_out=False)
        return True

    def _packed(self, first: Text, longest: int, most: int, data: DataSource) -> list[Text]:
        """``first`` and the texts after it, at most ``most`` in all, that run with it as one."""
        texts = [first]
        limit = min(longest, self._pack_rows)
        n, size = n_virtual(self.specs), self._block_size
        offset = long_text_offset(self._config, len(first.tokens) + n)
        rows = blocks = 0
        while True:
            length = len(texts[-1].tokens) + n
            rows, blocks = rows + length, blocks + -(-length // size)
            fits = max(rows, blocks * size) <= limit and self._may_have(rows)
            if len(texts) > 1 and (not fits or long_text_offset(self._config, length) != offset):
                self._ahead = texts.pop()
                return texts
            if not fits or len(texts) == most:
                return texts
            text = data.next()
            if text is None:
                return texts
            texts.append(text)

    def _may_have(self, rows: int) -> bool:
        """Whether a sequence of so many rows may keep what its backward needs."""
        try:
            self.trainer.check_length(rows)
        except InvalidRequest:
            return False
        return True

    def _next_of(self, data: DataSource) -> Text | None:
        """The next text, which may have been fetched already."""
        text, self._ahead = self._ahead, None
        return data.next() if text is None else text

    @property
    def validation_due(self) -> bool:
        """Whether held-out texts come next. A job that goes on from a checkpoint runs through
        those of its step again: the last process may not have come so far."""
        every = self.spec.validate_every
        due = self.complete or bool(every and self.step % every == 0)
        return self._validation is not None and due and 0 < self.step != self._validated

    def next_held_out(self, longest: int) -> bool:
        """Fetch the next held-out text; False when all have been run through.

        Raises:
            InvalidRequest: the text is too long.
        """
        assert self._validation is not None
        if self._runs:
            self._next_run(longest)
            return True
        if self._held_out is None:
            self._validation.seek(self._validation_start)
            self._held_out = nothing_yet(self._device)
        text = self._next_of(self._validation)
        if text is None:
            return False
        packed = self._packed(text, longest, self._pack_rows, self._validation)
        self._take_up(packed, longest, held_out=True)
        return True

    def validated(self) -> dict[str, Any]:
        """The event that tells of the held-out texts, which have been run through."""
        sums = self._held_out
        assert sums is not None
        self._held_out, self._validated = None, self.step
        n = max(sums.n_labels, 1)
        return {
            "event": "validation",
            "step": self.step,
            "loss": float(sums.loss) / n,
            "accuracy": float(sums.n_correct) / n,
            "labels": sums.n_labels,
        }

    def _take_up(self, texts: list[Text], longest: int, *, held_out: bool) -> None:
        n = n_virtual(self.specs)
        for text in texts:
            check_text(text, vocab_size=self._config.vocab_size, longest=longest - n)
        self._n_at_hand = len(texts)
        if self.program is not None:
            (text,) = texts
            assert text.resolved is not None, "texts of a program come resolved"
            reference = self._set_goal(text)
            runs = training_runs(
                text.resolved,
                self._context,
                max_bytes=self._max_kept_bytes,
                reference=reference,
            )
            self._runs.extend(runs)
            self._text = text, held_out
            self._next_run(longest)
            return
        tokens: list[int] = []
        labels: list[int] = []
        factors: list[float] = []
        for text in texts:
            tokens += [0] * n + list(text.tokens)
            labels += [IGNORED] * n + list(text.labels)
            factors += [1.0] * n
            factors += [1.0] * len(text.tokens) if text.weights is None else list(text.weights)
        if not held_out:
            self.trainer.check_length(len(tokens))
        weights = factors if any(text.weights is not None for text in texts) else None
        lengths = [n + len(text.tokens) for text in texts]
        self._begin_sequence(tokens, labels, weights, held_out, lengths)

    def _set_goal(self, text: Text) -> KeptRows | None:
        """What the text's loss is; what is to be kept of the text without the program for it."""
        assert self.spec.program is not None
        objective = self.spec.program.objective
        self._goal = None
        if objective == "logit_diff":
            if text.others is None:
                raise InvalidRequest(
                    "a text has no other token to compare with",
                    field="data",
                    remedy='Write {"prompt": ..., "completion": ..., "other": ...}',
                )
            self._goal = Goal(others=index_on(list(text.others), self._device))
        elif objective == "kl":
            rows = tuple(row for row, label in enumerate(text.labels) if label != IGNORED)
            self._goal = Goal(reference=KeptRows(SiteRef("final.norm.out", -1), rows))
        return None if self._goal is None else self._goal.reference

    def _next_run(self, longest: int) -> None:
        """The next run of the text at hand: one that is read goes forward only, the last one is
        the text."""
        assert self._text is not None
        text, held_out = self._text
        run = self._run = self._runs.popleft()
        tokens, plan = run.tokens, run.plan
        if len(tokens) > longest:
            raise InvalidRequest(
                f"a text must have 1 to {longest} tokens",
                field=f"program.runs.{plan.name}",
                given=len(tokens),
            )
        if run.is_main:
            sequence = self._begin_sequence(tokens, list(text.labels), text.weights, held_out)
            sequence.goal = self._goal
        else:
            sequence = self._begin_sequence(tokens, [IGNORED] * len(tokens), None, True)
        sequence.edits = run.edits
        if plan.input.numbers:
            self.seq.numbers = plan.input.numbers
            own = [plan.input.number_of(i) for i in range(len(tokens))]
            sequence.numbers = index_on(own, self._device)

    def _begin_sequence(
        self,
        tokens: list[int],
        labels: list[int],
        weights: Iterable[float] | None,
        held_out: bool,
        lengths: list[int] | None = None,
    ) -> TrainSequence:
        """Put these tokens in line for memory; ``lengths`` of their texts, None for one."""
        lengths = lengths or [len(tokens)]
        offset = long_text_offset(self._config, lengths[0])
        packing = packing_of(lengths, self._block_size)
        self.seq = Sequence(
            Request(self.name, ()),
            0,
            tokens,
            len(tokens),
            position_offset=offset,
            packing=packing,
        )
        factors = None
        if weights is not None:
            factors = to_device(np.array(list(weights)), self._device).to(self._wide)
        self.sequence = TrainSequence(
            index_on(tokens, self._device),
            index_on(labels, self._device),
            [],
            factors,
            position_offset=offset,
            job=self.name,
            held_out=held_out,
            packing=packing,
            labelled=[row for row, label in enumerate(labels) if label != IGNORED],
        )
        self.trainer.rewind(self.sequence)
        return self.sequence

    def begin(self) -> None:
        """The text got memory: it starts at its first row."""
        assert self.sequence is not None
        self.sequence.blocks = self.held = list(self.seq.blocks)
        self._clear()
        self.trainer.begin(self.sequence)

    def interrupt(self) -> None:
        """The text lost its memory: forget what it has done since it began."""
        sequence = self.sequence
        if sequence is None or sequence.table is None:
            return
        self._clear()
        sequence.blocks, sequence.table = [], None
        self.trainer.rewind(sequence)
        sequence.drop_tape()
        sequence.dx, sequence.sums = None, {}
        self.n_restarts += 1

    def through(self) -> bool:
        """Whether the backward of the text is done."""
        sequence = self.sequence
        return (
            sequence is not None
            and sequence.table is not None
            and sequence.forwarded == sequence.length
            and self.trainer.done(sequence)
        )

    def take_text(self) -> bool:
        """Add the text's gradients; True when the optimizer step has all its texts."""
        sequence = self.sequence
        assert sequence is not None
        self.sequence = None
        if self._run is not None and not self._run.is_main:
            self._run.through()
            return False
        if sequence.held_out:
            assert self._held_out is not None
            self._held_out.add(sequence)
            return False
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self._gradients:
                self._gradients[name] += parameter.grad
            else:
                self._gradients[name] = parameter.grad
            parameter.grad = None
        self._sums.add(sequence)
        self._n_texts += self._n_at_hand
        return self._n_texts == self.spec.gradient_accumulation

    def due(self, now: float) -> Closing:
        """What ends the optimizer step whose texts are through."""
        spec, step = self.spec, self.step + 1
        parts: list[Part] = ["optimizer"]
        last = step == spec.steps
        if last or (spec.publish_every and step % spec.publish_every == 0):
            parts.append("publish")
        if self.writer and (last or (spec.checkpoint_every and step % spec.checkpoint_every == 0)):
            parts.append("snapshot")
        return Closing(self.name, tuple(parts), now)

    @property
    def has_gradients(self) -> bool:
        """Whether texts are through whose optimizer step is yet to come."""
        return self._n_texts > 0

    # --- optimizer steps --------------------------------------------------------------------
    def optimize(self) -> None:
        """One optimizer step over the texts taken, which :meth:`told` tells of.

        On a GPU nobody waits for its loss: a step that is not finite is undone there.

        Raises:
            InvalidRequest: no row had a label.
        """
        rate = learning_rate(self.spec, self.step)
        gradients, sums, texts = self._gradients, self._sums, self._n_texts
        self._gradients, self._sums, self._n_texts = {}, nothing_yet(self._device), 0
        n = sums.n_labels
        self._position = self._data.position()
        self.step += 1
        self.complete = self.step == self.spec.steps
        if n == 0:
            raise InvalidRequest(
                f"none of the {texts} texts of step {self.step} has a label",
                field="data",
                remedy="Leave such texts out",
            )
        for name, parameter in self.parameters.items():
            if name not in gradients:
                gradients[name] = torch.zeros_like(parameter, requires_grad=False)
            gradients[name] /= n
        penalty = None
        if self.spec.program is not None and self.spec.program.sparsity:
            assert self.program is not None
            penalty = self.program.penalise(gradients, self.spec.program.sparsity)
        norm, clip = total_norm(gradients), self.spec.clip
        event: dict[str, Any] = {"step": self.step, "learning_rate": rate, "labels": n}
        if penalty is not None:
            event["penalty"] = penalty
        numbers = torch.stack([sums.loss, norm.double(), sums.n_correct.double()])
        taken = Taken(event, to_host(numbers), self._mark(), applied=self.defers)
        self._taken.append(taken)
        if taken.applied:
            self.optimizer.step_if_finite(gradients, rate, sums.loss, norm, clip)
            return
        loss, known, _ = _waited_for(taken)
        if not math.isfinite(loss) or not math.isfinite(known):
            return
        factor = clip_factor(known, clip)
        if factor != 1.0:
            for gradient in gradients.values():
                gradient *= factor
        self.optimizer.step(gradients, rate)
        if self.program is not None:
            self.program.confine()

    @property
    def defers(self) -> bool:
        """Whether an update is made before its loss is known. A program's parameters have more done
        to them than can be undone."""
        return self._device.type == "cuda" and self.program is None

    def told(self, *, wait: bool) -> Iterator[dict[str, Any]]:
        """The events of optimizer steps whose numbers have come; with ``wait``, of all.

        Raises:
            InvalidRequest: too many steps in a row had no finite loss.
        """
        while self._taken:
            taken = self._taken[0]
            if not wait and taken.arrived is not None and not taken.arrived.query():
                return
            total, norm, correct = _waited_for(taken)
            self._taken.popleft()
            step, n = taken.event["step"], taken.event["labels"]
            loss = total / n
            self.losses.append(loss)
            event = taken.event | {
                "event": "step",
                "loss": loss,
                "accuracy": correct / n,
                "gradient_norm": norm,
            }
            if math.isfinite(loss) and math.isfinite(norm):
                self._bad = 0
                yield event
                continue
            self._bad += 1
            self.optimizer.updates -= taken.applied
            if self._bad == BAD_STEPS:
                raise InvalidRequest(
                    f"{BAD_STEPS} steps in a row had no finite loss, the last was {step}",
                    field="data",
                    remedy="Lower the learning rate, or look at the texts of these steps",
                )
            yield event | {"event": "skipped", "reason": "loss or gradient is not finite"}

    def _mark(self) -> torch.cuda.Event | None:
        """An event here in the device's queue; None where there is none."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _clear(self) -> None:
        """Drop the gradients of the text under way."""
        for parameter in self.parameters.values():
            parameter.grad = None

    # --- checkpoints ------------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """Copies of everything as it was after the last optimizer step; texts since then count
        for nothing and will be learned again."""
        state = {
            "step": self.step,
            "updates": self.optimizer.updates,
            "bad_steps": self._bad,
            "position": self._position,
            "losses": self.losses.copy(),
            "job": self.spec.identity(),
        }
        return Snapshot(
            self.step,
            self.specs,
            {name: _on_host(value) for name, value in self.parameters.items()},
            {name: _on_host(value) for name, value in self.optimizer.state.items()},
            state,
            None if self.program is None else self.program.trained(),
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            Conflict: it belongs to another job.
            InvalidRequest: it does not fit.
        """
        state = snapshot.state
        own = self.spec.identity()
        other = state.get("job", {})
        differing = [key for key in own if key not in other or own[key] != other[key]]
        if differing:
            raise Conflict(
                f"holds checkpoints of a job with other {', '.join(differing)}",
                field="folder",
                given=str(path),
                remedy="Give a folder of its own, or the same settings to go on",
            )
        if self.program is None:
            check_parameters(self._config, self.specs, snapshot.parameters)
        for name, parameter in self.parameters.items():
            parameter.copy_(snapshot.parameters[name])
        for name, value in self.optimizer.state.items():
            value.copy_(snapshot.optimizer[name])
        self.optimizer.updates = state["updates"]
        self._bad = state["bad_steps"]
        self.step = state["step"]
        self.losses = list(state["losses"])
        self.complete = self.step == self.spec.steps
        self.resumed_from = path
        self._data.seek(state["position"])
        self._position = state["position"]
        self.saved = self.step

    def describe(self) -> dict[str, Any]:
        """What the engine's snapshot says of the job."""
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.spec.steps,
            "loss": self.losses[-1] if self.losses and math.isfinite(self.losses[-1]) else None,
            "share": self.share,
            "version": self.published,
            "forward_tokens": self.forward_tokens,
            "backward_tokens": round(self.backward_tokens),
            "restarts": self.n_restarts,
            "waits_for": self.waits_for,
        }


def _waited_for(taken: Taken) -> tuple[float, float, float]:
    """Loss (a sum), norm and right tokens of a step."""
    if taken.arrived is not None:
        taken.arrived.synchronize()
    loss, norm, correct = taken.numbers.tolist()
    return loss, norm, correct


def _on_host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True)
