"""Writing a folder in the Hub's format: whole or not at all, weights in shards."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from invivo.errors import Conflict

_SHARD_BYTES = 2 << 30


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when it is complete.

    Raises:
        Conflict: the name is taken.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise _taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        draft.chmod(0o755)
        yield draft
        try:
            draft.replace(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise _taken(target) from error  # by someone who was faster
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _taken(target: Path) -> Conflict:
    return Conflict(
        "the folder exists and is not empty",
        field="folder",
        given=str(target),
        remedy="Choose another name or remove it",
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write tensors as safetensors, in several files where there is more than ``shard_bytes``.

    The tensors may be views; only one shard of copies is in memory at a time.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes files that only their owner reads
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if shard and size + n_bytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += n_bytes
        total += n_bytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
