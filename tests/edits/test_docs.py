"""The users' page names everything there is, and its examples are programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from invivo.edits.builder import Builder
from invivo.edits.operations import MEASURES, OPERATIONS, REDUCTIONS
from invivo.edits.program import parse_program
from invivo.edits.selectors import KINDS
from invivo.edits.short import read_short
from invivo.edits.transformer_lens_names import SAME
from invivo.models.sites import SITES

PAGE = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "json"])
def test_json_examples_are_programs(text: str) -> None:
    program = parse_program(json.loads(text))
    assert program.steps or program.out


def test_the_python_example_is_the_first_json_example() -> None:
    scope: dict[str, object] = {}
    exec(next(text for kind, text in BLOCKS if kind == "python"), scope)
    built = scope["edit"]
    assert isinstance(built, Builder)
    first = parse_program(next(text for kind, text in BLOCKS if kind == "json"))
    expected = first.to_dict()
    assert built.build().to_dict() == expected


def test_the_command_line_examples_are_words() -> None:
    lines = next(text for kind, text in BLOCKS if not kind).strip().splitlines()
    assert len(read_short(lines, runs={"cf": "x"}).steps) == 3


@pytest.mark.parametrize(
    "names", [OPERATIONS, REDUCTIONS, MEASURES], ids=["do", "reduce", "measure"]
)
def test_everything_is_named(names: dict[str, object]) -> None:
    assert [name for name in names if f"`{name}`" not in PAGE] == []


def test_every_selector_site_and_alias_is_named() -> None:
    assert [kind for kind in KINDS if f'"{kind}"' not in PAGE] == []
    assert [name for name in SAME if f"`{name}`" not in PAGE] == []
    last_words = {site.name.split(".")[-1] for site in SITES}
    assert [word for word in last_words if not re.search(rf"\b{word}\b", PAGE)] == []
