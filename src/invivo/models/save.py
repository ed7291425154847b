"""Writing models in the Hub's format, so that transformers and others load them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from invivo.models.decoder import Decoder
from invivo.models.folder import new_folder, write_json, write_weights
from invivo.models.hub_config import config_to_hf
from invivo.models.load import LoadedModel
from invivo.models.tensor_names import place_of, tensor_parts

# What belongs to a model besides config and weights; copied as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def save_model(model: LoadedModel | Decoder, folder: Path | str) -> Path:
    """Write ``model`` to a new folder: config.json, safetensors, and the tokenizer if it has one.

    Raises:
        Conflict: the folder exists and is not empty.
        UnsupportedModel: no class at the Hub can express the config.
    """
    decoder = model.decoder if isinstance(model, LoadedModel) else model
    target = Path(folder).expanduser()
    with new_folder(target) as draft:
        dtype = str(decoder.embed.dtype).removeprefix("torch.")
        write_json(draft / "config.json", config_to_hf(decoder.config) | {"dtype": dtype})
        parameters = dict(decoder.named_parameters())

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for part in tensor_parts(decoder.config):
                place = place_of(part, parameters)
                yield part.name, (place.T if part.transposed else place)

        write_weights(tensors(), draft)
        if isinstance(model, LoadedModel):
            for name in COMPANIONS:
                if (model.path / name).is_file():
                    shutil.copyfile(model.path / name, draft / name)
    return target
