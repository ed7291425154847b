"""An adapter's two files on their way: packed into one answer, and put into a user's folder."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from invivo.errors import InvalidRequest, Unavailable

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def pack(folder: Path, archive: Path) -> None:
    """Put the files of an adapter's folder into a zip file, as they are."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name in ADAPTER_FILES:
            file.write(folder / name, name)


def unpacked(archive: bytes) -> dict[str, bytes]:
    """What :func:`pack` has packed: bytes by file name, and no other names.

    Raises:
        Unavailable: it is something else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            return {name: file.read(name) for name in ADAPTER_FILES}
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise Unavailable(
            f"the server's answer is no adapter: {error}",
            remedy="Check that the address is that of an invivo server",
        ) from error


@contextmanager
def writing_adapter(folder: str | Path) -> Iterator[Path]:
    """The folder, made if missing, for a ``with`` block that writes an adapter's files to it.

    Raises:
        InvalidRequest: it cannot be written to.
    """
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield target
    except OSError as error:
        raise InvalidRequest(
            f"cannot be written to: {error.strerror or error}",
            field="folder",
            given=str(folder),
            remedy="Name a folder that can be made or written to",
        ) from error
