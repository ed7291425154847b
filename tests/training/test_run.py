"""Runs: killed, stopped, out of time, out of disk, diverging, and with other configurations."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.small_run import GLA, LLAMA, curve, small
from tests.waiting import PATIENCE, wait_for

import invivo
from invivo.errors import Conflict, Diverged, InvalidRequest, NotFound, StorageRefused
from invivo.models import shipped
from invivo.models.load import load_model
from invivo.models.resolve import list_models, resolve
from invivo.training import checkpoint, processes
from invivo.training.checkpoint import checkpoints
from invivo.training.config import TrainConfig
from invivo.training.forward import dense_forward
from invivo.training.loss_model import LossModel
from invivo.training.run import Outcome, train
from invivo.training.run_folder import RunFolder
from invivo.training.run_record import read_run

WORKER = Path(__file__).with_name("train_worker.py")


def lines_of(outcome: Outcome | Path) -> list[dict[str, Any]]:
    path = outcome.folder if isinstance(outcome, Outcome) else outcome
    return list(RunFolder(path).metrics.read())


def events(outcome: Outcome | Path) -> list[tuple[int, str]]:
    return [(x["step"], x["event"]) for x in lines_of(outcome) if x["kind"] == "event"]


def whole_curve(config: TrainConfig, folder: Path) -> list[tuple[Any, ...]]:
    return curve(lines_of(train(config, runs=folder / "whole")))


# Going on


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Killed while its second checkpoint was being written, and in the middle of a line."""
    config, runs = small(tmp_path, model=GLA), tmp_path / "runs"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(WORKER), str(tmp_path / "small.toml"), str(runs), "10"]
    process = subprocess.Popen(command, env=environment)
    folder = RunFolder(runs / "small")
    unfinished = folder.checkpoints / ".step-00000010.unfinished" / "state.json"

    def reached() -> bool:
        assert process.poll() is None, "the worker ended by itself"
        return unfinished.exists()

    try:
        wait_for(reached)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    assert [line["step"] for line in folder.metrics.read()][-1] == 10
    assert folder.manifest()["status"] == "running"
    assert read_run(folder.path).manifest["status"] == "killed"
    with folder.metrics.path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert [p.name for p in checkpoints(folder.checkpoints)] == ["step-00000005"]

    outcome = train(config, runs=runs)
    assert (outcome.status, outcome.step) == ("done", 12)
    assert events(outcome) == [
        (0, "started"),
        (5, "checkpoint"),
        (5, "resumed"),
        (10, "checkpoint"),
        (12, "checkpoint"),
        (12, "done"),
    ]
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


def test_any_number_of_stops_changes_no_bit(tmp_path: Path) -> None:
    config = small(tmp_path, "train.log_every=3", "checkpoint.every=100")
    runs = tmp_path / "runs"
    stops = 0
    while True:
        asked = itertools.count()
        outcome = train(config, runs=runs, stop=lambda n=asked: next(n) == 5)  # type: ignore[misc]
        if outcome.status == "done":
            break
        stops += 1
        assert outcome.status == "interrupted"
        assert outcome.step == 5 * stops
        assert RunFolder(outcome.folder).manifest()["status"] == "interrupted"
    assert stops == 2
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


def test_a_run_that_is_done_stays_as_it_is(tmp_path: Path) -> None:
    config = small(tmp_path)
    first = train(config, runs=tmp_path)
    before = lines_of(first)
    again = train(config, runs=tmp_path, mode="resume")
    assert (again.status, again.step) == ("done", 12)
    assert lines_of(again) == before


def test_a_run_that_is_done_without_its_checkpoints_is_left_alone(tmp_path: Path) -> None:
    outcome = train(small(tmp_path), runs=tmp_path)
    shutil.rmtree(outcome.folder / "checkpoints")
    with pytest.raises(Conflict, match="its checkpoints are gone"):
        train(small(tmp_path), runs=tmp_path)


