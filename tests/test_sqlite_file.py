"""Stores in SQLite files, opened by many at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from invivo.jobs.store import JobStore
from invivo.server.keys import KeyStore


@pytest.mark.parametrize("opens", [JobStore, lambda path: KeyStore(f"sqlite:///{path}")])
def test_many_open_a_new_store_at_once(tmp_path: Path, opens: Callable[[Path], Any]) -> None:
    problems: list[Exception] = []

    def one_of_many(path: Path, together: threading.Barrier) -> None:
        together.wait()
        try:
            opens(path).close()
        except Exception as error:
            problems.append(error)

    for number in range(5):  # before it was one transaction, each of them failed
        together = threading.Barrier(6)
        path = tmp_path / str(number) / "store.sqlite3"
        threads = [threading.Thread(target=one_of_many, args=(path, together)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
