"""SQLite files that several processes open at once, the first of them making the tables."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sql

PATIENCE = 30.0  # seconds for others who write


def opened(url: sql.URL, make: Callable[[sql.Connection], None]) -> sql.Engine:
    """The database of a SQLite ``url`` with readers beside a writer.

    Args:
        make: makes what is missing in it; whoever opens it meanwhile waits, and then finds that.

    Raises:
        SQLAlchemyError: it cannot be opened.
    """
    engine = sql.create_engine(url, connect_args={"timeout": PATIENCE})
    sql.event.listen(engine, "connect", _settings)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        make(connection)
        connection.commit()
    return engine


def _settings(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    deadline = time.monotonic() + PATIENCE
    while True:  # SQLite itself does not wait for whoever changes a new file's mode beside us
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