def test_what_came_before_the_first_checkpoint_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, calls = LossModel.forward, itertools.count(1)

    def breaking(*args: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("the device is gone")
        return given(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LossModel, "forward", breaking)
        with pytest.raises(RuntimeError):
            train(small(tmp_path), runs=tmp_path / "runs")
    assert len(curve(lines_of(tmp_path / "runs" / "small"))) == 3
    # Nothing is lost by beginning with other values, so nobody has to insist on it.
    config = small(tmp_path, "seed=5")
    outcome = train(config, runs=tmp_path / "runs")
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


def test_fresh_sets_the_old_run_aside(tmp_path: Path) -> None:
    config = small(tmp_path)
    train(config, runs=tmp_path)
    other = train(small(tmp_path, "seed=1"), runs=tmp_path, mode="fresh")
    assert events(other)[0] == (0, "started")
    assert curve(lines_of(tmp_path / "small.1")) != curve(lines_of(other))


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint"):
        train(small(tmp_path), runs=tmp_path, mode="resume")


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=32",
        "model.rms_norm_eps=1e-4",
        "data.length=8",
        "data.separate_documents=true",
        "tokenizer.vocab_size=290",
        "seed=1",
        "init.std=0.1",
    ],
)
def test_another_model_or_data_never_goes_on(tmp_path: Path, override: str) -> None:
    train(small(tmp_path, "train.steps=1"), runs=tmp_path)
    for mode in ("auto", "resume"):
        with pytest.raises(Conflict) as error:
            train(small(tmp_path, "train.steps=1", override), runs=tmp_path, mode=mode)  # type: ignore[arg-type]
        assert error.value.field == override.partition("=")[0]


def test_other_texts_never_go_on(tmp_path: Path) -> None:
    config = small(tmp_path, "train.steps=1")
    train(config, runs=tmp_path)
    (tmp_path / "texts" / "00.txt").write_text("something else altogether")
    with pytest.raises(Conflict) as error:
        train(config, runs=tmp_path)
    assert error.value.field == "data.sources"


def test_the_same_text_from_another_place_goes_on(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    train(small(tmp_path, "train.steps=2"), runs=runs)
    prepared = next(path.parent for path in (runs / ".prepared").glob("*/manifest.json"))
    moved = prepared.rename(tmp_path / "moved")
    here = ("train.steps=3", "data.sources=[]", f"data.prepared={moved}")
    assert train(small(tmp_path, *here), runs=runs, mode="resume").step == 3


def test_how_it_is_trained_changes_on_request_alone(tmp_path: Path) -> None:
    train(small(tmp_path), runs=tmp_path)
    longer = small(tmp_path, "train.steps=14", "optimizer.learning_rate=1e-3")
    with pytest.raises(Conflict, match="--resume"):
        train(longer, runs=tmp_path)
    outcome = train(longer, runs=tmp_path, mode="resume")
    assert outcome.step == 14
    resumed = next(x for x in lines_of(outcome) if x.get("event") == "resumed")
    assert resumed["changed"] == {
        "train.steps": [12, 14],
        "optimizer.learning_rate": [3e-3, 1e-3],
    }
    assert train(longer, runs=tmp_path).status == "done"  # it is the run's own now


# Stopping


def test_minutes_end_at_a_checkpoint_in_time(tmp_path: Path) -> None:
    config = small(tmp_path, "checkpoint.every=100")
    now = [0.0]

    def clock() -> float:  # a quarter of a second goes by between any two looks at it
        now[0] += 0.25
        return now[0]

    stopped = train(config, runs=tmp_path / "runs", minutes=0.2, clock=clock)
    assert stopped.status == "time"
    assert 0 < stopped.step < 12
    assert now[0] < 12
    assert [p.name for p in checkpoints(stopped.folder / "checkpoints")] == [
        f"step-{stopped.step:08d}"
    ]
    assert load_model(str(stopped.model)).config.n_layers == 2
    outcome = train(config, runs=tmp_path / "runs")
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


def test_held_out_text_that_was_not_read_in_time_is_read_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = small(tmp_path), [0.0]

    def told(line: Mapping[str, Any]) -> None:
        if line["step"] == 12:  # it took the whole minute
            now[0] = 60.0

    first = train(config, runs=tmp_path, minutes=1, told=told, clock=lambda: now[0])
    assert (first.status, first.step, first.evaluation) == ("time", 12, None)
    second = train(config, runs=tmp_path)
    assert second.status == "done"
    assert second.evaluation is not None
    assert events(second)[-2:] == [(12, "resumed"), (12, "done")]
    assert len(curve(lines_of(second))) == 12


# What goes wrong


def test_a_full_disk_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, write = small(tmp_path), checkpoint.write_checkpoint

    def full_at_ten(folder: Path, given: checkpoint.Checkpoint, *, keep: int) -> Path:
        if given.step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, given, keep=keep)

    monkeypatch.setattr(processes, "write_checkpoint", full_at_ten)
    outcome = train(config, runs=tmp_path / "runs")
    assert (10, "checkpoint_failed") in events(outcome)
    assert (12, "checkpoint") in events(outcome)
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


