"""Bearer keys in a SQL database: only their hashes are kept.

A key is 32 random bytes, so a plain SHA-256 is enough to store it (there is nothing to guess),
and finding it by the hash tells nothing through timing.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from invivo.errors import Conflict, InvalidRequest, NotFound
from invivo.sqlite_file import opened

SCOPES = ("generate", "score", "edit", "adapters", "finetune", "metrics", "admin")
DEFAULT_SCOPES = ("generate", "score")
PREFIX = "iv-"

_metadata = sql.MetaData()
_keys = sql.Table(
    "keys",
    _metadata,
    sql.Column("id", sql.String(16), primary_key=True),
    sql.Column("hash", sql.String(64), nullable=False, unique=True),
    sql.Column("name", sql.String(64), nullable=False, unique=True),
    sql.Column("scopes", sql.String(128), nullable=False),
    sql.Column("budget", sql.BigInteger),  # tokens, NULL = unlimited
    sql.Column("used", sql.BigInteger, nullable=False, default=0),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("last_used", sql.Float),
    sql.Column("revoked", sql.Float),
)


@dataclass(frozen=True, slots=True)
class Key:
    """A stored key without its secret; times in Unix seconds, budget and use in tokens."""

    id: str
    name: str
    scopes: frozenset[str]
    budget: int | None
    used: int
    created: float
    last_used: float | None
    revoked: float | None


class KeyStore:
    """The keys of one database; every method may be called from any thread.

    Args:
        url: SQLAlchemy URL; the folder of a SQLite file is made, the file is the owner's only.

    Raises:
        InvalidRequest: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine = _opened(sql.make_url(url))
        except (OSError, SQLAlchemyError, ModuleNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidRequest(
                f"the key store cannot be opened: {reason}",
                field="database",
                remedy="Give a SQLAlchemy URL that can be written, as sqlite:////path/keys.sqlite3",
            ) from error

    def add(
        self,
        name: str,
        scopes: Iterable[str] = DEFAULT_SCOPES,
        budget: int | None = None,
    ) -> tuple[str, Key]:
        """Makes a key; returns its secret, which is shown only now, and its record.

        Raises:
            InvalidRequest: a bad name, an unknown scope, a budget below one.
            Conflict: the name is taken.
        """
        wanted = frozenset(scopes)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}", name):
            raise InvalidRequest(
                "not a usable key name",
                field="name",
                given=name,
                remedy="Use 1 to 64 letters, digits, spaces and . _ @ -",
            )
        if not wanted or not wanted <= set(SCOPES):
            raise InvalidRequest(
                "unknown scope",
                field="scopes",
                given=sorted(wanted - set(SCOPES)),
                remedy=f"Choose from {', '.join(SCOPES)}",
            )
        if budget is not None and not 1 <= budget < 2**63:
            raise InvalidRequest(
                "a budget is a positive number of tokens", field="budget", given=budget
            )
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": secrets.token_hex(6),
            "hash": _hash(secret),
            "name": name,
            "scopes": " ".join(sorted(wanted)),
            "budget": budget,
            "used": 0,
            "created": time.time(),
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(_keys.insert().values(**row))
        except IntegrityError:
            raise Conflict(
                "a key of this name exists",
                field="name",
                given=name,
                remedy="Choose another name; names of revoked keys stay taken",
            ) from None
        return secret, self.get(name)

    def list(self) -> list[Key]:
        """All keys, oldest first, revoked ones included."""
        with self._engine.connect() as connection:
            rows = connection.execute(_keys.select().order_by(_keys.c.created))
            return [_record(row) for row in rows]

    def get(self, name_or_id: str) -> Key:
        """The key of this name or id. Raises NotFound."""
        with self._engine.connect() as connection:
            row = connection.execute(_keys.select().where(_named(name_or_id))).first()
        if row is None:
            raise NotFound(
                "no such key",
                field="name",
                given=name_or_id,
                remedy="See `invivo keys list`",
            )
        return _record(row)

    def revoke(self, name_or_id: str) -> Key:
        """Ends a key for good; its record stays. Raises NotFound."""
        key = self.get(name_or_id)
        with self._engine.begin() as connection:
            connection.execute(
                _keys.update()
                .where(_keys.c.id == key.id, _keys.c.revoked.is_(None))
                .values(revoked=time.time())
            )
        return self.get(key.id)

    def find(self, secret: str) -> Key | None:
        """The key with this secret, None when there is none or it was revoked."""
        with self._engine.connect() as connection:
            row = connection.execute(_keys.select().where(_keys.c.hash == _hash(secret))).first()
        if row is None or not secrets.compare_digest(row.hash, _hash(secret)):
            return None
        key = _record(row)
        return None if key.revoked is not None else key

    def any_active(self) -> bool:
        """Whether at least one key can be used."""
        with self._engine.connect() as connection:
            query = _keys.select().where(_keys.c.revoked.is_(None)).limit(1)
            return connection.execute(query).first() is not None

    def used(self, key_id: str) -> int:
        """Tokens spent so far."""
        with self._engine.connect() as connection:
            query = sql.select(_keys.c.used).where(_keys.c.id == key_id)
            return int(connection.execute(query).scalar_one())

    def charge(self, key_id: str, tokens: int) -> None:
        """Adds ``tokens`` to what the key has spent and marks it as used now."""
        with self._engine.begin() as connection:
            connection.execute(
                _keys.update()
                .where(_keys.c.id == key_id)
                .values(used=_keys.c.used + tokens, last_used=time.time())
            )

    def close(self) -> None:
        self._engine.dispose()


def _opened(url: sql.URL) -> sql.Engine:
    """The database, with its table."""
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite and url.database:
        path = Path(url.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    if is_sqlite:
        return opened(url, _metadata.create_all)
    engine = sql.create_engine(url)
    _metadata.create_all(engine)
    return engine


def _named(name_or_id: str) -> sql.ColumnElement[bool]:
    return sql.or_(_keys.c.name == name_or_id, _keys.c.id == name_or_id)


def _record(row: sql.Row) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        scopes=frozenset(row.scopes.split()),
        budget=row.budget,
        used=row.used,
        created=row.created,
        last_used=row.last_used,
        revoked=row.revoked,
    )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
