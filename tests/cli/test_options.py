"""Reading what stands on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from invivo.cli import options
from invivo.errors import InvalidRequest


def test_sampling_fields_keep_only_what_was_given() -> None:
    assert options.sampling_fields(temperature=0.0, top_p=None, stop=[], seed=0) == {
        "temperature": 0.0,
        "seed": 0,
    }


def test_schema_is_read_from_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}', encoding="utf-8")
    assert options.read_schema(str(file)) == options.read_schema(' {"type": "object"}')


@pytest.mark.parametrize("text", ["{", "no-such-file.json"])
def test_unreadable_schema_names_the_option(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--json-schema"):
        options.read_schema(text)


def test_adapters_are_name_and_path() -> None:
    assert options.adapter_paths(["a=./x", "b=/y=z"]) == {"a": "./x", "b": "/y=z"}
    assert options.adapter_paths(None) == {}


@pytest.mark.parametrize("text", ["a", "a=", "=./x"])
def test_adapter_without_name_or_path_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="NAME=PATH"):
        options.adapter_paths([text])


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("3 mb", 3 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.parse_bytes(text, "--cache") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "two", "1e400", "nan", "5 mm"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--cache"):
        options.parse_bytes(text, "--cache")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        options.read_text(tmp_path / "none", "--file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        options.read_text(tmp_path / "binary", "--file")
