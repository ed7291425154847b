"""A decoder shared by heads and neurons is the decoder; its LoRAs lie where the plan says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.training.small_run import GLA, curve, small
from tests.training.small_run import LLAMA as HUB
from tests.training.test_parallel import LINES, lines_of
from tests.waiting import PATIENCE

from invivo.errors import InvalidRequest, UnsupportedModel
from invivo.models.load import load_model
from invivo.training.checkpoint import checkpoints
from invivo.training.run import train
from invivo.training.run_folder import RunFolder
from invivo.training.shape import check_shape
from invivo.training.tensor_parallel import dealt, in_order


def test_processes_that_share_a_decoder_are_one(tmp_path: Path) -> None:
    """See ``tensor_worker.py``; at the end one process goes on with a run that four began."""
    lines = LINES | {"evaluation": 'every = 1\nwindows = 3\nprompts = ["the"]\nsample_tokens = 2'}
    model = GLA.replace("num_hidden_layers = 2", "num_hidden_layers = 1")
    config = small(tmp_path, "train.steps=4", model=model, parallel="tensor = 2", **lines)
    found = subprocess.run(
        [sys.executable, "-m", "tests.training.tensor_worker", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    folder = RunFolder(tmp_path / "runs" / "small")
    assert folder.manifest()["status"] == "interrupted"
    assert folder.manifest()["processes"] == 4
    assert [path.name for path in checkpoints(folder.checkpoints)] == ["step-00000002"]
    outcome = train(config, runs=tmp_path / "runs")
    alone = train(config, runs=tmp_path / "alone")
    mine, other = curve(lines_of(outcome.folder)), curve(lines_of(alone.folder))
    assert len(mine) == len(other) == 4
    for one, two in zip(mine, other, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert held_out(outcome.folder) == pytest.approx(held_out(alone.folder), rel=1e-5)
    trained, wanted = (
        load_model(str(path / "model")).decoder for path in (folder.path, alone.folder)
    )
    for (name, tensor), plain in zip(trained.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(tensor, plain, rtol=1e-4, atol=1e-5, msg=name)


def held_out(folder: Path) -> list[float]:
    return [line["loss"] for line in lines_of(folder) if line["kind"] == "evaluation"]


@given(
    parts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    processes=st.sampled_from([1, 2, 3, 4]),
)
def test_dealt_rows_come_back_in_order(parts: list[int], processes: int) -> None:
    """And the part of a process has its own rows of every section, in order."""
    sections = tuple(n * processes for n in parts)
    rows = torch.arange(2 * sum(sections)).view(-1, 2)
    given_out = dealt(rows, sections, processes)
    assert torch.equal(in_order(given_out, sections, processes), rows)
    for rank, own in enumerate(given_out.chunk(processes)):
        wanted = [section.chunk(processes)[rank] for section in rows.split(sections)]
        assert torch.equal(own, torch.cat(wanted))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("changes", "processes", "says"),
    [
        ({}, 4, "num_key_value_heads"),
        ({}, 3, "intermediate_size"),
        ({"hidden_size": 25, "head_dim": 4}, 2, "hidden_size"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 2, "num_attention_heads"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(
    changes: dict[str, Any], processes: int, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as error:
        check_shape(LLAMA | changes, length=8, tensor=processes)
    assert error.value.field == "parallel.tensor"


def test_norms_over_all_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="a norm over all heads"):
        check_shape(LLAMA | {"model_type": "olmo2"}, length=8, tensor=2)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("tensor = 3", "parallel.tensor: does not divide the 4 processes"),
        ("tensor = 2\nreplicas = 4", "parallel.replicas: does not divide the 2 groups"),
    ],
)
def test_shares_must_divide_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, says: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = HUB.replace("intermediate_size = 32", "intermediate_size = 36")
    model = model.replace("num_attention_heads = 2", "num_attention_heads = 6")
    with pytest.raises(InvalidRequest, match=says):
        train(small(tmp_path, model=model, parallel=lines), runs=tmp_path)


def test_shared_layers_are_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as error:
        small(tmp_path, "train.compile=true", parallel="tensor = 2")
    assert error.value.field == "train.compile"
