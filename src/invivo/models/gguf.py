"""Reading GGUF files: metadata and dequantised tensors, through the ``gguf`` library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invivo.errors import MissingDependency, UnsupportedModel

# Storage types that are tested here; the library may know more, and then they are read too.
TESTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")


@dataclass(slots=True)
class GGUFTensor:
    """One tensor of a file, still as stored.

    Attributes:
        shape: in PyTorch's order, outermost dimension first.
        type: storage type by name ("F16", "Q4_K").
        data: the stored bytes or numbers, a memory-mapped numpy array of ``shape[0]`` rows.
        type_code: the library's number of ``type``.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: Any
    type_code: int

    def read(self, index: int | None = None) -> torch.Tensor:
        """The values in float32; with ``index`` only that slice of the first dimension."""
        from gguf.quants import dequantize

        data = self.data if index is None else self.data[index]
        shape = self.shape if index is None else self.shape[1:]
        try:
            values = dequantize(data, self.type_code)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"tensor {self.name} is stored in a type that cannot be read",
                field="gguf",
                given=self.type,
                remedy=f"Known: {', '.join(TESTED_TYPES)}",
            ) from error
        return torch.tensor(values, dtype=torch.float32).view(shape)


@dataclass(slots=True)
class GGUFFile:
    """A parsed file: ``metadata`` as plain Python values, ``tensors`` by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))


def read_gguf(path: Path) -> GGUFFile:
    """Parse a GGUF file; tensor data stays on disk until it is read.

    Raises:
        MissingDependency: the ``gguf`` library is not installed.
        UnsupportedModel: the file is not a readable GGUF.
    """
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError as error:
        raise MissingDependency(
            "reading GGUF files needs the gguf library", remedy="pip install gguf"
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {
            name: _value(field, GGUFValueType)
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = {
            t.name: GGUFTensor(
                name=t.name,
                shape=tuple(int(n) for n in reversed(t.shape.tolist())),
                type=t.tensor_type.name,
                data=t.data,
                type_code=t.tensor_type,
            )
            for t in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise UnsupportedModel(
            f"this is not a readable GGUF file: {error}", field="model", given=str(path)
        ) from error
    return GGUFFile(path, metadata, tensors)


def _value(field: Any, types: Any) -> Any:
    """A metadata field as a Python value; the library keeps slices of the mapped file."""

    def one(index: int) -> Any:
        part = field.parts[index]
        return str(bytes(part), "utf-8") if is_text else part[0].item()

    is_text = bool(field.types) and field.types[-1] == types.STRING
    if field.types and field.types[0] == types.ARRAY:
        return [one(i) for i in field.data]
    return one(field.data[0])
