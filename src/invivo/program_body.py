"""Programs and tensors as a client writes them for a server, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from invivo.errors import InvalidRequest
from invivo.program_result import Array


def program_body(program: Any) -> tuple[Any, dict[str, Array]]:
    """A program in any of its forms as JSON data or a hash, and the tensors that come with it.

    Raises:
        InvalidRequest: it is in none of these forms.
    """
    if isinstance(program, str | bytes):
        if isinstance(program, str) and program.startswith("sha256:"):
            return program, {}
        try:
            program = json.loads(program)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"this is no JSON: {error}", field="program") from None
    if isinstance(program, Mapping):
        return dict(program), {}
    build, blobs = getattr(program, "build", None), getattr(program, "blobs", None)
    if callable(build) and isinstance(blobs, Mapping):
        return build().to_dict(), {n: array_of(v, f"blobs.{n}") for n, v in blobs.items()}
    if callable(getattr(program, "to_dict", None)):
        return program.to_dict(), {}
    raise InvalidRequest(
        "this is no program",
        field="program",
        given=type(program).__name__,
        remedy="Give JSON data, a Program, what the builder gives, or the hash of a stored one",
    )


def program_of_job(
    program: Any, blobs: Mapping[str, Any], store: Callable[[Any], str]
) -> dict[str, Any]:
    """The hyperparameters ``program`` and ``blobs`` of a fine-tuning job.

    Args:
        blobs: tensors, arrays, lists or ids by the names in the program.
        store: keeps a tensor and gives its id.

    Raises:
        InvalidRequest: it is no program, or a value no tensor.
    """
    written, tensors = program_body(program)
    ids = {
        name: value.removeprefix("blob:") if isinstance(value, str) else store(value)
        for name, value in {**tensors, **blobs}.items()
    }
    return {"program": written, "blobs": ids}


def array_of(value: Any, field: str) -> Array:
    """A tensor, an array or nested lists (float32 then) as an array.

    Raises:
        InvalidRequest: it is none of these.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    try:
        array = np.asarray(value, dtype=None if hasattr(value, "dtype") else np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "fiub":
        raise InvalidRequest(
            "a tensor, an array or nested lists of numbers are needed",
            field=field,
            given=type(value).__name__,
        )
    return np.ascontiguousarray(array)


def write_arrays(arrays: Mapping[str, Array]) -> bytes:
    """A safetensors file."""
    return save(dict(arrays))


def read_arrays(data: bytes) -> dict[str, Array]:
    return load(data)
