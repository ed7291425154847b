"""``invivo study`` on a tiny model, here and at a URL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from invivo.studies.run_folder import RunFolder

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

NAME = "set-based-prompting"
SMALL = ("--quick", "--set", "n_items=2", "--set", "orders=1")


def test_all_studies_are_listed(invivo: Invivo) -> None:
    assert NAME in invivo("study", "list").out
    (first, *_) = invivo("study", "list", "--json").json()
    assert first["name"] == NAME
    assert first["quick"]["items"] == ["synthetic"]


def test_a_run_here_and_at_a_url_measures_the_same(
    invivo: Invivo, tiny: str, url: str, tmp_path: Path
) -> None:
    here = invivo("study", "run", NAME, *SMALL, "-m", tiny, "--runs", str(tmp_path / "a"), "--json")
    there = invivo("study", "run", NAME, *SMALL, "-u", url, "--runs", str(tmp_path / "b"), "--json")
    assert (here.code, there.code) == (0, 0), here.err + there.err
    folders = [RunFolder(Path(one.json()["folder"])) for one in (here, there)]
    assert folders[0].path.name == folders[1].path.name  # the same question of the same weights
    command = folders[1].read_manifest()["about"]["command"]
    assert (
        command == f"invivo study run {NAME} {' '.join(SMALL)} --url {url} --runs {tmp_path / 'b'}"
    )
    for one, other in zip(*(folder.read_records() for folder in folders), strict=True):
        assert one["condition"] == other["condition"]
        for mine, theirs in zip(one["logprobs"], other["logprobs"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    told = invivo("study", "report", str(folders[0].path))
    assert "no layout of the options" in told.out
    assert "report.html" in told.err
    again = invivo("study", "verify", str(folders[0].path), "--units", "1", "-m", tiny, "--json")
    assert again.code == 0
    assert again.json()["numbers"] > 100
    assert again.json()["largest"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nothing"), "There are: set-based-prompting"),
        (("run", NAME, "--set", "n_items"), "Write n_items=100"),
        (("run", NAME, "--set", "n_item=3"), "n_items"),
        (("run", NAME, "--set", "n_items=many"), "a whole number"),
        (("report", "nowhere"), "no folder of a run"),
        (("verify", "nowhere"), "no folder of a run"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    invivo: Invivo, arguments: tuple[str, ...], said: str
) -> None:
    model = () if arguments[0] == "report" else ("-m", "no-such-model")
    ran = invivo("study", *arguments, *model)
    assert ran.code in (1, 2)
    assert said in ran.err.replace("\n", " ")
