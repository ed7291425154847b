"""What is kept under the hash of its content: budgets, owners, and a folder that outlives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from invivo.content_store import ContentStore
from invivo.errors import NotFound, Overloaded, TooLarge


def name(n: int) -> str:
    return f"sha256:{n:064x}"


def store(folder=None, owner_bytes=100, owner_items=5, total_bytes=250):
    return ContentStore(
        "blob",
        owner_bytes=owner_bytes,
        owner_items=owner_items,
        total_bytes=total_bytes,
        folder=folder,
    )


@pytest.fixture(params=["memory", "folder"])
def kept(request, tmp_path):
    return store(None if request.param == "memory" else tmp_path / "blobs")


def test_an_owner_sees_its_own_alone(kept):
    kept.put("a", name(1), b"one")
    kept.put("b", name(2), b"two")
    assert kept.get("a", name(1)) == b"one"
    assert kept.sizes("a") == {name(1): 3}
    for owner, other in (("b", name(1)), ("a", name(2)), ("", name(1)), ("a", name(3))):
        with pytest.raises(NotFound, match="there is no blob of this id"):
            kept.get(owner, other)
        with pytest.raises(NotFound):
            kept.delete(owner, other)
    kept.delete("a", name(1))
    assert kept.sizes("a") == {}


def test_lasting_content_is_refused_beyond_the_budget(kept):
    kept.put("a", name(1), b"x" * 60)
    with pytest.raises(TooLarge, match="at most 100 bytes"):
        kept.put("a", name(2), b"x" * 41)
    kept.put("a", name(1), b"x" * 60)  # there already
    kept.put("a", name(2), b"x" * 40)
    kept.delete("a", name(1))
    kept.put("a", name(3), b"x" * 60)
    for n in range(4, 7):
        kept.put("b", name(n), b"x")
    kept.put("b", name(7), b"x")
    kept.put("b", name(8), b"x")
    with pytest.raises(TooLarge, match="5 blobs"):
        kept.put("b", name(9), b"x")


def test_passing_content_makes_room_and_lasting_content_stays(kept):
    kept.put("a", name(1), b"x" * 50)
    kept.put("a", name(2), b"x" * 30, lasting=False)
    kept.put("a", name(3), b"x" * 30, lasting=False)
    with pytest.raises(NotFound):
        kept.get("a", name(2))
    assert kept.get("a", name(3)) == b"x" * 30
    assert kept.sizes("a") == {name(1): 50}
    kept.put("a", name(4), b"x" * 50)
    with pytest.raises(NotFound):
        kept.get("a", name(3))
    with pytest.raises(TooLarge):
        kept.put("a", name(5), b"x", lasting=False)


def test_all_owners_together_are_bounded(kept):
    for owner in "ab":
        kept.put(owner, name(1), b"x" * 100)
    with pytest.raises(Overloaded):
        kept.put("c", name(1), b"x" * 60)
    kept.put("c", name(1), b"x" * 50)


def test_a_passing_blob_that_is_sent_again_to_stay_stays(kept):
    kept.put("a", name(1), b"x", lasting=False)
    kept.put("a", name(1), b"x")
    assert kept.sizes("a") == {name(1): 1}


def test_the_folder_outlives_the_store(tmp_path):
    owners = ["", "4f00", "../../x", "a/b"]
    first = store(tmp_path / "blobs")
    for n, owner in enumerate(owners):
        first.put(owner, name(n), owner.encode() + b"!")
    first.put("4f00", name(99), b"gone", lasting=False)
    second = store(tmp_path / "blobs")
    for n, owner in enumerate(owners):
        assert second.get(owner, name(n)) == owner.encode() + b"!"
    assert second.sizes("4f00") == {name(1): 5}
    assert [p.name for p in tmp_path.iterdir()] == ["blobs"]
    second.delete("4f00", name(1))
    assert store(tmp_path / "blobs").sizes("4f00") == {}


def test_a_file_that_has_gone_is_not_found(tmp_path):
    kept = store(tmp_path)
    kept.put("a", name(1), b"x")
    next(file for file in tmp_path.rglob("*") if file.is_file()).unlink()
    with pytest.raises(NotFound):
        kept.get("a", name(1))
    kept.put("a", name(1), b"x")
    assert kept.get("a", name(1)) == b"x"


def test_files_that_another_process_takes_away_are_passed_over(tmp_path, monkeypatch):
    store(tmp_path / "blobs").put("a", name(1), b"one")
    given = Path.iterdir

    def with_one_that_is_gone(folder):
        yield from given(folder)
        yield folder / "owner-61" if folder.name == "blobs" else folder / ".draft"

    monkeypatch.setattr(Path, "iterdir", with_one_that_is_gone)
    assert store(tmp_path / "blobs").sizes("a") == {name(1): 3}
