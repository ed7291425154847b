"""From a name to a folder in the Hub's format.

A name is a local folder or GGUF file, the name of a packaged model or of one that comes with
invivo, or an id at the Hub. GGUF files are converted once; the result is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from invivo.errors import Conflict, Forbidden, InvivoError, NotFound, Unavailable, UnsupportedModel
from invivo.models.convert import CONVERTER, convert_gguf
from invivo.models.packaged import PACKAGED, Progress, assembled, downloaded, installed_files
from invivo.models.shipped import shipped_models
from invivo.process_lock import locked

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One line of :func:`list_models`.

    Attributes:
        state: "ready" (a folder is there), "installed" (its package is there and will be
            converted at first use) or "available" (``pull`` gets it).
        n_bytes: size of the folder when ready, else of the file to convert.
    """

    name: str
    description: str
    licence: str
    state: str
    path: Path | None
    n_bytes: int


def models_home() -> Path:
    """Where converted models are kept: ``$INVIVO_HOME/models``, else ``~/.cache/invivo/models``."""
    home = os.environ.get("INVIVO_HOME")
    base = Path(home).expanduser() if home else Path.home() / ".cache" / "invivo"
    return base / "models"


def resolve(name: str) -> Path:
    """The folder of the model called ``name``; converts a GGUF the first time.

    Raises:
        NotFound: no such folder, packaged model or Hub id; or it has not been pulled.
        Unavailable: the Hub is needed and cannot be reached.
        UnsupportedModel: there is something, but not a readable model.
    """
    if name in PACKAGED:
        return _packaged(name)
    shipped = shipped_models()
    if name in shipped:
        return shipped[name].path
    path = Path(name).expanduser()
    if path.is_file():
        return _converted(path)
    if name and path.is_dir():
        return _folder(path)
    if name and _is_ready(models_home() / name):
        return models_home() / name
    if _HUB_ID.fullmatch(name) and not name.startswith((".", "~")):
        return _from_hub(name)
    raise NotFound(
        "there is no such model",
        field="model",
        given=name,
        remedy="Give a folder, a GGUF file, a Hub id (owner/name) or one of: "
        + ", ".join((*PACKAGED, *shipped)),
    )


def pull(name: str, *, progress: Progress | None = None, accept_license: bool = False) -> Path:
    """Get a packaged model or a Hub id and make it ready; returns its folder.

    Args:
        name: a packaged name or ``owner/name``.
        progress: called with a word and a share between 0 and 1.
        accept_license: needed once for models under terms of use.

    Raises:
        Forbidden: the model's terms have not been accepted.
        Unavailable: the network is needed and not there.
    """
    model = PACKAGED.get(name)
    if model is None:
        return resolve(name)
    folder = models_home() / name
    if _is_ready(folder):
        return folder
    if model.terms and not accept_license:
        raise Forbidden(
            f"{name} comes under terms of use",
            field="accept_license",
            given=accept_license,
            remedy=f"Read {model.terms}; then pull again, accepting the licence",
        )
    files = installed_files(model)
    if files is not None:
        return _convert_packaged(name, files, progress)
    with downloaded(model, progress) as carriers:
        return _convert_packaged(name, carriers, progress)


def list_models() -> list[ModelEntry]:
    """The packaged models, those that come with invivo, and everything in the cache."""
    entries = [
        ModelEntry(m.name, m.description, m.licence, "ready", m.path, _size(m.path))
        for m in shipped_models().values()
    ]
    home = models_home()
    for model in PACKAGED.values():
        folder = home / model.name
        if _is_ready(folder):
            state, size = "ready", _size(folder)
        else:
            state = "available" if installed_files(model) is None else "installed"
            size = model.n_bytes
        path = folder if state == "ready" else None
        entries.append(ModelEntry(model.name, model.description, model.licence, state, path, size))
    others = sorted(home.iterdir()) if home.is_dir() else []
    for folder in others:
        if folder.name not in PACKAGED and _is_ready(folder):
            text = f"converted from {_conversion(folder).get('source', 'a GGUF file')}"
            entries.append(ModelEntry(folder.name, text, "", "ready", folder, _size(folder)))
    return entries


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def _packaged(name: str) -> Path:
    folder = models_home() / name
    if _is_ready(folder):
        return folder
    model = PACKAGED[name]
    files = installed_files(model)
    if files is None or model.terms:
        licence = " --accept-license" if model.terms else ""
        raise NotFound(
            f"{name} is not here yet",
            field="model",
            given=name,
            remedy=f"Get it with: invivo models pull {name}{licence}",
        )
    return _convert_packaged(name, files, None)


def _convert_packaged(name: str, files: list[Path], progress: Progress | None) -> Path:
    with assembled(PACKAGED[name], files, progress) as source:
        return _convert(source, models_home() / name, progress)


def _converted(file: Path) -> Path:
    """The cached conversion of a GGUF file, known by path, size and time of change."""
    if file.suffix.lower() != ".gguf":
        raise UnsupportedModel(
            "a model file must be a GGUF",
            field="model",
            given=str(file),
            remedy="Give the folder of a safetensors model",
        )
    status = file.stat()
    identity = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    short = hashlib.sha256(identity.encode()).hexdigest()[:10]
    folder = models_home() / f"{file.stem}-{short}"
    return folder if _is_ready(folder) else _convert(file, folder, None)


def _convert(source: Path, target: Path, progress: Progress | None) -> Path:
    with locked(target.parent / f".{target.name}.lock"):
        if _is_ready(target):  # another process was faster
            return target
        if target.exists():  # made by an older converter
            _remove(target)
        try:
            return convert_gguf(source, target, progress=progress)
        except Conflict:
            if _is_ready(target):  # so it was where there are no such locks
                return target
            raise


def _remove(folder: Path) -> None:
    """Take an outdated conversion away, under another name first so that none reads half of it."""
    trash = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    folder.rename(trash / folder.name)
    shutil.rmtree(trash, ignore_errors=True)


def _conversion(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_ready(folder: Path) -> bool:
    return _conversion(folder).get("converter") == CONVERTER


def _folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    trained = path / "model"  # of a training run
    if (trained / "config.json").is_file():
        return trained
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _converted(files[0])
    raise UnsupportedModel(
        "the folder holds no config.json" + (" and several GGUF files" if files else ""),
        field="model",
        given=str(path),
        remedy="Give one of the files" if files else "Give a model folder in the Hub's format",
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(name, allow_patterns=_HUB_FILES)
    except GatedRepoError as error:
        raise Forbidden(
            f"{name} is behind an agreement at the Hub",
            field="model",
            given=name,
            remedy="Accept it on the model's page and log in with: hf auth login",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFound(
            "the Hub has no such model, or it is private",
            field="model",
            given=name,
            remedy="Check the spelling; for a private model log in with: hf auth login",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise _offline(name) from error
    return _folder(Path(folder))


def _offline(name: str) -> InvivoError:
    return Unavailable(
        f"{name} is not on this machine and the Hub cannot be reached",
        field="model",
        given=name,
        remedy="Check the network, copy the model's folder here and give its path, or use "
        f"a packaged model: {', '.join(PACKAGED)}",
    )
