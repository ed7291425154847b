"""``invivo train``: grow a model from text by a configuration, or go on with one."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli.options import Device, Runs
from invivo.cli.output import byte_size, examples, note, print_json, progress
from invivo.errors import InvalidRequest, MissingDependency

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import TaskID

    from invivo.training.config import TrainConfig
    from invivo.training.run import Outcome

EXAMPLES = examples(
    "invivo train configs/tiny-cpu.toml                   about a minute on two cores",
    "invivo train configs/gla-30m.toml --minutes 9        part of a run; the same again goes on",
    "invivo train my.toml --set train.steps=500 --set seed=1 --set name=second",
    "invivo train my.toml --resume --set optimizer.learning_rate=1e-4   go on in another way",
    "invivo serve runs/tiny-cpu                           what came out",
)


def train(
    config: Annotated[Path, typer.Argument(help="A .toml file; docs/training.md has the fields.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Instead of the file's; may be repeated."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="There must be a checkpoint; steps, rates, batch may be new ones."
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an old run becomes NAME.1.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.1, help="Stop at a checkpoint before they are over."),
    ] = None,
    runs: Runs = Path("runs"),
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="How it ended, as JSON.")] = False,
) -> None:
    """Train a model from scratch, with checkpoints; the same command goes on with it.

    Ctrl-C saves the step it is at and leaves; a second one leaves at once.
    """
    if resume and fresh:
        raise InvalidRequest("cannot go with --fresh", field="--resume")
    import torch

    from invivo.training.config import read_config
    from invivo.training.run import train as run

    settings = read_config(config, sets or ())
    again = _command(config, sets, runs, device)
    stopping = _Stopping(several=_n_processes() > 1)
    # Of the processes that torchrun starts, the first one speaks.
    silent = os.environ.get("RANK", "0") != "0"

    def told(line: Mapping[str, Any]) -> None:
        stopping.arm()
        shown(line)

    with _Shown(settings, quiet=as_json or silent) as shown, stopping.listening():
        outcome = run(
            settings,
            runs=runs,
            mode="resume" if resume else "fresh" if fresh else "auto",
            minutes=minutes,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            stop=stopping,
            told=told,
            progress=shown.preparing,
            command=again,
        )
    if silent:
        pass
    elif as_json:
        kept = asdict(outcome)
        print_json(kept | {name: str(kept[name]) for name in ("folder", "model")})
    else:
        _tell(outcome, again)
    if outcome.status == "interrupted":
        raise typer.Exit(130)


def _n_processes() -> int:
    """How many torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _command(config: Path, sets: list[str] | None, runs: Path, device: str | None) -> str:
    """What goes on with the run."""
    words = ["invivo", "train", str(config)]
    if _n_processes() > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(_n_processes()))
        words[:1] = ["torchrun", "--nproc-per-node", here, "-m", "invivo.cli"]
    for item in sets or ():
        words += ["--set", item]
    if runs != Path("runs"):
        words += ["--runs", str(runs)]
    if device is not None:
        words += ["--device", device]
    return shlex.join(words)


def _tell(outcome: Outcome, again: str) -> None:
    from invivo.training.report import write_report

    with contextlib.suppress(MissingDependency):
        note(f"curves and samples: {write_report(outcome.folder)}")
    if outcome.evaluation is not None:
        note(f"held out: {_held_out(outcome.evaluation)}")
    if outcome.status == "done":
        sys.stdout.write(f"{outcome.model}\n")
        if "accuracy" not in (outcome.evaluation or {}):  # recall rows are no texts
            note(f"try it: invivo generate -m {outcome.model} 'Once upon a time'")
        return
    why = "the minutes are over" if outcome.status == "time" else "stopped"
    note(f"{why}: step {outcome.step} of {outcome.steps} is saved; go on with: {again}")


def _held_out(numbers: Mapping[str, Any]) -> str:
    if "accuracy" in numbers:
        return f"{numbers['accuracy']:.1%} of the questions right"
    text = f"{numbers['bits_per_byte']:.4f} bits a byte"
    if numbers.get("low") is not None:
        text += f" ({numbers['low']:.4f} to {numbers['high']:.4f})"
    return f"{text}, loss {numbers['loss']:.4f}"


class _Stopping:
    """Whether a signal asked to stop; a second one ends the process as usual.

    Until training takes steps (``arm``) signals act as ever, since nothing is to be saved. With
    ``several`` processes they only ask: torchrun passes on what the terminal has sent already, and
    ends those that stay.
    """

    def __init__(self, *, several: bool = False) -> None:
        self._several = several
        self._asked = False
        self._armed = False

    def __call__(self) -> bool:
        return self._asked

    def arm(self) -> None:
        self._armed = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._heard)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._several:
            self._asked = True
            return
        if self._asked or not self._armed:
            raise KeyboardInterrupt
        self._asked = True
        note("stopping after this step (again: at once)")


class _Shown:
    """Progress: a bar where there is a terminal, else a line now and then."""

    def __init__(self, config: TrainConfig, *, quiet: bool) -> None:
        self._steps = config.train.steps
        self._quiet = quiet
        self._bar = progress("steps")
        self._plain = not quiet and self._bar.disable
        self._bar.disable |= quiet
        self._task: TaskID | None = None
        self._last = -1
        self._word = ""

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def preparing(self, word: str, share: float) -> None:
        if self._task is None:
            self._task = self._bar.add_task(word, total=100)
        self._bar.update(self._task, description=word, completed=int(100 * share))
        if self._plain and word != self._word:
            note(word)
        self._word = word

    def __call__(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "step":
            self._step(line)
        elif kind == "evaluation":
            self._say(f"step {line['step']}: held out: {_held_out(line)}")
        elif kind == "sample":
            self._say(f"  {line['prompt']} | {line['text']}")
        elif line["event"] == "started":
            self._steps = line["steps"]
            self._say(f"{line['parameters']:,} parameters, {line['steps']} steps")
        elif line["event"] == "resumed":
            self._steps = line["steps"]
            self._say(f"going on from step {line['step']} of {line['steps']}")
        elif line["event"] == "checkpoint_failed":
            self._say(f"step {line['step']}: no checkpoint, {line['why']}; training goes on")

    def _step(self, line: Mapping[str, Any]) -> None:
        assert self._steps is not None
        text = f"loss {line['loss']:.4f}, {line['tokens_per_s']:,.0f} tok/s"
        if self._word or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._word = self._bar.add_task(text, total=self._steps), ""
        assert self._task is not None
        self._bar.update(self._task, description=text, completed=line["step"])
        part = 20 * line["step"] // self._steps
        if self._plain and (self._last < 0 or part > self._last):
            memory = byte_size(line["memory"])
            note(f"step {line['step']} of {self._steps}: {text}, {memory}")
        self._last = part

    def _say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._quiet:
            return
        if self._plain:
            note(text)
        else:
            self._bar.console.print(text, style="dim", markup=False, soft_wrap=True)
