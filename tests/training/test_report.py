"""Reports: pages that need nothing else, from real runs and from made-up ones."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.training.small_run import GLA, LLAMA, small

from invivo.errors import InvalidRequest, NotFound
from invivo.training import seeds
from invivo.training.evaluate import PositionBucket
from invivo.training.recall import RecallScore
from invivo.training.report import run_page, write_comparison, write_report
from invivo.training.run import train
from invivo.training.run_record import read_run
from invivo.training.seeds import difference, mean_over

pytest.importorskip("matplotlib")


@functools.cache
def trained() -> dict[str, Path]:
    """Two series of two seeds."""
    folder = Path(tempfile.mkdtemp())
    found = {}
    for model, kind in ((GLA, "gla"), (LLAMA, "llama")):
        for seed in (0, 1):
            name = f"{kind}-seed{seed}"
            config = small(
                folder,
                f"name={name}",
                f"seed={seed}",
                "evaluation.every=4",
                'evaluation.prompts=["the <cat>"]',
                model=model,
            )
            found[name] = train(config, runs=folder / "runs").folder
    return found


class Tags(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            outward = name in ("src", "href", "xlink:href") and value is not None
            if outward and not str(value).startswith("#"):
                self.fetched.append(str(value))


def tags(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


def test_a_run_has_a_page_of_its_own() -> None:
    folder = trained()["gla-seed0"]
    page = write_report(folder).read_text(encoding="utf-8")
    run = read_run(folder)
    assert run.last is not None
    assert f"{run.last['bits_per_byte']:.4f}" in page
    assert "gla, " in page
    assert "step 12 of 12, seed 0" in page
    assert "the &lt;cat&gt;" in page
    assert "data.length" in page
    found = tags(page)
    assert found.fetched == []
    assert found.tags.count("svg") == 2
    assert "script" not in found.tags
    assert run_page(run) == page  # the same run, the same page


def test_runs_of_one_series_differ_in_their_seed(tmp_path: Path) -> None:
    target = write_comparison(list(trained().values()), tmp_path / "both.html")
    page = target.read_text(encoding="utf-8")
    assert "4 runs in 2 series" in page
    assert ">gla<" in page
    assert ">llama<" in page
    assert "llama less gla" in page
    assert "model.model_type" in page
    assert "data.length" not in page  # both have the same
    values = []
    for name in ("gla-seed0", "gla-seed1"):
        last = read_run(trained()[name]).last
        assert last is not None
        values.append(last["bits_per_byte"])
    assert str(mean_over(values)) in page
    assert tags(page).fetched == []


def written(folder: Path, lines: list[dict[str, Any]], *, status: str = "running") -> Path:
    """A run's files without a run."""
    folder.mkdir(parents=True)
    config = {"name": folder.name, "seed": 0, "model": {}, "data": {"kind": "text", "length": 128}}
    manifest = {
        "name": folder.name,
        "status": status,
        "steps": 10,
        "created": 0,
        "parameters": 1234,
        "config": config,
        "device": "cpu",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def step(number: int) -> dict[str, Any]:
    place = {"kind": "step", "step": number, "tokens": 100 * number, "seconds": number / 10}
    return place | {"loss": 5 / number, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 1e3}


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    empty = written(tmp_path / "empty", [])
    assert "step 0 of 10" in write_report(empty).read_text(encoding="utf-8")
    begun = written(tmp_path / "begun", [step(1), {"kind": "evaluation", "step": 1, "tokens": 9}])
    assert "Nothing has been measured" in write_report(begun).read_text(encoding="utf-8")
    both = write_comparison([empty, begun], tmp_path / "both.html")
    assert "do not differ" in both.read_text(encoding="utf-8")


def test_long_texts_and_recall_are_drawn(tmp_path: Path) -> None:
    buckets = [
        PositionBucket(end // 2, end, 3.0 - i / 9, 2.9 - i / 9, 3.1 - i / 9, 1.5, 99)
        for i, end in enumerate((64, 128, 256, 2048))
    ]
    scores = [
        RecallScore(pairs, distance, 10, 5, 0.5, 0.24, 0.76)
        for pairs in (4, 8)
        for distance in (None, (2, 4), (4, 8))
    ]
    place = {"step": 2, "tokens": 200}
    lines = [
        step(1),
        step(2),
        {"kind": "positions", "length": 2048, "buckets": [asdict(b) for b in buckets]} | place,
        {"kind": "evaluation", "split": "recall", "rows": 20, "accuracy": 0.5} | place
        | {"scores": [asdict(score) for score in scores]},
    ]  # fmt: skip
    folder = written(tmp_path / "probe", lines)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "trained up to here" in page
    assert re.search(r">2k<", page)
    assert "8 pairs" in page
    assert "50.0%" in page
    assert tags(page).tags.count("svg") == 4
    both = write_comparison([folder, written(tmp_path / "other", lines)], tmp_path / "c.html")
    assert tags(both.read_text(encoding="utf-8")).tags.count("svg") == 4


def test_right_answers_are_not_set_beside_bits_per_byte(tmp_path: Path) -> None:
    place = {"kind": "evaluation", "step": 1, "tokens": 30}
    asked = written(tmp_path / "asked", [step(1), place | {"accuracy": 0.5}])
    read = written(tmp_path / "read", [step(1), place | {"bits_per_byte": 2.0}])
    with pytest.raises(InvalidRequest) as error:
        write_comparison([asked, read], tmp_path / "both.html")
    assert error.value.field == "run"
    assert not (tmp_path / "both.html").exists()


def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    folder = written(tmp_path / "long", [step(n) for n in range(1, 20_001)])
    assert write_report(folder).stat().st_size < 500_000


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no training run"):
        write_report(tmp_path)


def test_intervals_over_seeds_are_students_and_welchs() -> None:
    one = mean_over([3.0])
    assert (one.value, one.low, str(one)) == (3.0, None, "3")
    three = mean_over([1.0, 2.0, 4.0])
    # mean 7/3, s = 1.527525, t(2) = 4.302653
    assert three.low == pytest.approx(7 / 3 - 4.302653 * 1.527525 / 3**0.5, abs=1e-5)
    apart = difference([1.0, 2.0, 4.0], [5.0, 5.5])
    assert apart.value == pytest.approx(7 / 3 - 5.25)
    assert apart.low is not None
    assert apart.high is not None
    from scipy.stats import t, ttest_ind

    expected = ttest_ind([1.0, 2.0, 4.0], [5.0, 5.5], equal_var=False).confidence_interval()
    assert (apart.low, apart.high) == pytest.approx((expected.low, expected.high))
    for freedom in (1.0, 1.3, 2.862, 4.0, 30.0, 1e5):
        assert seeds._quantile(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-5)
    assert difference([1.0, 1.0], [2.0, 2.0]).high == -1.0
    assert difference([1.0], [2.0, 3.0]).low is None
