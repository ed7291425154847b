"""The identity of a checkpoint: a hash of its config and of samples of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

# Fields that differ between copies of one and the same model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_SAMPLES = 16
_SAMPLE_BYTES = 64


def fingerprint_of(folder: Path) -> str:
    """sha256 (hex) over config.json and every tensor's name, shape, dtype and sampled bytes.

    It does not depend on how tensors are spread over files. 16 windows of 64 bytes, evenly
    spread, stand for the content of a tensor: enough to tell checkpoints apart, not to prove that
    a file is undamaged.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stable = {k: v for k, v in config.items() if k not in _VOLATILE}
    digest.update(json.dumps(stable, sort_keys=True, separators=(",", ":")).encode())
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        start, header = _header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = (file, start, entry)
    handles: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(tensors):
            file, start, entry = tensors[name]
            if file not in handles:
                handles[file] = file.open("rb")
            digest.update(f"{name} {entry['shape']} {entry['dtype']}".encode())
            first, last = entry["data_offsets"]
            for position in _positions(first, last):
                handles[file].seek(start + position)
                digest.update(handles[file].read(min(_SAMPLE_BYTES, last - position)))
    finally:
        for handle in handles.values():
            handle.close()
    return digest.hexdigest()


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the table of tensors (the format's JSON header)."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(size))
    return 8 + size, header


def _positions(first: int, last: int) -> list[int]:
    if last - first <= _SAMPLES * _SAMPLE_BYTES:
        return list(range(first, last, _SAMPLE_BYTES))
    step = (last - first - _SAMPLE_BYTES) / (_SAMPLES - 1)
    return [first + int(i * step) for i in range(_SAMPLES)]
