"""One process at a time; the operating system gives a lock back when its process dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from invivo.errors import InvivoError

_A_LOOK = 0.05  # seconds


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
        if otherwise is None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        else:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    # Who only asks whether it is held shares it for a moment, however long that is.
                    try:
                        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except OSError:
                        raise otherwise from error
                    fcntl.flock(handle, fcntl.LOCK_UN)
                    time.sleep(_A_LOOK)
        yield


def abandoned(path: Path) -> bool:
    """Whether ``path`` is a lock file that no process holds; False where this cannot be told."""
    try:
        import fcntl

        with path.open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
