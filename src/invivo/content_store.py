"""Things kept under the hash of their content, apart for every owner, within byte budgets.

Programs and tensors that are sent once and named by their hash from then on. In memory, or in a
folder, where they outlive the process.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from invivo.errors import NotFound, Overloaded, TooLarge

_ID = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(slots=True)
class _Entry:
    size: int
    data: bytes | None  # None: in the folder
    lasting: bool


class ContentStore:
    """Bytes by (owner, id); every method may be called from any thread.

    Args:
        what: what is kept, for errors ("program").
        owner_bytes, owner_items: most of one owner.
        total_bytes: most of all owners together.
        folder: where they are kept; None: in memory.
    """

    def __init__(
        self,
        what: str,
        *,
        owner_bytes: int,
        owner_items: int,
        total_bytes: int,
        folder: Path | None = None,
    ) -> None:
        self._what = what
        self._owner_bytes = owner_bytes
        self._owner_items = owner_items
        self._total_bytes = total_bytes
        self._folder = folder
        self._lock = threading.Lock()
        self._owners: dict[str, OrderedDict[str, _Entry]] = {}
        if folder is not None:
            self._find_kept(folder)

    def put(self, owner: str, name: str, data: bytes, *, lasting: bool = True) -> None:
        """Keep ``data``; what is there already stays.

        Args:
            name: "sha256:" and 64 hexadecimal digits.
            lasting: until it is deleted. What is not (results on their way to a client) is in
                memory only and makes room for what comes after it.

        Raises:
            TooLarge: the owner's budget does not allow for it.
            Overloaded: all owners together hold too much.
        """
        assert _ID.fullmatch(name)
        with self._lock:
            held = self._owners.setdefault(owner, OrderedDict())
            known = held.get(name)
            if known is not None and (known.lasting or not lasting):
                held.move_to_end(name)
                return
            if known is not None:
                del held[name]
            self._make_room(held, len(data))
            if lasting and self._folder is not None:
                self._write(self._file(self._folder, owner, name), data)
                held[name] = _Entry(len(data), None, True)
            else:
                held[name] = _Entry(len(data), data, lasting)

    def get(self, owner: str, name: str, field: str = "id") -> bytes:
        """Raises NotFound, in the same words whether it is unknown or another's."""
        with self._lock:
            held = self._owners.get(owner, OrderedDict())
            entry = held.get(name)
            if entry is None:
                raise self._missing(name, field)
            held.move_to_end(name)
            if entry.data is not None:
                return entry.data
            assert self._folder is not None
            try:
                return self._file(self._folder, owner, name).read_bytes()
            except OSError:
                del held[name]  # somebody has cleared the folder
                raise self._missing(name, field) from None

    def sizes(self, owner: str) -> dict[str, int]:
        """What an owner keeps for good: bytes by id, oldest use first."""
        with self._lock:
            held = self._owners.get(owner, OrderedDict())
            return {name: entry.size for name, entry in held.items() if entry.lasting}

    def delete(self, owner: str, name: str, field: str = "id") -> None:
        """Raises NotFound."""
        with self._lock:
            entry = self._owners.get(owner, OrderedDict()).pop(name, None)
            if entry is None:
                raise self._missing(name, field)
            if entry.data is None and self._folder is not None:
                self._file(self._folder, owner, name).unlink(missing_ok=True)

    def _missing(self, name: str, field: str) -> NotFound:
        return NotFound(f"there is no {self._what} of this id", field=field, given=name)

    def _make_room(self, held: OrderedDict[str, _Entry], size: int) -> None:
        lasting = [e.size for e in held.values() if e.lasting]
        if sum(lasting) + size > self._owner_bytes or len(lasting) >= self._owner_items:
            raise TooLarge(
                f"at most {self._owner_bytes} bytes and {self._owner_items} {self._what}s are kept",
                field=self._what,
                given=f"{sum(lasting) + size} bytes",
                remedy=f"Delete a {self._what} that is no longer needed",
            )
        passing = [name for name, entry in held.items() if not entry.lasting]
        while passing and (
            sum(e.size for e in held.values()) + size > self._owner_bytes
            or len(held) >= self._owner_items
        ):
            del held[passing.pop(0)]
        total = sum(e.size for kept in self._owners.values() for e in kept.values())
        if total + size > self._total_bytes:
            raise Overloaded(
                f"the {self._what}s of all together take too much memory",
                field=self._what,
                remedy="Try again later, or delete some",
            )

    # In the folder.

    def _find_kept(self, folder: Path) -> None:
        if not folder.is_dir():
            return
        for place in sorted(folder.iterdir()):
            owner = _owner_of(place.name)
            if owner is None or not place.is_dir():
                continue
            files = []
            for file in place.iterdir():
                with suppress(FileNotFoundError):  # another process is at them too
                    status = file.stat()
                    files.append((status.st_mtime, file.name, status.st_size))
            held = self._owners.setdefault(owner, OrderedDict())
            for _, ending, size in sorted(files):
                name = f"sha256:{ending}"
                if _ID.fullmatch(name):
                    held[name] = _Entry(size, None, True)

    def _file(self, folder: Path, owner: str, name: str) -> Path:
        return folder / _folder_of(owner) / name.removeprefix("sha256:")

    def _write(self, file: Path, data: bytes) -> None:
        """Whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = file.with_name(f".{file.name}.{os.getpid()}")
        new.write_bytes(data)
        new.replace(file)


def _folder_of(owner: str) -> str:
    """A name that no owner can break out of, and from which the owner can be told again."""
    return f"owner-{owner.encode().hex()}"


def _owner_of(folder: str) -> str | None:
    if not folder.startswith("owner-"):
        return None
    try:
        return bytes.fromhex(folder.removeprefix("owner-")).decode()
    except ValueError:
        return None
