"""``invivo keys`` against a database file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'keys.sqlite3'}"


def test_a_key_is_added_listed_and_revoked(invivo: Invivo, database: str) -> None:
    from invivo.server.keys import KeyStore

    added = invivo("keys", "add", "laptop", "--budget", "500", "--database", database)
    assert added.code == 0
    secret = added.out.strip()
    store = KeyStore(database)
    assert store.find(secret) is not None

    listed = invivo("keys", "list", "--database", database, "--json").json()
    assert [(k["name"], k["budget"], k["scopes"]) for k in listed] == [
        ("laptop", 500, ["generate", "score"])
    ]
    assert secret not in str(listed)
    assert "laptop" in invivo("keys", "list", "--database", database).out

    assert invivo("keys", "revoke", "laptop", "--database", database).code == 0
    assert store.find(secret) is None
    store.close()


def test_add_as_json_has_the_secret(invivo: Invivo, database: str) -> None:
    made = invivo("keys", "add", "a", "--scope", "admin", "--json", "--database", database).json()
    assert made["key"]
    assert made["scopes"] == ["admin"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["add", "a", "--scope", "everything"], 2, "scope"),
        (["add", "a", "--budget", "0"], 2, "budget"),
        (["revoke", "nobody"], 1, "nobody"),
    ],
)
def test_mistakes_are_explained(
    invivo: Invivo, database: str, arguments: list[str], code: int, text: str
) -> None:
    ran = invivo("keys", *arguments, "--database", database)
    assert ran.code == code
    assert ran.err.startswith("error: ")
    assert text in ran.err


def test_an_empty_list_says_how_to_begin(invivo: Invivo, database: str) -> None:
    assert "invivo keys add" in invivo("keys", "list", "--database", database).err
