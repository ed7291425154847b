"""``invivo finetune``: learn an adapter from a file, here or on a running server."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.adapter_archive import ADAPTER_FILES, writing_adapter
from invivo.cli import options, programs
from invivo.cli.output import examples, note, print_json
from invivo.errors import Conflict, InvalidRequest, InvivoError, NotFound

if TYPE_CHECKING:
    from invivo.lm import LM
    from invivo.lm_jobs import Job, JobInfo

WHAT, HOW, RUN = "What is trained", "How", "Run"
EXAMPLES = examples(
    "invivo finetune chats.jsonl                          a LoRA for SmolLM2, in ./chats",
    "invivo finetune chats.jsonl --on q,v --r 16 --lr 2e-4 --epochs 3 --out ./poet",
    "invivo finetune book.txt --steps 200 --max-length 512 -m Qwen/Qwen3-0.6B",
    "invivo finetune --out ./poet --resume                go on after Ctrl-C or a crash",
    "invivo finetune chats.jsonl --url http://127.0.0.1:8000 --name poet",
    'A line of chats.jsonl: {"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}',
)
ALONE_MS = 1000.0
PROGRAM_FILES = ("program.json", "program.safetensors")
_BLOB = re.compile(r"blob:sha256:[0-9a-f]{64}")
STATE = "job"  # folder within --out of what resuming needs


def finetune(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A .jsonl, .txt or .parquet file, or hf://datasets/ORG/NAME (--url: or a file's "
            "id)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the adapter, and for what resuming needs (\\[default: ./NAME]); with "
            "--url for the adapter alone.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the job in --out.", rich_help_panel=RUN),
    ] = False,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            "-v",
            help="Held-out examples, as DATA: their loss is shown.",
            rich_help_panel=RUN,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What to call the adapter.", rich_help_panel=RUN),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The finished job as JSON.", rich_help_panel=RUN)
    ] = False,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help="Learn this adapter further: a folder (--url: the name of one that is served).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="lora (default), ia3, adapter, prefix, soft_prompt, steering.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(
            "--program",
            "-p",
            help="Train parameters of this program (YAML or JSON) in place of an adapter.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train", help="Those of --program to train, with commas.", rich_help_panel=WHAT
        ),
    ] = None,
    blob: programs.Blobs = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            help="What it costs that masks and vectors of --program change anything. 0.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Places, with commas: q, k, v, o, gate, up, down (lora's usual: down).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    r: Annotated[
        int | None,
        typer.Option("--r", help="Rank, width or virtual tokens. 16.", rich_help_panel=WHAT),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="Of --program: cross_entropy, logit_diff (to the lines' other) or kl.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="A LoRA's factor is alpha / r. r.", rich_help_panel=WHAT),
    ] = None,
    rank_stabilized: Annotated[
        bool,
        typer.Option("--rank-stabilized", help="alpha / sqrt(r) instead.", rich_help_panel=WHAT),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Numbers from 0, with commas. All.", rich_help_panel=WHAT),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option("--activation", help="Of --method adapter. relu.", rich_help_panel=WHAT),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="How often each example is seen. 3.", rich_help_panel=HOW),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Optimizer steps, instead of epochs.", rich_help_panel=HOW),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", help="Examples of one step. 4.", rich_help_panel=HOW),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate. 2e-4.", rich_help_panel=HOW)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="linear, cosine or constant.", rich_help_panel=HOW),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", help="Steps of warm-up. 0.", rich_help_panel=HOW)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="adamw or sgd. adamw.", rich_help_panel=HOW)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option("--weight-decay", help="Of either optimizer. 0.", rich_help_panel=HOW),
    ] = None,
    momentum: Annotated[
        float | None, typer.Option("--momentum", help="Of sgd. 0.", rich_help_panel=HOW)
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(
            "--clip",
            help="Largest norm of all gradients together; inf = any. 1.",
            rich_help_panel=HOW,
        ),
    ] = None,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order", help="Every epoch in the order of the file.", rich_help_panel=HOW
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of first weights and order. 0.", rich_help_panel=HOW),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Longest example, and length of a plain text's pieces, in tokens.",
            rich_help_panel=HOW,
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer examples off.", rich_help_panel=HOW)
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            "--checkpoint-every",
            help="Steps; a tenth of all, at most 50, unless given.",
            rich_help_panel=HOW,
        ),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            "--validate-every",
            help="Steps between looks at --validation; as --checkpoint-every.",
            rich_help_panel=HOW,
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int | None,
        typer.Option("--keep-checkpoints", help="The newest so many. 3.", rich_help_panel=HOW),
    ] = None,
    publish_every: Annotated[
        int | None,
        typer.Option(
            "--publish-every",
            help="Steps after which the adapter is served as it then is (with --url).",
            rich_help_panel=HOW,
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--share", help="Weight among the jobs of a server. 1.", rich_help_panel=HOW),
    ] = None,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Learn an adapter from a file, beside whatever else the model serves.

    Ctrl-C writes a checkpoint and leaves; --resume goes on from there, and also after a crash. On a
    server (--url) the job is the server's: Ctrl-C only stops watching.
    """
    from invivo.cli.opening import opened

    given = {
        "start": start,
        "method": method,
        "program": None if program is None else programs.read_program(program, [], None),
        "train": train,
        "blobs": programs.read_blobs(blob) or None,
        "sparsity": sparsity,
        "objective": objective,
        "on": on,
        "r": r,
        "alpha": alpha,
        "rank_stabilized": rank_stabilized or None,
        "activation": activation,
        "layers": layers,
        "n_epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": lr,
        "schedule": schedule,
        "warmup": warmup,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "clip": clip,
        "shuffle": False if in_order else None,
        "seed": seed,
        "max_length": max_length,
        "truncate": truncate or None,
        "checkpoint_every": checkpoint_every,
        "validate_every": validate_every,
        "keep_checkpoints": keep_checkpoints,
        "publish_every": publish_every,
        "share": share,
    }
    wanted: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    if clip == float("inf"):
        wanted["clip"] = None
    if url is not None and resume:
        raise InvalidRequest(
            "belongs to a job of this machine and cannot go with --url",
            field="--resume",
            remedy="Jobs of a server: invivo jobs",
        )
    if resume:
        if out is None or wanted or any(one is not None for one in (data, validation, name)):
            raise InvalidRequest(
                "goes with --out, and with nothing that the job knows already",
                field="--resume",
                remedy="invivo finetune --out FOLDER --resume",
            )
    elif data is None:
        raise InvalidRequest("is missing", field="DATA", remedy="Give a .jsonl or .txt file")
    source = data or ""
    asked: dict[str, Any] = wanted | ({} if validation is None else {"validation": validation})
    where: dict[str, Any] = {"model": model, "device": device, "dtype": dtype}
    if url is not None:
        if out is not None:
            with writing_adapter(out):  # told before anything is learned
                pass
        with opened(**where, url=url, key=key) as lm:
            chats = lm.info().has_chat_template
            job = lm.finetune(source, name=name, **asked)
            info = _watched_remotely(job, url, quiet=as_json)
            if info.status == "succeeded" and out is not None:
                _fetch(lm, out, info)
    else:
        out = out or Path(name or _name_of(Path(source)))
        _check_folder(out, resume=resume)
        # Nobody else is served here: iterations may be long.
        with opened(**where, state=out / STATE, tpot_ms=ALONE_MS) as lm:
            chats = lm.info().has_chat_template
            if start is not None:
                asked["start"] = lm.load_adapter(_name_of(Path(start).resolve()), start).name
            job_name = name or _name_of(out.resolve())
            begin = partial(lm.finetune, source, name=job_name, **asked)
            info = _done_here(lm, None if resume else begin, out, model, quiet=as_json)
            if info.status == "succeeded" and _is_program(info):
                _put_program_out(lm, out, info)
        if info.status == "succeeded" and not _is_program(info):
            _put_out(out, info.name)
    if as_json:
        print_json(asdict(info) | ({} if out is None else {"adapter": str(out)}))
    if info.status != "succeeded":
        raise InvivoError(f"the job is {info.status}", remedy=(info.error or {}).get("message"))
    if not as_json:
        _tell_done(info, out, model, url, chats=chats)


