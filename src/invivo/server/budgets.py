"""Token budgets of keys: reserved before the work, settled after it, never overspent.

One process holds the reservations; what was spent is in the database.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from invivo.errors import Forbidden
from invivo.server.keys import KeyStore


class Ledger:
    """Reservations against the budgets of ``keys``; thread-safe."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys
        self._lock = threading.Lock()
        self._reserved: dict[str, int] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="invivo-ledger")

    def reserve(self, key_id: str, budget: int, least: int, wanted: int) -> int:
        """Sets aside up to ``wanted`` tokens, at least ``least``; returns how many.

        Raises:
            Forbidden: fewer than ``least`` are left.
        """
        with self._lock:
            held = self._reserved.get(key_id, 0)
            left = budget - self._keys.used(key_id) - held
            if left < least:
                raise Forbidden(
                    f"the key's token budget does not cover this request ({max(left, 0)} left)",
                    field="Authorization",
                    given=least,
                    remedy="Ask for less, or use a key with a larger budget",
                )
            granted = min(left, wanted)
            self._reserved[key_id] = held + granted
            return granted

    def settle(self, key_id: str, reserved: int, spent: int) -> None:
        """Ends a reservation and charges what was really spent; returns at once."""
        try:
            self._writer.submit(self._settle, key_id, reserved, spent)
        except RuntimeError:  # closed: of a request that the stopping server has cut off
            self._settle(key_id, reserved, spent)

    def _settle(self, key_id: str, reserved: int, spent: int) -> None:
        with self._lock:
            self._keys.charge(key_id, spent)
            left = self._reserved.get(key_id, 0) - reserved
            if left:
                self._reserved[key_id] = left
            else:
                self._reserved.pop(key_id, None)

    def close(self) -> None:
        """Waits until everything spent is written."""
        self._writer.shutdown(wait=True)
