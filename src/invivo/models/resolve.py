"""From a name to a folder in the Hub's format."""

from __future__ import annotations

from pathlib import Path

from invivo.errors import NotFound


def resolve(name: str) -> Path:
    """The folder of a model given by path."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    raise NotFound("there is no such model", field="model", given=name)
