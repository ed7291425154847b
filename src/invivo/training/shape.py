"""The sizes of the model that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig
from invivo.models.hub_config import config_from_hf


def shape_of(model: Mapping[str, Any], *, length: int, vocab_size: int, end: int) -> ModelConfig:
    """The table ``[model]`` completed by what tokenizer and data say.

    Args:
        length: tokens of a row; the largest position unless the table has one.
        vocab_size: of the tokenizer; the table may have a larger one, for rounder matrices.
        end: token that ends a text; also the begin token, since a text follows the end of another.

    Raises:
        InvalidRequest: rows are longer than the positions, or the vocabulary is too small.
        UnsupportedModel: the table is no model of ours.
    """
    positions = "n_positions" if model.get("model_type") == "gpt2" else "max_position_embeddings"
    given = {"vocab_size": vocab_size, positions: length} | dict(model)
    given |= {"eos_token_id": end, "bos_token_id": end, "pad_token_id": None}
    config = config_from_hf(given)
    if config.vocab_size < vocab_size:
        raise InvalidRequest(
            f"is smaller than the tokenizer's vocabulary, {vocab_size}",
            field="model.vocab_size",
            given=config.vocab_size,
            remedy="Leave it out",
        )
    if config.max_positions < length:
        raise InvalidRequest(
            f"is smaller than data.length, {length}",
            field=f"model.{positions}",
            given=config.max_positions,
            remedy="Leave it out",
        )
    return config
