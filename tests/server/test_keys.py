"""The key store: secrets are hashed, keys have scopes and budgets, revoked ones are gone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from invivo.errors import Conflict, InvalidRequest, NotFound
from invivo.server.keys import DEFAULT_SCOPES, KeyStore


@pytest.fixture
def store(tmp_path: Path):
    made = KeyStore(f"sqlite:///{tmp_path / 'deep' / 'keys.sqlite3'}")
    yield made
    made.close()


def test_a_key_is_found_by_its_secret_only(store):
    secret, key = store.add("laptop")
    assert secret.startswith("iv-")
    assert key.scopes == frozenset(DEFAULT_SCOPES)
    assert store.find(secret) == key
    assert store.find(secret[:-1]) is None
    assert store.find("") is None
    assert store.find("\ud800") is None


def test_the_secret_is_not_in_the_file(store, tmp_path):
    secret, _ = store.add("laptop")
    store.close()
    folder = tmp_path / "deep"
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"laptop" in kept
    assert secret.encode() not in kept
    assert secret.removeprefix("iv-").encode() not in kept
    assert stat.S_IMODE((folder / "keys.sqlite3").stat().st_mode) == 0o600


def test_a_revoked_key_is_not_found_but_listed(store):
    secret, _ = store.add("laptop")
    assert store.any_active()
    assert store.revoke("laptop").revoked is not None
    assert store.find(secret) is None
    assert not store.any_active()
    assert [key.name for key in store.list()] == ["laptop"]
    first = store.get("laptop").revoked
    assert store.revoke("laptop").revoked == first


def test_spending_adds_up(store):
    _, key = store.add("laptop", budget=100)
    store.charge(key.id, 30)
    store.charge(key.id, 12)
    assert store.used(key.id) == 42
    assert store.get("laptop").last_used is not None
    assert store.get(key.id).budget == 100


@pytest.mark.parametrize(
    ("arguments", "error", "field"),
    [
        ({"name": ""}, InvalidRequest, "name"),
        ({"name": "a\nb"}, InvalidRequest, "name"),
        ({"name": "a", "scopes": ["root"]}, InvalidRequest, "scopes"),
        ({"name": "a", "scopes": []}, InvalidRequest, "scopes"),
        ({"name": "a", "budget": 0}, InvalidRequest, "budget"),
        ({"name": "taken"}, Conflict, "name"),
    ],
)
def test_bad_keys_are_refused(store, arguments, error, field):
    store.add("taken")
    with pytest.raises(error) as caught:
        store.add(**arguments)
    assert caught.value.field == field


def test_an_unknown_key_cannot_be_revoked(store):
    with pytest.raises(NotFound):
        store.revoke("nobody")


def test_a_store_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "file").write_text("not a database, and long enough that SQLite sees it")
    for url in (
        "nonsense",
        "nosuch://here",
        f"sqlite:///{tmp_path / 'file' / 'below'}",
        f"sqlite:///{tmp_path / 'file'}",
    ):
        with pytest.raises(InvalidRequest) as caught:
            KeyStore(url)
        assert caught.value.field == "database"
