"""Accounts of keys when requests are cancelled and the server stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.waiting import PATIENCE, await_for

from invivo.server.admission import Gate, admit
from invivo.server.auth import Principal
from invivo.server.budgets import Ledger
from invivo.server.keys import Key, KeyStore
from invivo.server.settings import Settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    made = KeyStore(f"sqlite:///{tmp_path / 'keys.sqlite3'}")
    yield made
    made.close()


@pytest.fixture
def key(store: KeyStore) -> Key:
    return store.add("poor", budget=100)[1]


async def test_what_is_granted_to_a_cancelled_request_goes_back(
    store: KeyStore, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, asked, go_on = Ledger(store), threading.Event(), threading.Event()
    reserve, settle, settled = ledger.reserve, ledger._settle, []

    def slowly(*arguments: Any) -> int:
        asked.set()
        assert go_on.wait(PATIENCE)
        return reserve(*arguments)

    def noted(*arguments: Any) -> None:
        settle(*arguments)
        settled.append(arguments)

    monkeypatch.setattr(ledger, "reserve", slowly)
    monkeypatch.setattr(ledger, "_settle", noted)
    services: Any = SimpleNamespace(
        ledger=ledger,
        settings=Settings(),
        info=SimpleNamespace(max_model_len=200),
        gate=Gate(4),
        draining=False,
    )
    principal = Principal(key.id, "poor", frozenset({"generate"}), 100)

    async def work() -> int | None:
        async with admit(services, principal) as ticket:
            return await ticket.prompt([10], max_tokens=90)

    first = asyncio.ensure_future(work())
    await await_for(asked.is_set)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert services.gate.taken == 0
    go_on.set()
    await await_for(lambda: len(settled) == 2)  # the request's end, and what came after it
    assert sorted(settled) == [(key.id, 0, 0), (key.id, 100, 0)]
    assert await work() == 90
    ledger.close()
    assert store.get("poor").used == 0


def test_what_a_stopping_server_has_cut_off_is_charged(store: KeyStore, key: Key) -> None:
    ledger = Ledger(store)
    granted = ledger.reserve(key.id, 100, 10, 60)
    ledger.close()
    ledger.settle(key.id, granted, 25)
    assert store.get("poor").used == 25
    assert ledger.reserve(key.id, 100, 1, 100) == 75
