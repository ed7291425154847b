"""Work with tensors outside the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from invivo.errors import Unavailable

T = TypeVar("T")


def in_passing_thread(work: Callable[[], T]) -> T:
    """The result of ``work``, done in a thread that ends with it.

    OpenMP keeps a team of workers for every thread that has run something in parallel, as long as
    that thread lives. With a team of the caller's beside the engine's there are more workers than
    processors; then all of them sleep between parallel regions, and waking them costs the engine
    a quarter of its speed on a CPU.

    Raises:
        Unavailable: the program is ending, no thread can be started any more.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            done = pool.submit(work)
        except RuntimeError as error:
            raise Unavailable("the program is ending") from error
        return done.result()