def _name_of(path: Path) -> str:
    """An adapter's name from that of a file or folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem or path.name).strip("-._")
    return name[:64] or "adapter"


def _check_folder(out: Path, *, resume: bool) -> None:
    begun = False
    if (out / STATE / "jobs.sqlite3").exists():
        from invivo.jobs.folder import JobFolder

        with JobFolder(out / STATE, write=False) as kept:
            begun = bool(kept.jobs(1))
    if resume and not begun:
        raise NotFound("holds no job", field="--out", given=str(out))
    if not resume and begun:
        raise Conflict(
            "holds a job already",
            field="--out",
            given=str(out),
            remedy="Add --resume to go on with it, or name another folder",
        )


def _gone_on(lm: LM) -> Job:
    job = lm.jobs()[0]
    if job.status == "paused":
        job.resume()
    return job


def _done_here(
    lm: LM, begin: Callable[[], Job] | None, out: Path, model: str | None, *, quiet: bool
) -> JobInfo:
    """Begin the job of this folder, or go on with it, and wait; an interruption at any moment
    leaves a checkpoint behind."""
    try:
        job = _gone_on(lm) if begin is None else begin()
        return job.wait(progress=_shows_bar(quiet), on_info=_Notes(quiet))
    except KeyboardInterrupt:
        for job in lm.jobs()[:1]:  # none where there was no time to make one
            with contextlib.suppress(Conflict):  # it has ended by itself
                job.pause()
            info = job.info()
            if info.status in ("succeeded", "failed", "cancelled"):
                return info
            again = f"invivo finetune{_model_option(model)} --out {out} --resume"
            note(f"stopped at step {info.step} of {info.n_steps}; go on with: {again}")
        raise


def _watched_remotely(job: Job, url: str, *, quiet: bool) -> JobInfo:
    try:
        return job.wait(progress=_shows_bar(quiet), on_info=_Notes(quiet))
    except KeyboardInterrupt:
        note(f"the job goes on; look again with: invivo jobs show {job.id} --follow --url {url}")
        raise


def _shows_bar(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


class _Notes:
    """A line every tenth of the way, where a bar would not be seen."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet or sys.stderr.isatty()
        self._last = 0

    def __call__(self, info: JobInfo) -> None:
        if self._quiet or not info.n_steps:
            return
        tenth = 10 * info.step // info.n_steps
        if tenth > self._last:
            self._last = tenth
            loss = "" if info.loss is None else f", loss {info.loss:.4f}"
            rate = info.tokens_per_second
            speed = "" if rate is None else f", {rate:,.0f} tok/s"
            held = info.validations[-1].loss if info.validations else None
            held_out = "" if held is None else f", held-out loss {held:.4f}"
            note(f"step {info.step} of {info.n_steps}{loss}{held_out}{speed}")


