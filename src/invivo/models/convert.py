"""From a GGUF file to an ordinary folder in the Hub's format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from invivo.models.folder import new_folder, write_json, write_weights
from invivo.models.gguf import GGUFFile, read_gguf
from invivo.models.gguf_names import hub_config, hub_tensor
from invivo.models.gguf_tokenizer import tokenizer_from_gguf
from invivo.models.hub_config import config_from_hf, config_to_hf
from invivo.models.tensor_names import tensor_parts

# Raise when a conversion would come out differently, so that cached ones are made again.
CONVERTER = 1

# Above this many parameters dequantised weights are stored in bfloat16 instead of float32.
_EXACT_BELOW = 1_000_000_000

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, 0 to 1."""


def convert_gguf(source: Path, target: Path, *, progress: Progress | None = None) -> Path:
    """Write the model of a GGUF file to the new folder ``target``.

    Weights are dequantised: exactly, in float32, for models below 10^9 parameters; files that
    hold F16 or BF16 matrices keep that type.

    Raises:
        UnsupportedModel: architecture, tokenizer or tensors cannot be read.
        Conflict: ``target`` exists.
    """
    file = read_gguf(source)
    config = config_from_hf(hub_config(file))
    parts = tensor_parts(config)
    dtype = _storage(file)
    tokenizer, tokenizer_config = tokenizer_from_gguf(file.metadata)
    with new_folder(target) as draft:
        written = config_to_hf(config) | {"dtype": str(dtype).removeprefix("torch.")}
        write_json(draft / "config.json", written)
        ends = dict.fromkeys(
            file.metadata[key]
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if key in file.metadata
        )
        generation = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(ends),
            "pad_token_id": config.pad_token_id,
        }
        write_json(
            draft / "generation_config.json",
            {key: value for key, value in generation.items() if value not in (None, [])},
        )
        tokenizer.save(str(draft / "tokenizer.json"))
        write_json(draft / "tokenizer_config.json", tokenizer_config)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for i, part in enumerate(parts):
                if progress is not None:
                    progress("converting", i / len(parts))
                yield part.name, hub_tensor(file, config, part).to(dtype)

        write_weights(tensors(), draft)
        write_json(
            draft / "conversion.json",
            {"converter": CONVERTER, "source": source.name, "bytes": source.stat().st_size},
        )
    if progress is not None:
        progress("converting", 1.0)
    return target


def _storage(file: GGUFFile) -> torch.dtype:
    matrices = [t for t in file.tensors.values() if len(t.shape) > 1]
    types = {t.type for t in matrices}
    if types == {"F16"}:
        return torch.float16
    if types == {"BF16"}:
        return torch.bfloat16
    n_parameters = sum(torch.Size(t.shape).numel() for t in matrices)
    exact = types == {"F32"} or n_parameters < _EXACT_BELOW
    return torch.float32 if exact else torch.bfloat16
