"""The configurations that come with the project, and the users' page about them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from invivo.models.decoder import Decoder
from invivo.training.config import TrainConfig, read_config
from invivo.training.shape import shape_of

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
FOLDER = Path(__file__).parents[2] / "configs"
PARAMETERS = {
    "tiny-cpu": 783_616,
    "gla-small": 6_955_776,
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


def test_the_page_names_every_field() -> None:
    default = read_config(FOLDER / "tiny-cpu.toml")
    rows = re.findall(r"^\| (?:`(\w+)`)? *\| (.*?) \|", PAGE, re.MULTILINE)
    said: dict[str, set[str]] = {}
    table = ""
    for name, fields in rows:
        table = name or table
        said.setdefault(table, set()).update(re.findall(r"`(\w+)`", fields))
    for field in dataclasses.fields(TrainConfig):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            names = {f.name for f in dataclasses.fields(value)}
            if field.name == "data":
                names.discard("recall")  # named beside `kind`
            if field.name == "schedule":
                names.discard("decay")  # the same
            assert names <= said[field.name], names - said[field.name]


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(next(iter(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))))
    config = read_config(path)
    assert shape_of(config.model, length=512, vocab_size=4096, end=0).recurrent == tuple(range(6))
