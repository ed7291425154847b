"""Files of a data set at the Hub, downloaded once into the Hub's own cache.

The Hub keeps a copy of every data set as Parquet tables, ``SUBSET/SPLIT/0000.parquet``; that copy
is what is read, so that no data set's own loading code or format matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from invivo.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from invivo.training.config import Source
from invivo.training.sources import SourceFile, Split

_TABLES = "refs/convert/parquet"  # the Hub's name for that copy
_SPLITS: dict[str, Split] = {
    "train": "train",
    "validation": "valid",
    "valid": "valid",
    "dev": "valid",
    "test": "test",
}


def hub_files(source: Source, where: str) -> list[SourceFile]:
    """The tables of one subset; its splits keep their roles (others are training text).

    Raises:
        NotFound: the Hub has no such data set.
        InvalidRequest: there are several subsets and none, or an unknown one, was named.
        Forbidden: it stands behind an agreement.
        Unavailable: the Hub cannot be reached and the data set is not in its cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    assert source.hub is not None
    names = _listed(source.hub)
    pattern = "*.parquet" if names is None else f"{_subset(names, source, where)}/*.parquet"
    try:
        folder = snapshot_download(
            source.hub, repo_type="dataset", revision=_TABLES, allow_patterns=[pattern]
        )
    except GatedRepoError as error:
        raise Forbidden(
            "is behind an agreement at the Hub",
            field=f"{where}.hub",
            given=source.hub,
            remedy="Accept it on the data set's page and log in with: hf auth login",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFound(
            "the Hub has no such data set, or it is private",
            field=f"{where}.hub",
            given=source.hub,
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise Unavailable(
            "is not on this machine and the Hub cannot be reached",
            field=f"{where}.hub",
            given=source.hub,
            remedy="Check the network, or give the files' path",
        ) from error
    return _tables(Path(folder), source, where)


def _listed(name: str) -> list[str] | None:
    """All files of the data set; None where the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(name, revision=_TABLES, timeout=20)
    except Exception:  # whatever it is, the download meets it too, or finds all in the cache
        return None
    return [file.rfilename for file in found.siblings or []]


def _subset(names: Iterable[str], source: Source, where: str) -> str:
    """Which of the subsets that these files belong to is meant.

    Raises:
        InvalidRequest: none of them, or any of several.
    """
    parts = (PurePosixPath(name).parts for name in names if name.endswith(".parquet"))
    subsets = sorted({part[0] for part in parts if len(part) > 1})
    chosen = source.subset or ("default" if "default" in subsets else None)
    if chosen is None and len(subsets) == 1:
        chosen = subsets[0]
    if chosen is None or chosen not in subsets:
        raise InvalidRequest(
            "is not a subset of this data set" if source.subset else "name one of the subsets",
            field=f"{where}.subset",
            given=source.subset,
            remedy=f"There are: {', '.join(subsets)}" if subsets else None,
        )
    return chosen


def _tables(folder: Path, source: Source, where: str) -> list[SourceFile]:
    paths = sorted(PurePosixPath(p.relative_to(folder)) for p in folder.rglob("*.parquet"))
    subset = _subset(map(str, paths), source, where)
    chosen = [path for path in paths if path.parts[0] == subset]
    return [
        SourceFile(folder / path, source.column, source.split or _split(path)) for path in chosen
    ]


def _split(path: PurePosixPath) -> Split | None:
    """Of the folder's name; ``partial-train`` holds the first gigabytes of a large ``train``."""
    return _SPLITS.get(path.parts[1].removeprefix("partial-")) if len(path.parts) > 2 else None
