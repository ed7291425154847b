"""One process at a time; the operating system gives a lock back when its process dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from invivo.errors import InvivoError


@contextmanager
def locked(path: Path, *, otherwise: InvivoError | None = None) -> Iterator[None]:
    """Hold the lock file ``path``, which is made with its folder if missing.

    Systems without such locks have none: one process at a time is up to the user there.

    Args:
        otherwise: raised where another process holds it; None: wait for that one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if otherwise is None else fcntl.LOCK_NB))
        except OSError as error:
            if otherwise is None:
                raise
            raise otherwise from error
        yield
