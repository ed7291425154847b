"""config.json of transformers 4 and 5 becomes one ModelConfig, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import FAMILIES as TINY
from tests.tiny import tiny_hf_model
from transformers import AutoConfig

from invivo.errors import UnsupportedModel
from invivo.models.config import LayerConfig, ModelConfig, MoEConfig, RopeConfig
from invivo.models.hub_config import FAMILIES, config_from_hf, config_to_hf


def hub(family: str, **changes: Any) -> dict[str, Any]:
    return tiny_hf_model(family).config.to_dict() | changes


def test_all_supported_families_have_a_tiny_model() -> None:
    assert set(FAMILIES) == set(TINY)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_reads_back_and_suits_transformers(family: str) -> None:
    config = config_from_hf(hub(family))
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    theirs = AutoConfig.for_model(**{k: v for k, v in written.items() if k != "architectures"})
    assert config_from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_config_without_its_source_can_be_written(family: str) -> None:
    config = config_from_hf(hub(family))
    assert config_from_hf(config_to_hf(replace(config, source={}))) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_left_out_take_the_familys_defaults(family: str) -> None:
    """The defaults are those of transformers' classes: every optional field, one at a time."""
    given_all = hub(family)
    reference = type(tiny_hf_model(family).config)
    shape = ("hidden_size", "n_embd", "model_type", "vocab_size", "num_attention_heads", "n_head")
    skip = (*shape, "num_hidden_layers", "n_layer", "intermediate_size", "rope_parameters")
    for key in given_all:
        if key in skip:
            continue
        less = {k: v for k, v in given_all.items() if k != key}
        try:
            theirs = reference(**less).to_dict()
        except (ValueError, TypeError):
            continue
        assert config_from_hf(less) == config_from_hf(theirs), key


LLAMA_4X = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def test_llama_of_transformers_4() -> None:
    config = config_from_hf(LLAMA_4X)
    assert config.head_dim == 128
    assert config.eos_token_ids == (128_001, 128_008, 128_009)
    assert config.ropes[0].theta == 500_000.0
    assert dict(config.ropes[0].scaling or ())["rope_type"] == "llama3"
    assert dict(config.ropes[0].scaling or ())["factor"] == 8.0


