"""A planted model as an ordinary checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from invivo.instruments.planted.truth import Case, Truth
from invivo.instruments.planted.words import Words
from invivo.models.decoder import Decoder
from invivo.models.save import save_model


@dataclass(slots=True)
class PlantedModel:
    """A decoder of the Llama family in float64, prompts, and what holds on them."""

    name: str
    decoder: Decoder
    words: Words
    cases: tuple[Case, ...]
    truth: Truth

    def save(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write a new folder in the Hub's format, with a tokenizer.

        Raises:
            Conflict: the folder exists and is not empty.
        """
        stored = Decoder(self.decoder.config, dtype=dtype)
        stored.load_state_dict(self.decoder.state_dict())
        target = save_model(stored, folder)
        self.words.save(target)
        return target
