"""A run from its configuration: prepare or find everything, train, leave a model to serve."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from invivo.errors import Conflict, Diverged, NotFound, StorageRefused
from invivo.models.decoder import Decoder
from invivo.models.load import checked_device, load_tokenizer
from invivo.training.card import model_card
from invivo.training.checkpoint import checkpoint_path, step_of
from invivo.training.config import TrainConfig
from invivo.training.export import export_model
from invivo.training.init import initialize
from invivo.training.loop import DTYPES, Continued, Status, Told, Training, latest
from invivo.training.material import Material, open_material
from invivo.training.prepare import Progress
from invivo.training.processes import Alone, Processes
from invivo.training.run_folder import RunFolder
from invivo.training.same_run import check_same_run
from invivo.training.sample import continue_texts
from invivo.training.shape import check_shape, shape_of

Mode = Literal["auto", "resume", "fresh"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of :func:`train` ended.

    Attributes:
        status: ``done``; ``time``: the minutes were over; ``interrupted``: asked to stop.
        model: folder in the Hub's format.
        evaluation: the last one's numbers.
    """

    status: Status
    step: int
    steps: int
    folder: Path
    model: Path
    evaluation: dict[str, Any] | None


def train(
    config: TrainConfig,
    *,
    runs: Path = Path("runs"),
    mode: Mode = "auto",
    minutes: float | None = None,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    told: Told = lambda line: None,
    progress: Progress | None = None,
    command: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Carry out a run, or go on with it; alone, or among processes that torchrun started.

    Args:
        runs: home of the run's folder, ``runs / config.name``, and of prepared text, ``.prepared``.
        mode: ``auto`` goes on where there is a checkpoint and the configuration is the same;
            ``resume`` must find one, and takes new values for how it is trained (optimizer,
            schedule, steps, batch); ``fresh`` sets an old run aside as NAME.1 and begins.
        minutes: stop at a checkpoint before so much time is over.
        stop: asked between steps.
        told: gets each line of metrics and samples, in the first process.
        progress: of the preparation, a word and a share.
        command: for the manifest.

    Raises:
        Conflict: the folder holds a run of another model, of other data, or one that another
            process is training.
        NotFound: nothing to resume, or no such source.
        InvalidRequest, UnsupportedModel: the configuration makes no sense.
        Diverged, StorageRefused: see :meth:`Training.run`.
    """
    here = checked_device(device)
    check_shape(config.model, length=config.data.length, tensor=config.parallel.tensor)
    deadline = math.inf if minutes is None else clock() + 60 * minutes
    folder = RunFolder(runs / config.name)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(_processes(config, here))
        is_first = processes.rank == 0
        if is_first:
            stack.enter_context(folder.held())
        with processes.first_first():
            material = open_material(
                config.data, config.tokenizer, runs / ".prepared", progress=progress
            )
        changed = _open(folder, config, material, mode) if is_first else {}
        training = _build(config, material, folder, processes, told, clock)
        found = latest(folder) if is_first else None
        step = int(processes.decided(-1 if found is None else step_of(found)))
        finished = step >= training.steps and is_first and _is_finished(folder, step)
        if is_first and not finished:
            folder.cut_after(step)
        if step >= 0:
            training.load(checkpoint_path(folder.checkpoints, step))
        manifest = _manifest(config, material, training, folder, processes, command)
        note = partial(_note, folder, manifest) if is_first else _no_note
        note("running", training.step)
        status: Status = "done"
        try:
            sizes = {"steps": training.steps, "parameters": manifest["parameters"]}
            if step < 0:
                training.tell({"kind": "event", "event": "started"} | sizes)
            elif not finished:
                more = sizes | ({"changed": changed} if changed else {})
                training.tell({"kind": "event", "event": "resumed"} | more)
            if not processes.decided(finished):
                status = training.run(stop=stop, deadline=deadline)
        except Exception as error:
            with contextlib.suppress(OSError):
                note("diverged" if isinstance(error, Diverged) else "failed", training.step)
            raise
        whole = processes.gathered(training.decoder)
        measured = [line for line in folder.metrics.read() if line["kind"] == "evaluation"]
        evaluation = measured[-1] if measured else None
        try:
            if whole is not None:
                dtype = DTYPES[config.export.dtype]
                card = model_card(
                    manifest, whole.config, tokens=training.tokens, evaluation=evaluation
                )
                export_model(whole, material.tokenizer, dtype, card, folder.model)
            note(status, training.step)
        except OSError as error:
            raise StorageRefused(
                f"the model could not be written: {error}",
                field="export",
                given=str(folder.model),
                remedy="Make room; the same command then writes it",
            ) from error
    return Outcome(
        status=status,
        step=training.step,
        steps=training.steps,
        folder=folder.path,
        model=folder.model,
        evaluation=evaluation,
    )


def _processes(config: TrainConfig, device: torch.device) -> AbstractContextManager[Processes]:
    """This process among those that torchrun started, or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return contextlib.nullcontext(Alone(device))
    from invivo.training.parallel import joined

    return joined(config.parallel.replicas, device.type, config.parallel.tensor)


def _open(
    folder: RunFolder, config: TrainConfig, material: Material, mode: Mode
) -> dict[str, list[Any]]:
    """Make the folder ready for the mode; the settings that differ from the run's so far."""
    if mode == "fresh" and folder.path.exists():
        folder.set_aside()
    if mode == "resume" and latest(folder) is None:
        raise NotFound("there is no checkpoint to go on from", field="run", given=str(folder.path))
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.exists:
        return {}
    if latest(folder) is None:
        if folder.manifest()["status"] == "done":
            raise Conflict(
                "the run is done and its checkpoints are gone",
                field="run",
                given=str(folder.path),
                remedy="--fresh begins anew (the old run is set aside), or give it another name",
            )
        return {}
    return check_same_run(
        folder.manifest(), asdict(config), material.digest, may_change=mode == "resume"
    )


def _is_finished(folder: RunFolder, step: int) -> bool:
    """Whether what follows the last step was done as well."""
    lines = folder.metrics.read()
    return any(line.get("event") == "done" and line["step"] == step for line in lines)


def _build(
    config: TrainConfig,
    material: Material,
    folder: RunFolder,
    processes: Processes,
    told: Told,
    clock: Callable[[], float],
) -> Training:
    """Everything as it is before the first step."""
    length, settings = config.data.length, config.train
    shape = shape_of(
        config.model, length=length, vocab_size=material.vocab_size, end=material.end_token
    )
    decoder = Decoder(shape, device=processes.device)
    initialize(decoder, config.init, config.seed)
    steps = settings.steps
    if steps is None:
        assert settings.epochs is not None
        assert material.tokens_per_epoch is not None
        rows = settings.epochs * material.tokens_per_epoch / length
        steps = max(1, round(rows / settings.batch))
    evaluate = partial(
        material.evaluate,
        decoder,
        batch=settings.micro_batch or min(32, settings.batch),
        dtype=DTYPES[settings.precision],
        rank=processes.rank,
        world=processes.world,
        total=processes.total,
    )
    stream = material.stream(
        batch=settings.batch, seed=config.seed, rank=processes.reader, world=processes.readers
    )
    return Training(
        config,
        decoder,
        stream,
        folder,
        processes,
        steps=steps,
        evaluate=evaluate,
        continued=_continuing(config, decoder, material),
        told=told,
        clock=clock,
    )


def _continuing(config: TrainConfig, decoder: Decoder, material: Material) -> Continued | None:
    """What continues the configuration's prompts."""
    settings = config.evaluation
    if not settings.prompts:
        return None
    tokenizer, end = load_tokenizer(material.tokenizer), material.end_token

    prompts = [[end, *tokenizer.encode(p, add_special_tokens=False)] for p in settings.prompts]

    def continued(step: int) -> list[tuple[str, str]]:
        found = continue_texts(
            decoder,
            prompts,
            settings.sample_tokens,
            temperature=settings.temperature,
            seed=config.seed + 1000 * step,
            end=end,
            dtype=DTYPES[config.train.precision],
        )
        return list(zip(settings.prompts, map(tokenizer.decode, found), strict=True))

    return continued


def _manifest(
    config: TrainConfig,
    material: Material,
    training: Training,
    folder: RunFolder,
    processes: Processes,
    command: str | None,
) -> dict[str, Any]:
    device = processes.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "name": config.name,
        "created": folder.manifest()["created"] if folder.exists else time.time(),
        "steps": training.steps,
        "parameters": sum(p.numel() for p in training.decoder.parameters()),
        "config": asdict(config),
        "data": {
            "digest": material.digest,
            "tokens": material.tokens,
            "bytes": material.bytes,
        },
        "device": f"{device.type}: {gpu}",
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": command,
    }


def _note(folder: RunFolder, manifest: Mapping[str, Any], status: str, step: int) -> None:
    folder.write_manifest({**manifest, "status": status, "step": step})


def _no_note(status: str, step: int) -> None:
    """Other processes than the first leave the folder alone."""