def _fetch(lm: LM, out: Path, info: JobInfo) -> None:
    """What a server's job has made."""
    if _is_program(info):
        _put_program_out(lm, out, info)
    else:
        lm.save_adapter(info.name, out)


def _put_out(out: Path, name: str) -> None:
    """The adapter's files where the user wants them."""
    for file in ADAPTER_FILES:
        shutil.copyfile(out / STATE / "adapters" / name / file, out / file)


def _is_program(info: JobInfo) -> bool:
    return info.hyperparameters["method"] == "program"


def _put_program_out(lm: LM, out: Path, info: JobInfo) -> None:
    """The trained program as two files: its JSON, and the tensors by the names in it."""
    from safetensors.numpy import save_file

    assert info.fine_tuned_model is not None
    text = json.dumps(lm.stored_program(info.fine_tuned_model), indent=1)
    params = lm.stored_program(info.fine_tuned_model)["params"]
    names = {
        param["init"]: name for name, param in params.items() if isinstance(param["init"], str)
    }
    for number, other in enumerate(sorted(set(_BLOB.findall(text)) - set(names))):
        names[other] = f"tensor{number}"
    tensors = {}
    for place, name in names.items():
        tensors[name] = lm.stored_blob(place.removeprefix("blob:"))
        text = text.replace(place, f"blob:{name}")
    (out / PROGRAM_FILES[0]).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, out / PROGRAM_FILES[1])


def losses_shown(losses: list[float | None]) -> str:
    """The first and the last."""
    first, last = ("-" if loss is None else f"{loss:.4f}" for loss in (losses[0], losses[-1]))
    return last if len(losses) == 1 else f"{first} to {last}"


def _tell_done(
    info: JobInfo, out: Path | None, model: str | None, url: str | None, *, chats: bool
) -> None:
    loss = "" if info.loss is None else f", loss {info.loss:.4f}"
    note(f"{info.n_steps} steps, {info.trained_tokens} tokens{loss}")
    command, prompt = ("chat", "") if chats else ("generate", " 'Once upon a time'")
    if info.validations:
        note(f"held-out loss: {losses_shown([one.loss for one in info.validations])}")
    sys.stdout.write(f"{info.fine_tuned_model if out is None else out}\n")
    if url is not None:
        if _is_program(info):
            note(
                f"{info.fine_tuned_model} stands for the program with its trained values wherever "
                "a program is asked for"
            )
            return
        note(f"try it: invivo {command} --url {url} --use {info.name}{prompt}")
        return
    assert out is not None
    if _is_program(info):
        program, tensors = (out / name for name in PROGRAM_FILES)
        given = "".join(
            f" --blob {name}={tensors}:{name}" for name in info.hyperparameters["train"]
        )
        note(f"try it: invivo look{_model_option(model)} PROMPT --program {program}{given}")
        return
    adapter = f"--adapter {info.name}={out} --use {info.name}"
    note(f"try it: invivo {command}{_model_option(model)} {adapter}{prompt}")


def _model_option(model: str | None) -> str:
    return "" if model is None else f" -m {model}"
