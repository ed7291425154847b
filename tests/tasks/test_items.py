"""Items: every shape of record, every kind of file, and the same ones each time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.errors import InvalidRequest
from invivo.tasks import items as module
from invivo.tasks.items import Item, digest, load_items, read_item, synthetic_items

OURS = {"id": "a1", "question": "Which?", "options": ["x", "y"], "label": 1}
CSQA = {
    "id": "b",
    "question": "Where?",
    "choices": {"label": ["A", "B", "C"], "text": ["x", "y", "z"]},
    "answerKey": "C",
}
MMLU = {"question": "What?", "choices": ["x", "y"], "answer": 0}
STAGED = Path("../shared/data/35-set-based-prompting")


def test_three_shapes_of_records() -> None:
    assert read_item(OURS, "n") == Item("a1", "Which?", ("x", "y"), 1)
    assert read_item(CSQA, "n") == Item("b", "Where?", ("x", "y", "z"), 2)
    assert read_item(MMLU, "n") == Item("n", "What?", ("x", "y"), 0)


@pytest.mark.parametrize(
    "wrong",
    [{}, {**OURS, "label": 2}, {**OURS, "options": ["x"]}, {**CSQA, "answerKey": "Z"},
     {**MMLU, "answer": "first"}],
)  # fmt: skip
def test_other_records_are_refused(wrong: dict) -> None:
    with pytest.raises(InvalidRequest, match="no multiple-choice item"):
        read_item(wrong, "n")


def test_files_of_every_kind_give_the_same_items(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    records = [{**OURS, "id": str(i)} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    parquet.write_table(Table.from_pylist(records), tmp_path / "a.parquet")
    found = [load_items(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 4
    assert all(one == found[0] for one in found)
    assert len({digest(one) for one in found}) == 1


def test_some_of_many_are_drawn_once_and_for_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**OURS, "id": str(i)}) + "\n" for i in range(50)))
    drawn = load_items(str(path), 10, seed=3)
    assert drawn == load_items(str(path), 10, seed=3)
    assert drawn != load_items(str(path), 10, seed=4)
    assert [int(item.id) for item in drawn] == sorted({int(item.id) for item in drawn})
    assert len(load_items(str(path), 80)) == 50


@given(st.integers(1, 40), st.integers(0, 5))
def test_made_items_have_one_right_option(n: int, seed: int) -> None:
    made = synthetic_items(n, seed=seed)
    assert made == synthetic_items(n, seed=seed)
    for item in made:
        kind = item.question.removeprefix("Which of these is a").removeprefix("n")
        kind = kind.removesuffix("?").strip()
        right = [o for o in item.options if o in module._KINDS[kind]]
        assert right == [item.options[item.label]]
        assert len(set(item.options)) == len(item.options) >= 3


def test_the_hub_gives_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    for split, record in (("train", OURS), ("validation", CSQA)):
        folder = tmp_path / "default" / split
        folder.mkdir(parents=True)
        parquet.write_table(Table.from_pylist([record]), folder / "0000.parquet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert [i.id for i in load_items("hub:tau/commonsense_qa:default:validation")] == ["b"]
    assert [i.id for i in load_items("hub:tau/commonsense_qa")] == ["a1", "b"]
    with pytest.raises(InvalidRequest, match="no such split"):
        load_items("hub:tau/commonsense_qa:default:other")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file") as refused:
        load_items(str(tmp_path / "none.jsonl"))
    assert "synthetic" in refused.value.remedy
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(InvalidRequest, match="no multiple-choice item"):
        load_items(str(tmp_path / "other.jsonl"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", b"{"),
        ("bad.json", b"3"),
        ("bad.jsonl.gz", b"no gzip"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-12]),
        ("bad.parquet", b"no table"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_items(str(tmp_path / name))


@pytest.mark.skipif(not STAGED.is_dir(), reason="the staged items are not here")
def test_the_staged_items_are_read() -> None:
    csqa = load_items(str(STAGED / "csqa_2000.jsonl.gz"))
    mmlu = load_items(str(STAGED / "mmlu_40_per_subject.jsonl.gz"))
    assert (len(csqa), len(mmlu)) == (2000, 2280)
    assert {len(i.options) for i in csqa} == {5}
    assert {len(i.options) for i in mmlu} == {4}
