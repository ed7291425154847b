"""Locks between processes: what a look at one is to those who want to hold it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.waiting import PATIENCE, wait_for

from invivo import process_lock
from invivo.errors import Conflict
from invivo.process_lock import abandoned, locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")


def test_a_held_lock_is_refused_and_a_free_one_is_abandoned(tmp_path: Path) -> None:
    path, taken = tmp_path / "folder" / "lock", Conflict("taken")
    assert not abandoned(path)  # there is none
    with locked(path, otherwise=taken):
        assert not abandoned(path)
        with pytest.raises(Conflict), locked(path, otherwise=taken):
            pass
    assert abandoned(path)
    with locked(path, otherwise=taken), pytest.raises(Conflict), locked(path, otherwise=taken):
        pass


def test_who_looks_for_long_only_delays_who_wants_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path, waits = tmp_path / "lock", []
    monkeypatch.setattr(process_lock, "time", SimpleNamespace(sleep=waits.append))
    held = threading.Event()

    def hold() -> None:
        with locked(path, otherwise=Conflict("taken")):
            held.set()

    path.touch()
    with path.open("r") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        holding = threading.Thread(target=hold)
        holding.start()
        wait_for(lambda: len(waits) > 50)
        assert not held.is_set()
    holding.join(PATIENCE)
    assert held.is_set()
