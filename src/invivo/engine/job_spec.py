"""What a fine-tuning job is told: what to train, how, and where its texts come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from invivo.edits.resolved import ResolvedProgram
from invivo.engine.bypasses import BypassSpec, Parameters
from invivo.engine.trained_program import ProgramSpec
from invivo.errors import InvalidRequest

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job. One optimizer step learns ``gradient_accumulation`` texts.

    Attributes:
        name: of the job, and of the adapter under which its versions are published.
        bypasses: what is trained; none where it is in a program.
        program: whose parameters are trained; its texts come resolved (:attr:`Text.resolved`).
        first: values that the bypasses' parameters begin with, by name; None = drawn.
        steps: optimizer steps.
        learning_rate: the highest of the schedule.
        schedule: after the warm-up ``constant``, or down to nothing ``linear`` or by a ``cosine``.
        warmup: steps over which the learning rate rises.
        betas, epsilon: of ``adamw``.
        momentum: of ``sgd``.
        clip: largest norm of all gradients together; None = any.
        seed: of the first parameters, where they are drawn.
        share: weight among the jobs.
        publish_every, checkpoint_every: optimizer steps; 0 = only at the end.
        validate_every: optimizer steps after which held-out texts are run through, where there are
            any; 0 = only at the end.
        keep: checkpoints that stay.
        mode, order: see :mod:`invivo.engine.window`.
        pack: texts of a step that fit into one flat batch run as one sequence; else one after the
            other.
        tape_bytes: most bytes that ``tape`` keeps of one text; what does not fit is run again.
            None = whatever spares a large product. A text too long for it is refused.
    """

    name: str
    bypasses: tuple[BypassSpec, ...]
    steps: int
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    momentum: float = 0.0
    clip: float | None = None
    gradient_accumulation: int = 1
    seed: int = 0
    share: float = 1.0
    publish_every: int = 0
    checkpoint_every: int = 0
    validate_every: int = 0
    keep: int = 2
    mode: Literal["tape", "rerun"] = "tape"
    order: Literal["window", "layer"] = "window"
    tape_bytes: int | None = None
    pack: bool = True
    program: ProgramSpec | None = None
    first: Parameters | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.program is not None and self.bypasses:
            raise InvalidRequest(
                "a job trains bypasses or the parameters of a program", field="program"
            )
        for name, least in (
            ("steps", 1),
            ("warmup", 0),
            ("gradient_accumulation", 1),
            ("publish_every", 0),
            ("checkpoint_every", 0),
            ("validate_every", 0),
            ("keep", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _refused(name, value, f"must be a whole number of at least {least}")
        for name, choices in (
            ("schedule", ("constant", "linear", "cosine")),
            ("optimizer", ("adamw", "sgd")),
            ("mode", ("tape", "rerun")),
            ("order", ("window", "layer")),
        ):
            if getattr(self, name) not in choices:
                raise _refused(name, getattr(self, name), f"must be one of {', '.join(choices)}")
        if self.tape_bytes is not None and self.tape_bytes < 1:
            raise _refused("tape_bytes", self.tape_bytes, "must be at least 1")
        for name in ("learning_rate", "share", "epsilon"):
            _in_range(name, getattr(self, name), above=0.0)
        _in_range("weight_decay", self.weight_decay)
        if self.clip is not None:
            _in_range("clip", self.clip, above=0.0)
        for name, rate in (("momentum", self.momentum), *(("betas", b) for b in self.betas)):
            _in_range(name, rate)
            if rate >= 1:
                raise _refused(name, rate, "must be below 1")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a job that goes on from a checkpoint, as JSON has it."""
        free = {"name", "share", "publish_every", "checkpoint_every", "validate_every", "keep"}
        free |= {"mode", "order", "tape_bytes", "pack"}
        plain = asdict(replace(self, program=None, first=None))
        free |= {"program", "first"}  # the one is told below, the other is in the checkpoint
        whole = {key: value for key, value in plain.items() if key not in free}
        if self.program is not None:
            whole["program"] = self.program.identity()
        for spec in whole["bypasses"]:
            spec["on"] = list(spec["on"])
            spec["layers"] = None if spec["layers"] is None else list(spec["layers"])
        whole["bypasses"] = list(whole["bypasses"])
        whole["betas"] = list(whole["betas"])
        return whole


@dataclass(frozen=True, slots=True)
class Text:
    """One text to learn.

    Attributes:
        tokens: ids, without placeholders for virtual tokens.
        labels: what each row must predict, -100 = nothing; as many as tokens.
        weights: factor of each row's loss; None = 1.
        resolved: the job's program for this text, whose tokens are those of the run "main"; what
            is learned lies behind its prompt.
        others: tokens that the labels are compared with, as many as labels (objective
            ``logit_diff``).
    """

    tokens: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float] | None = None
    resolved: ResolvedProgram | None = None
    others: Sequence[int] | None = None


class DataSource(Protocol):
    """Where texts come from, always in the same order. Called from the engine's thread."""

    def next(self) -> Text | None:
        """The text at the position, which moves on; None when there are no more."""
        ...

    def position(self) -> Any:
        """Where the next text is, as JSON."""
        ...

    def seek(self, position: Any) -> None:
        """Go to what ``position`` gave."""
        ...


def check_text(text: Text, *, vocab_size: int, longest: int) -> None:
    """
    Raises:
        InvalidRequest: it is empty or too long, a list has another length, or an id is unknown.
    """
    n = len(text.tokens)
    if not 1 <= n <= longest:
        raise _refused("tokens", n, f"a text must have 1 to {longest} tokens")
    if len(text.labels) != n or (text.weights is not None and len(text.weights) != n):
        raise _refused("labels", len(text.labels), f"labels and weights must be {n} like tokens")
    if not all(0 <= token < vocab_size for token in text.tokens):
        raise _refused("tokens", max(text.tokens), f"ids must be below {vocab_size}")
    if not all(label == -100 or 0 <= label < vocab_size for label in text.labels):
        raise _refused("labels", max(text.labels), f"must be -100 or ids below {vocab_size}")


def _in_range(name: str, value: object, above: float | None = None) -> None:
    fits = isinstance(value, int | float) and math.isfinite(value)
    if not fits or not (value > above if above is not None else value >= 0):  # type: ignore[operator]
        raise _refused(name, value, "must be a positive number" if above == 0.0 else "must be >= 0")


def _refused(name: str, value: object, message: str) -> InvalidRequest:
    return InvalidRequest(message, field=name, given=value)
