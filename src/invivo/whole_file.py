"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Put a file in the place of ``path``, through to the disk.

    Raises:
        OSError: the disk is full or refuses; what was at ``path`` stays.
    """
    draft = path.with_name(f".{path.name}.unfinished")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
