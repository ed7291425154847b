"""Configurations of runs: what is read, what is refused, and by which name."""

from __future__ import annotations

from pathlib import Path

import pytest

from invivo.errors import InvalidRequest, NotFound
from invivo.training.config import Source, TrainConfig, read_config
from invivo.training.typed_tables import flat

SMALL = """
name = "small"
model = { model_type = "llama", hidden_size = 32 }

[data]
length = 64
[[data.sources]]
path = "books"

[tokenizer]
vocab_size = 300

[train]
steps = 10
"""


def written(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_with_defaults_and_paths_beside_it(tmp_path: Path) -> None:
    config = read_config(written(tmp_path))
    assert isinstance(config, TrainConfig)
    assert config.data.sources == (Source(path=str(tmp_path / "books")),)
    assert config.model == {"model_type": "llama", "hidden_size": 32}
    assert (config.train.steps, config.train.batch, config.optimizer.betas) == (10, 32, (0.9, 0.95))


def test_overrides_are_toml_or_bare_words(tmp_path: Path) -> None:
    overrides = [
        "train.steps=20",
        "optimizer.learning_rate=1",
        "schedule.kind=wsd",
        'name="other"',
        "optimizer.betas=[0.8, 0.9]",
        "model.tie_word_embeddings=true",
    ]
    config = read_config(written(tmp_path), overrides)
    assert (config.train.steps, config.schedule.kind, config.name) == (20, "wsd", "other")
    assert config.optimizer.learning_rate == 1.0
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model["tie_word_embeddings"] is True


def test_a_value_is_forgotten(tmp_path: Path) -> None:
    config = read_config(written(tmp_path), ["train.steps=", "train.epochs=2", "init.std="])
    assert (config.train.steps, config.train.epochs, config.init.std) == (None, 2.0, 0.02)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.stepps=3", "train.stepps"),
        ("train.steps=0", "train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.epochs=2", "train.steps"),
        ("train.micro_batch=5", "train.micro_batch"),
        ("train.clip=-1", "train.clip"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas[1]"),
        ("schedule.kind=linear", "schedule.kind"),
        ("schedule.final=2", "schedule.final"),
        ("data.sources=[]", "data.sources"),
        ("data.sources=[{}]", "data.sources[0]"),
        ("data.length=1", "data.length"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size"),
        ("tokenizer.name=other", "tokenizer"),
        ("name=a/b", "name"),
        ("name=..", "name"),
        ("train=3", "train"),
        ("train.precision.kind=3", "train.precision"),
        ("steps", "set"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(tmp_path: Path, override: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read_config(written(tmp_path), [override])
    assert error.value.field == field


def test_a_slip_of_the_pen_is_answered_with_the_name_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Did you mean learning_rate"):
        read_config(written(tmp_path), ["optimizer.learning_rates=1e-3"])


def test_files_that_are_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_config(tmp_path / "none.toml")
    with pytest.raises(InvalidRequest, match="is not TOML"):
        read_config(written(tmp_path, "name = "))
    with pytest.raises(InvalidRequest) as error:
        read_config(written(tmp_path, "[data]"))
    assert error.value.field == "name"


def test_flat_names_every_value() -> None:
    assert flat({"a": {"b": {"c": 1}}, "d": [1, {"e": 2}]}) == {"a.b.c": 1, "d": [1, {"e": 2}]}
