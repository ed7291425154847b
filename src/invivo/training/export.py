"""A trained model as a folder in the Hub's format, which ``invivo serve`` takes by its path."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from invivo.models.decoder import Decoder
from invivo.models.load import LoadedModel
from invivo.models.save import save_model


def export_model(
    decoder: Decoder, tokenizer: Path, dtype: torch.dtype, card: str, target: Path
) -> Path:
    """Write config, weights in ``dtype``, tokenizer and ``card``, in the place of ``target``.

    Args:
        tokenizer: folder with tokenizer.json.

    Raises:
        OSError: the disk is full or refuses; what was at ``target`` stays.
    """
    copy = Decoder(decoder.config, dtype=dtype)
    parameters = dict(decoder.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.data.copy_(parameters[name].detach())
    # What else a loaded model has takes no part in saving it.
    model = LoadedModel("", tokenizer, copy.config, copy, tokenizer=None, fingerprint="")
    draft = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        save_model(model, draft)
        (draft / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
