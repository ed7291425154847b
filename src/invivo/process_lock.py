"""One process at a time; the operating system gives a lock back when its process dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from invivo.errors import InvivoError

_LOOKS, _A_LOOK = 4, 0.05  # who asks whether a lock is held holds it himself for a moment


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
        looks = 0
        while otherwise is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                looks += 1
                if looks == _LOOKS:
                    raise otherwise from error
                time.sleep(_A_LOOK)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
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