def test_older_name_of_the_scaling_kind() -> None:
    config = config_from_hf(LLAMA_4X | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.ropes[0].scaling == (("factor", 2.0), ("rope_type", "linear"))


def test_gemma3_of_transformers_4_inside_a_multimodal_config() -> None:
    config = config_from_hf(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262_208
    assert config.tie_embeddings
    assert config.eos_token_ids == (1, 106)
    assert [layer.window for layer in config.layers[:7]] == [1024] * 5 + [None, 1024]
    local, full = config.ropes
    assert (local.theta, local.scaling) == (1e4, None)
    assert (full.theta, full.scaling) == (1e6, (("factor", 8.0), ("rope_type", "linear")))
    assert config.layers[0].rope == 0
    assert config.layers[5].rope == 1


def test_gemma3_sliding_window_pattern_of_transformers_4() -> None:
    base = {k: v for k, v in hub("gemma3_text").items() if k not in ("layer_types",)}
    base.pop("_sliding_window_pattern", None)
    config = config_from_hf(base | {"sliding_window_pattern": 2})
    assert [layer.window is None for layer in config.layers] == [False, True, False, True]


def test_gemma2_alternates_from_a_sliding_layer() -> None:
    base = {k: v for k, v in hub("gemma2").items() if k != "layer_types"}
    assert [layer.window for layer in config_from_hf(base).layers] == [6, None, 6]


def test_qwen2_windows_only_from_max_window_layers_on() -> None:
    base = {k: v for k, v in hub("qwen2").items() if k != "layer_types"}
    assert [layer.window for layer in config_from_hf(base).layers] == [None, None, 6, 6]
    off = config_from_hf(base | {"use_sliding_window": False})
    assert all(layer.window is None for layer in off.layers)


def test_phi3_older_names_of_longrope() -> None:
    scaling = {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    base = {k: v for k, v in hub("phi3").items() if k != "rope_parameters"}
    rope = config_from_hf(base | {"rope_scaling": scaling, "rope_theta": 1e4}).ropes[0]
    assert dict(rope.scaling or ())["rope_type"] == "longrope"
    assert dict(rope.scaling or ())["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "Supported: gemma2, gemma3_text, gpt2, llama"),
        ({"model_type": None}, "unknown architecture"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "Supported: default"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks factor"),
        ({"hidden_size": None}, "config.hidden_size"),
        ({"hidden_act": "mish"}, "unknown activation"),
        ({"num_attention_heads": 0}, "config.num_attention_heads: must be a whole number"),
        ({"num_key_value_heads": -1}, "config.num_key_value_heads: must be a whole number"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        config_from_hf(hub("llama") | changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}),
    ],
)
def test_settings_that_would_be_ignored_are_refused(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        config_from_hf(hub(family) | changes)


def test_a_model_that_the_family_cannot_express_is_not_written() -> None:
    config = replace(config_from_hf(hub("llama")), qk_norm="head")
    with pytest.raises(UnsupportedModel, match=r"config\.qk_norm"):
        config_to_hf(config)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    family = draw(st.sampled_from(["llama", "qwen3", "gemma3_text", "mixtral", "qwen3_moe"]))
    n_layers = draw(st.integers(1, 5))
    n_kv = draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 16))
    gemma, sparse = family == "gemma3_text", family in ("mixtral", "qwen3_moe")
    factor = draw(st.none() | st.floats(1.0, 8.0))
    scaling = None if factor is None else (("factor", factor), ("rope_type", "linear"))
    rope = RopeConfig(draw(st.sampled_from([1e4, 5e5])), head_dim, scaling)
    window = draw(st.none() | st.integers(1, 64)) if family != "llama" else None
    alternates = family in ("qwen3", "gemma3_text")
    sliding = [not alternates or draw(st.booleans()) for _ in range(n_layers)]
    if not any(sliding):
        window = None
    d_ff = 8 * draw(st.integers(1, 9))
    moe = None
    if sparse:
        moe = MoEConfig(
            n_experts=4,
            top_k=draw(st.integers(1, 4)),
            d_expert=d_ff if family == "mixtral" else 8,
            normalize_weights=family == "mixtral" or draw(st.booleans()),
        )
    plain = [family == "qwen3_moe" and draw(st.booleans()) for _ in range(n_layers)]
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(1, 1000)),
        d_model=4 * draw(st.integers(1, 9)),
        n_heads=n_kv * draw(st.integers(1, 4)),
        n_kv_heads=n_kv,
        head_dim=head_dim,
        d_ff=d_ff,
        max_positions=draw(st.integers(1, 9999)),
        layers=tuple(
            LayerConfig(
                window=window if sliding[i] else None,
                rope=int(not (window and sliding[i])) if gemma else 0,
                feedforward="moe" if sparse and not plain[i] else "mlp",
            )
            for i in range(n_layers)
        ),
        ropes=(RopeConfig(1e4, head_dim), rope) if gemma else (rope,),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        norm_unit_offset=gemma,
        post_norm=gemma,
        qk_norm="none" if family in ("llama", "mixtral") else "head",
        activation="gelu_tanh" if gemma else draw(st.sampled_from(["silu", "gelu", "relu"])),
        attn_scale=draw(st.integers(1, 512)) ** -0.5 if gemma else None,
        logit_softcap=draw(st.none() | st.floats(1, 50)) if gemma else None,
        embed_scale=None,
        tie_embeddings=draw(st.booleans()),
        moe=moe,
        bos_token_id=draw(st.none() | st.integers(0, 99)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=3, unique=True))),
        pad_token_id=None,
    )


@given(configs())
@settings(max_examples=200, deadline=None)
def test_any_config_survives_the_way_to_the_hub_and_back(config: ModelConfig) -> None:
    if config.family == "gemma3_text":
        config = replace(config, embed_scale=config.d_model**0.5)
    assert config_from_hf(config_to_hf(config)) == config
