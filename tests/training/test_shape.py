"""The table [model] of a configuration: what makes a model, and what is refused by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.training.small_run import small

from invivo.errors import InvalidRequest, InvivoError, NotFound
from invivo.models.hub_config import FAMILIES
from invivo.training.run import train
from invivo.training.shape import shape_of

GLA: dict[str, Any] = {
    "model_type": "gla",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (GLA | {"num_head": 4}, "model.num_head"),
        (LLAMA | {"num_heads": 4}, "model.num_heads"),
        (GLA | {"num_heads": 3}, "model.num_heads"),
        (GLA | {"feature_map": "relu"}, "model.feature_map"),
        (GLA | {"hidden_size": "wide"}, "model"),
        (GLA | {"num_heads": 0}, "model"),
        (GLA | {"num_hidden_layers": 0}, "model"),
        (LLAMA | {"hidden_size": 0}, "model.hidden_size"),
        (LLAMA | {"rms_norm_eps": "small"}, "model"),
        (LLAMA | {"max_position_embeddings": 8}, "model.max_position_embeddings"),
        (LLAMA | {"vocab_size": 10}, "model.vocab_size"),
        ({"hidden_size": 32}, "model.model_type"),
    ],
)
def test_what_makes_no_model_is_refused_by_name(table: dict[str, Any], field: str) -> None:
    with pytest.raises(InvivoError) as error:
        shape_of(table, length=16, vocab_size=280, end=0)
    assert error.value.field == field


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_json_of_the_hub_is_taken_as_it_is(family: str) -> None:
    from transformers import AutoConfig

    written = AutoConfig.for_model(family).to_diff_dict()  # what stands in the file
    untrained = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
    given = {name: value for name, value in written.items() if name not in untrained}
    given.pop("router_aux_loss_coef", None)
    assert shape_of(given, length=16, vocab_size=100, end=0).family == family


@pytest.mark.parametrize(
    ("table", "field"),
    [
        (LLAMA | {"attention_dropout": 0.1}, "model.attention_dropout"),
        (
            LLAMA | {"model_type": "mixtral", "router_aux_loss_coef": 0.1},
            "model.router_aux_loss_coef",
        ),
    ],
)
def test_what_training_does_not_do_is_refused_and_not_ignored(
    table: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        shape_of(table, length=16, vocab_size=280, end=0)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.num_head=4", "model.num_head"),
        ("model.hidden_size=wide", "model.hidden_size"),
        ("model.hidden_size=0", "model.hidden_size"),
    ],
)
def test_nothing_is_prepared_for_what_makes_no_model(
    tmp_path: Path, override: str, field: str
) -> None:
    with pytest.raises(InvivoError) as error:
        train(small(tmp_path, override), runs=tmp_path / "runs")
    assert error.value.field == field
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as error:
        train(small(tmp_path), runs=tmp_path / "runs", device="tpu")
    assert error.value.field == "device"
    assert not (tmp_path / "runs").exists()


def test_prepared_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as error:
        train(small(tmp_path, f'data.prepared="{tmp_path}/none"'), runs=tmp_path / "runs")
    assert error.value.field == "data.prepared"
