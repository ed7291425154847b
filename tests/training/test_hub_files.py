"""Data sets of the Hub come as the tables that it keeps of each, with their splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tests.training.texts import story

from invivo.errors import InvalidRequest, Unavailable
from invivo.training.config import Data, Source, TokenizerSettings
from invivo.training.prepare import prepare
from invivo.training.sources import find_files

Serve = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Put files into a pretended data set; gives the list of what was asked of the Hub."""

    def put(*names: str) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def download(name: str, **options: Any) -> str:
            asked.append({"name": name} | options)
            return str(tmp_path / "hub")

        for name in names:
            path = tmp_path / "hub" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
        return asked

    return put


def found(tmp_path: Path, **source: Any) -> list[tuple[str, str | None]]:
    files = find_files([Source(hub="owner/name", **source)])
    return [(str(f.path.relative_to(tmp_path / "hub")), f.split) for f in files]


def test_splits_are_those_of_the_folders(tmp_path: Path, serve: Serve) -> None:
    asked = serve(
        "default/partial-train/0000.parquet",
        "default/validation/0000.parquet",
        "default/test/0000.parquet",
        "default/extra/0000.parquet",
        "other/train/0000.parquet",
    )
    assert found(tmp_path) == [
        ("default/extra/0000.parquet", None),
        ("default/partial-train/0000.parquet", "train"),
        ("default/test/0000.parquet", "test"),
        ("default/validation/0000.parquet", "valid"),
    ]
    assert found(tmp_path, subset="other", split="valid") == [("other/train/0000.parquet", "valid")]
    # Other subsets are not downloaded.
    patterns = [call["allow_patterns"] for call in asked]
    assert patterns == [["default/*.parquet"], ["other/*.parquet"]]
    assert {call["repo_type"] for call in asked} == {"dataset"}


def test_one_of_several_subsets_must_be_named(tmp_path: Path, serve: Serve) -> None:
    serve("en/train/0.parquet", "de/train/0.parquet")
    with pytest.raises(
        InvalidRequest, match=r"subset: name one of the subsets\. There are: de, en"
    ):
        found(tmp_path)
    with pytest.raises(InvalidRequest, match="is not a subset"):
        found(tmp_path, subset="fr")
    assert found(tmp_path, subset="de") == [("de/train/0.parquet", "train")]


def test_the_tables_are_read(tmp_path: Path, serve: Serve) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ("only/train/0000.parquet", "only/validation/0000.parquet")
    serve(*names)
    for i, name in enumerate(names):
        parquet.write_table(pyarrow.table({"text": [story(i)] * 3}), tmp_path / "hub" / name)
    data = Data(sources=(Source(hub="owner/name"),))
    shards = prepare(data, TokenizerSettings(vocab_size=280), tmp_path / "home")
    assert shards.rings["train"].documents == shards.rings["valid"].documents == 3
    assert shards.bytes["train"] == 3 * len(story(0).encode())


def test_without_a_network_the_cache_is_read(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> list[str]:
        raise OfflineModeIsEnabled("no network")

    asked = serve("default/train/0000.parquet")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    assert found(tmp_path) == [("default/train/0000.parquet", "train")]
    assert asked[0]["allow_patterns"] == ["*.parquet"]


def test_without_a_network_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(Unavailable, match=r"data\.sources\[0\]\.hub: is not on this machine"):
        find_files([Source(hub="owner/name")])