def test_a_disk_that_stays_full_is_an_error_and_keeps_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = small(tmp_path), checkpoint.write_checkpoint

    def full_from_ten(folder: Path, given: checkpoint.Checkpoint, *, keep: int) -> Path:
        if given.step >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, given, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "write_checkpoint", full_from_ten)
        with pytest.raises(StorageRefused, match="goes on from step 5"):
            train(config, runs=tmp_path / "runs")
    folder = RunFolder(tmp_path / "runs" / "small")
    assert folder.manifest()["status"] == "failed"
    assert [p.name for p in checkpoints(folder.checkpoints)] == ["step-00000005"]
    outcome = train(config, runs=tmp_path / "runs")
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_a_number_stops_the_run_and_is_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    config = small(tmp_path, f"train.log_every={log_every}")
    given, calls = LossModel.forward, itertools.count(1)

    def poisoned(*args: Any) -> Any:
        loss, count = given(*args)
        return (loss * math.nan if next(calls) == 7 else loss), count

    with monkeypatch.context() as patch:
        patch.setattr(LossModel, "forward", poisoned)
        with pytest.raises(Diverged, match=r"the loss is nan at step 7.*rows 24") as error:
            train(config, runs=tmp_path / "runs")
    assert "step-00000005 is the last good checkpoint" in str(error.value)
    folder = RunFolder(tmp_path / "runs" / "small")
    assert folder.manifest()["status"] == "diverged"
    assert [p.name for p in checkpoints(folder.checkpoints)] == ["step-00000005"]
    last = list(folder.metrics.read())[-1]
    assert (last["event"], last["step"], last["position"]["rows"]) == ("diverged", 7, 24)
    json.loads(json.dumps(last, allow_nan=False))
    outcome = train(config, runs=tmp_path / "runs")
    assert curve(lines_of(outcome)) == whole_curve(config, tmp_path)


def test_gradients_that_overflow_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = LossModel.forward

    def steep(*args: Any) -> Any:
        loss, count = given(*args)
        return loss.detach() + (loss - loss.detach()) * 1e38, count

    monkeypatch.setattr(LossModel, "forward", steep)
    with pytest.raises(Diverged, match=r"gradients is (inf|nan) at step 1.*Nothing"):
        train(small(tmp_path), runs=tmp_path)


def test_rows_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as error:
        train(small(tmp_path, "model.max_position_embeddings=8"), runs=tmp_path)
    assert error.value.field == "model.max_position_embeddings"
    with pytest.raises(InvalidRequest) as error:
        train(small(tmp_path, "model.vocab_size=100"), runs=tmp_path)
    assert error.value.field == "model.vocab_size"


# What is computed


def test_held_out_text_is_measured_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    config = small(tmp_path, evaluation="every = 5\nwindows = 2")
    outcome = train(config, runs=tmp_path)
    found = [line for line in lines_of(outcome) if line["kind"] == "evaluation"]
    assert [(x["step"], x["split"]) for x in found] == [(5, "valid"), (10, "valid"), (12, "valid")]
    assert [x["rows"] for x in found[:2]] == [2, 2]
    learned = {x["step"]: x["tokens"] for x in lines_of(outcome) if x["kind"] == "step"}
    assert [x["tokens"] for x in found] == [learned[x["step"]] for x in found]
    assert found[2]["held_out_tokens"] > found[0]["held_out_tokens"]
    assert found[2]["rows"] > 2
    assert outcome.evaluation == found[2]
    assert 0 < found[2]["bits_per_byte"] < found[0]["bits_per_byte"]


def test_recall_is_learned_and_measured(tmp_path: Path) -> None:
    overrides = (
        "data.sources=[]",
        "data.kind=recall",
        "data.recall={pairs=[1, 2], keys=4, values=2}",
        "train.steps=3",
    )
    outcome = train(small(tmp_path, *overrides), runs=tmp_path)
    assert outcome.evaluation is not None
    assert 0 <= outcome.evaluation["accuracy"] <= 1
    assert {score["pairs"] for score in outcome.evaluation["scores"]} == {1, 2}
    assert load_model(str(outcome.model)).tokenizer.encode("k1 v2") == [1, 6]
    with pytest.raises(Conflict) as error:
        train(small(tmp_path, *overrides, "data.recall.values=3"), runs=tmp_path)
    assert error.value.field == "data.recall.values"


