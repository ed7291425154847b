"""The sizes of the model that a configuration asks for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from invivo.errors import InvalidRequest, UnsupportedModel
from invivo.models.config import ModelConfig
from invivo.models.gla_config import GLA_FIELDS
from invivo.models.hub_config import config_from_hf

# What a Hub's config.json also has: nothing of it changes what is computed here.
_WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("attn_mode", "fuse_cross_entropy", "fuse_swiglu", "initializer_range", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
    # Read beside others alone, for a window or longer texts.
    *("_sliding_window_pattern", "layer_types", "max_window_layers"),
    "original_max_position_embeddings",
}


def check_shape(model: Mapping[str, Any], *, length: int, tensor: int = 1) -> None:
    """Refuse what can be refused before there is a tokenizer.

    Args:
        tensor: processes that share every layer.

    Raises:
        as :func:`shape_of` and :func:`check_divisible`.
    """
    config = shape_of(model, length=length, vocab_size=1, end=0)
    if tensor > 1:
        check_divisible(config, tensor)


def check_divisible(config: ModelConfig, processes: int) -> None:
    """Refuse a decoder that so many processes cannot share.

    Raises:
        InvalidRequest: its heads, neurons or width cannot be divided.
        UnsupportedModel: mixtures of experts, norms over all heads at once.
    """
    if config.moe is not None or config.qk_norm == "full":
        what = "a mixture of experts" if config.moe is not None else "a norm over all heads"
        raise UnsupportedModel(
            f"tensor parallelism is not made for {what}",
            field="parallel.tensor",
            given=processes,
            remedy="Set parallel.tensor = 1: the parameters are sharded all the same",
        )
    sizes = {"intermediate_size": config.d_ff, "hidden_size": config.d_model}
    if any(layer.mixer == "attention" for layer in config.layers):
        sizes |= {"num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads}
    if config.gla is not None:
        sizes["num_heads"] = config.gla.n_heads
    for name, size in sizes.items():
        if size % processes:
            raise InvalidRequest(
                f"does not divide the model's {name}, {size}",
                field="parallel.tensor",
                given=processes,
            )


def shape_of(model: Mapping[str, Any], *, length: int, vocab_size: int, end: int) -> ModelConfig:
    """The table ``[model]`` completed by what tokenizer and data say.

    Args:
        length: tokens of a row; the largest position unless the table has one.
        vocab_size: of the tokenizer; the table may have a larger one, for rounder matrices.
        end: token that ends a text; also the begin token, since a text follows the end of another.

    Raises:
        InvalidRequest: a value is unknown or has no meaning, rows are longer than the positions,
            or the vocabulary is too small.
        UnsupportedModel: the table is no model of ours.
    """
    positions = "n_positions" if model.get("model_type") == "gpt2" else "max_position_embeddings"
    given = _Read({"vocab_size": vocab_size, positions: length} | dict(model))
    given |= {"eos_token_id": end, "bos_token_id": end, "pad_token_id": None}
    try:
        config = config_from_hf(given)
    except UnsupportedModel as error:
        name = (error.field or "model").replace("config.", "model.", 1)
        raise UnsupportedModel(
            error.message, field=name, given=error.given, remedy=error.remedy
        ) from error
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        raise InvalidRequest(f"makes no model: {error}", field="model", given=model) from error
    _check_known(model, given.read | (GLA_FIELDS if config.family == "gla" else set()))
    sizes = (config.d_model, config.d_ff, config.n_layers, config.n_heads, config.head_dim)
    if min(sizes) < 1:
        raise InvalidRequest("every size must be at least 1", field="model", given=model)
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


class _Read(dict[str, Any]):
    """Remembers which of its values were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _check_known(model: Mapping[str, Any], known: set[str]) -> None:
    """What is switched off (dropout 0.0) need not be known."""
    for name, value in model.items():
        if value and name not in known and name not in _WITHOUT_EFFECT:
            close = difflib.get_close_matches(name, known, n=1)
            raise InvalidRequest(
                f"is not known of {model['model_type']} models",
                field=f"model.{name}",
                given=value,
                remedy=f"Did you mean {close[0]}?" if close else "Leave it out",
            )
