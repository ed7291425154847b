"""The configurations that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from invivo.models.decoder import Decoder
from invivo.training.config import read_config
from invivo.training.shape import shape_of

FOLDER = Path(__file__).parents[2] / "configs"
PARAMETERS = {
    "tiny-cpu": 783_616,
    "gla-small": 6_730_816,
    "gla-30m": 29_994_496,
    "transformer-30m": 29_893_120,
    "gla-340m": 341_707_776,  # the paper's, with its tokenizer of 32,000
    "gla-1.3b": 1_365_514_240,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_as_stated(name: str) -> None:
    config = read_config(FOLDER / f"{name}.toml")
    assert config.name == name
    size = config.tokenizer.vocab_size or 32_000
    shape = shape_of(config.model, length=config.data.length, vocab_size=size, end=0)
    decoder = Decoder(shape, device="meta")
    assert sum(p.numel() for p in decoder.parameters()) == PARAMETERS[name]


def test_none_is_without_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(PARAMETERS)