def test_micro_batches_are_one_batch(tmp_path: Path) -> None:
    whole = curve(lines_of(train(small(tmp_path, "train.batch=8"), runs=tmp_path / "whole")))
    for rows in (1, 4):
        config = small(tmp_path, "train.batch=8", f"train.micro_batch={rows}")
        parts = curve(lines_of(train(config, runs=tmp_path / str(rows))))
        for one, other in zip(whole, parts, strict=True):
            assert one[:2] == other[:2]
            assert one[2:] == pytest.approx(other[2:], rel=2e-5)


@pytest.mark.parametrize("model", [LLAMA, GLA])
def test_the_loss_falls_and_every_parameter_moves(tmp_path: Path, model: str) -> None:
    config = small(tmp_path, "train.steps=60", "optimizer.learning_rate=1e-2", model=model)
    outcome = train(config, runs=tmp_path)
    losses = [row[2] for row in curve(lines_of(outcome))]
    assert losses[-1] < losses[0] - 1
    first = train(small(tmp_path, "train.steps=1", "name=one", model=model), runs=tmp_path)
    before = checkpoint.read_checkpoint(checkpoints(first.folder / "checkpoints")[-1]).tensors
    after = checkpoint.read_checkpoint(checkpoints(outcome.folder / "checkpoints")[-1]).tensors
    moved = [name for name in after if not after[name].equal(before[name])]
    assert moved == list(after)


def test_samples_are_the_same_every_time(tmp_path: Path) -> None:
    lines = 'every = 6\nprompts = ["the cat", "a dog"]\nsample_tokens = 8\nwindows = 2'
    config = small(tmp_path, evaluation=lines)
    runs = [train(config, runs=tmp_path / name) for name in ("one", "two")]
    one, two = (list(RunFolder(run.folder).samples.read()) for run in runs)
    assert one == two
    assert [(line["step"], line["prompt"]) for line in one] == [
        (6, "the cat"),
        (6, "a dog"),
        (12, "the cat"),
        (12, "a dog"),
    ]


@pytest.mark.parametrize("model", [LLAMA, GLA])
def test_the_engine_says_what_the_training_pass_finds_likeliest(tmp_path: Path, model: str) -> None:
    config = small(tmp_path, "train.steps=40", "data.length=64", model=model)
    outcome = train(config, runs=tmp_path)
    loaded = load_model(str(outcome.model))
    text = loaded.tokenizer.encode("the cat saw")
    tokens = list(text)
    for _ in range(24):
        hidden = dense_forward(loaded.decoder, torch.tensor([tokens]))
        tokens.append(int(loaded.decoder.logits(hidden[0, -1:]).argmax()))
    with invivo.load(str(outcome.model)) as lm:
        found = lm.generate(text, max_tokens=24, temperature=0, ignore_eos=True)
    assert found.choices[0].tokens == tokens[len(text) :]


def test_a_model_has_a_card_and_may_come_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, 'export.about="Speaks of cats."', "export.license=apache-2.0")
    outcome = train(config, runs=tmp_path)
    card = (outcome.model / "README.md").read_text()
    assert outcome.evaluation is not None
    assert f"| held out | {outcome.evaluation['bits_per_byte']:.4f} bits a byte" in card
    assert "| parameters | 16,056 |" in card
    assert "| text | texts (" in card

    assert resolve(str(outcome.folder)) == outcome.model
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    shutil.copytree(outcome.model, tmp_path / "assets" / "small-cats")
    assert resolve("small-cats") == tmp_path / "assets" / "small-cats"
    entry = next(entry for entry in list_models() if entry.name == "small-cats")
    assert (entry.description, entry.licence, entry.state) == (
        "Speaks of cats.",
        "apache-2.0",
        "ready",
    )
    with pytest.raises(NotFound, match="small-cats"):
        resolve("no-such-model")


def test_weights_are_exported_in_half_precision(tmp_path: Path) -> None:
    outcome = train(small(tmp_path, "export.dtype=bfloat16"), runs=tmp_path)
    config = json.loads((outcome.model / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    kept = checkpoint.read_checkpoint(checkpoints(outcome.folder / "checkpoints")[-1]).tensors
    embed = load_model(str(outcome.model)).decoder.embed
    assert embed.equal(kept["parameter.embed"].bfloat16().float())
