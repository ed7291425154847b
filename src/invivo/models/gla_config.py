"""Gated linear attention models: their sizes, and flash-linear-attention's ``config.json``.

The fields are those of its ``GLAConfig`` (version 0.6). What this decoder does not compute is
refused: shared key heads, feature maps, clamped gates, other gate activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from invivo.errors import UnsupportedModel
from invivo.models.config import GLAConfig, LayerConfig, ModelConfig, RopeConfig

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "hidden_ratio": 4,
    "num_hidden_layers": 24,
    "num_heads": 4,
    "conv_size": 4,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32_000,
}
# Every one of these changes what is computed, and only the first value is.
_ONLY: dict[str, tuple[Any, ...]] = {
    "feature_map": (None,),
    "use_output_gate": (True, None),
    "clamp_min": (None,),
    "hidden_act": ("swish", None),
    "elementwise_affine": (True, None),
    "use_gk": (True, None),
    "use_gv": (False, None),
    "fuse_norm": (True, None),
    "attnres_block_size": (None, 1),
}
# Everything that is read or refused here.
GLA_FIELDS = {
    *_DEFAULTS,
    *_ONLY,
    *("model_type", "num_kv_heads", "intermediate_size", "use_short_conv"),
    *("tie_word_embeddings", "attn", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def gla_model(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int = 4,
    d_ff: int | None = None,
    expand_k: float = 0.5,
    expand_v: float = 1.0,
    conv_size: int = 0,
    max_positions: int = 2048,
    tie_embeddings: bool = False,
    attention_layers: tuple[int, ...] = (),
    attention_heads: int | None = None,
    attention_kv_heads: int | None = None,
    window: int | None = None,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-6,
) -> ModelConfig:
    """A GLA Transformer (arXiv 2312.06635, section 4.4), or a hybrid with attention.

    Args:
        d_ff: None = two thirds of ``4 d_model``, rounded up to a multiple of 256.
        expand_k, expand_v: width of all keys and all values, in multiples of ``d_model``.
        conv_size: tokens of the short convolution; 0 = none.
        attention_layers: layers with softmax attention, rotary embedding and ``window``.

    Raises:
        UnsupportedModel: the heads do not divide the widths.
    """
    k_width, v_width = int(d_model * expand_k), int(d_model * expand_v)
    heads = attention_heads or n_heads
    for width, n, name in ((k_width, n_heads, "num_heads"), (v_width, n_heads, "num_heads")):
        if width % n:
            raise UnsupportedModel(
                f"the heads must divide {width} channels", field=f"config.{name}", given=n
            )
    if attention_layers and d_model % heads:
        raise UnsupportedModel(
            f"the heads must divide {d_model}", field="config.attn.num_heads", given=heads
        )
    head_dim = d_model // heads
    return ModelConfig(
        family="gla",
        vocab_size=vocab_size,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=attention_kv_heads or heads,
        head_dim=head_dim,
        d_ff=d_ff or 256 * -(-int(d_model * 8 / 3) // 256),
        max_positions=max_positions,
        layers=tuple(
            LayerConfig(mixer="attention", window=window, rope=0)
            if i in attention_layers
            else LayerConfig(mixer="gla", rope=None)
            for i in range(n_layers)
        ),
        ropes=(RopeConfig(theta=rope_theta, rotary_dim=head_dim),) if attention_layers else (),
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
        gla=GLAConfig(
            n_heads=n_heads,
            head_k=k_width // n_heads,
            head_v=v_width // n_heads,
            conv_size=conv_size,
        ),
    )


def gla_340m(vocab_size: int = 32_000) -> ModelConfig:
    """The paper's smaller model: 341,707,776 parameters."""
    return gla_model(
        vocab_size=vocab_size, d_model=1024, n_layers=24, d_ff=2816, tie_embeddings=True
    )


def gla_1b3(vocab_size: int = 32_000) -> ModelConfig:
    """The paper's larger model: 1,365,514,240 parameters."""
    return gla_model(vocab_size=vocab_size, d_model=2048, n_layers=24, d_ff=5632)


def gla_from_hf(given: Mapping[str, Any]) -> ModelConfig:
    """Read a ``config.json`` with ``model_type`` "gla".

    Raises:
        UnsupportedModel: a setting that would change the computation in a way that is not
            implemented.
    """
    for key, allowed in _ONLY.items():
        _refuse(given, key, allowed)
    f = _DEFAULTS | {k: v for k, v in given.items() if v is not None}
    _refuse(given, "num_kv_heads", (None, f["num_heads"]))
    attention = given.get("attn") or {}
    if isinstance(attention, list):
        attention = attention[0] if len(attention) == 1 else {"kinds": attention}
    known = ("layers", "num_heads", "num_kv_heads", "window_size", "rope_theta")
    for key, value in attention.items():
        if key not in known and value not in (None, False):
            raise UnsupportedModel(
                "this setting of hybrid layers is not supported",
                field=f"config.attn.{key}",
                given=value,
            )
    d = int(f["hidden_size"])
    config = gla_model(
        vocab_size=int(f["vocab_size"]),
        d_model=d,
        n_layers=int(f["num_hidden_layers"]),
        n_heads=int(f["num_heads"]),
        d_ff=int(f.get("intermediate_size") or 256 * -(-int(d * f["hidden_ratio"] * 2 / 3) // 256)),
        expand_k=float(f["expand_k"]),
        expand_v=float(f["expand_v"]),
        conv_size=int(f["conv_size"]) if f.get("use_short_conv") else 0,
        max_positions=int(f["max_position_embeddings"]),
        tie_embeddings=bool(f.get("tie_word_embeddings")),
        attention_layers=tuple(attention.get("layers") or ()),
        attention_heads=attention.get("num_heads"),
        attention_kv_heads=attention.get("num_kv_heads"),
        window=attention.get("window_size"),
        rope_theta=float(attention.get("rope_theta") or 10_000.0),
        norm_eps=float(f["norm_eps"]),
    )
    eos = given.get("eos_token_id", _DEFAULTS["eos_token_id"])
    return replace(
        config,
        bos_token_id=given.get("bos_token_id", _DEFAULTS["bos_token_id"]),
        eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos or ()),
        pad_token_id=given.get("pad_token_id"),
        source=dict(given),
    )


def gla_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of ``GLAConfig`` that say what is computed."""
    gla = config.gla
    assert gla is not None
    layers = [i for i, layer in enumerate(config.layers) if layer.mixer == "attention"]
    attn = None
    if layers:
        attn = {
            "layers": layers,
            "num_heads": config.n_heads,
            "num_kv_heads": config.n_kv_heads,
            "qkv_bias": False,
            "window_size": config.layers[layers[0]].window,
            "rope_theta": config.ropes[0].theta,
        }
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_heads": gla.n_heads,
        "expand_k": gla.k_width / config.d_model,
        "expand_v": gla.v_width / config.d_model,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "norm_eps": config.norm_eps,
        "hidden_act": "swish",
        "use_short_conv": gla.conv_size > 0,
        "conv_size": gla.conv_size or _DEFAULTS["conv_size"],
        "attn": attn,
    }


def _refuse(given: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if key in given and given[key] not in allowed:
        raise UnsupportedModel(
            "this setting of gla is not supported",
            field=f"config.{key}",
            given=given[key],
            remedy=f"Supported: {allowed[0]!r}",
        )
