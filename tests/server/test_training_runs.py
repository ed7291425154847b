"""Training runs, as the page sees them."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from tests.training.small_run import pretended
from tests.waiting import PATIENCE

from invivo.server.run import ServerThread
from invivo.server.settings import Settings


def test_without_a_folder_there_are_none(http):
    assert http.get("/v1/training/runs").json() == {"object": "list", "data": []}


def test_runs_come_with_thinned_curves_the_newest_first(lm, tmp_path: Path):
    for age, (name, steps, status) in enumerate(
        [("new", 7, "running"), ("old", 200, "done"), ("older", 0, "interrupted")]
    ):
        manifest = pretended(tmp_path, name, steps, status).path / "manifest.json"
        os.utime(manifest, (2e9 - age, 2e9 - age))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "other").mkdir()  # a manifest of something else
    (tmp_path / "other" / "manifest.json").write_text('{"study": "s"}')
    with (
        ServerThread(lm, Settings(port=0, runs=tmp_path)) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        runs = client.get("/v1/training/runs").json()["data"]
    assert [run["name"] for run in runs] == ["new", "old", "older"]
    new, old, older = runs
    assert (new["status"], new["step"], new["steps"], new["tokens"]) == ("running", 7, 200, 448)
    assert new["curve"][0] == pytest.approx([1, 6.99, 1e-3])
    assert len(old["curve"]) == 200
    assert (old["measure"], old["held_out"]) == ("bits_per_byte", [[200, 1.25]])
    assert (older["step"], older["loss"], older["curve"]) == (0, None, [])


def test_a_run_that_goes_on_is_read_again(lm, tmp_path: Path):
    folder = pretended(tmp_path, "one", 3, "running")
    with (
        ServerThread(lm, Settings(port=0, runs=tmp_path)) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        (before,) = client.get("/v1/training/runs").json()["data"]
        (same,) = client.get("/v1/training/runs").json()["data"]
        line = {"kind": "step", "step": 4, "tokens": 256, "loss": 6.0, "grad_norm": 1.0}
        folder.metrics.add(line | {"lr": 1e-3, "tokens_per_s": 1.0, "memory": 1, "seconds": 4.0})
        (after,) = client.get("/v1/training/runs").json()["data"]
    assert (before["step"], after["step"]) == (3, 4)
    assert same == before


def test_long_curves_are_thinned_and_keep_their_end(lm, tmp_path: Path):
    pretended(tmp_path, "long", 1001)
    with (
        ServerThread(lm, Settings(port=0, runs=tmp_path)) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        (run,) = client.get("/v1/training/runs").json()["data"]
    assert 300 < len(run["curve"]) <= 400
    assert run["curve"][-1][0] == 1001
