"""Folders that are there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from invivo.errors import Conflict
from invivo.models.folder import new_folder


def test_a_folder_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "home" / "model"
    with new_folder(target) as draft:
        (draft / "config.json").write_text("{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    with pytest.raises(Conflict), new_folder(target):
        pass


def test_who_was_faster_keeps_the_name(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def slowly() -> None:
        with new_folder(target) as draft:
            (draft / "config.json").write_text("mine")
            target.mkdir()
            (target / "config.json").write_text("another's")

    with pytest.raises(Conflict):
        slowly()
    assert (target / "config.json").read_text() == "another's"
    assert list(tmp_path.iterdir()) == [target]
