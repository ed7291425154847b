"""README and docs/ name only what there is: commands, options, files, headings, modules."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from invivo.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BY_NAME = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def fenced(document: Path, language: str) -> list[str]:
    return [body for given, body in FENCE.findall(document.read_text("utf-8")) if given == language]


def commands(document: Path) -> list[list[str]]:
    """The words behind ``invivo`` of every command in the document's blocks."""
    found = []
    for block in fenced(document, ""):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|; |\| ", line.split(" #")[0].split("  #")[0]):
                words = re.sub(r"^\s*(\$ )?", "", part)
                if words.startswith("invivo "):
                    found.append(shlex.split(words)[1:])
    return found


@BY_NAME
def test_commands_and_their_options_exist(document: Path) -> None:
    root: Any = typer.main.get_command(app)
    for words in commands(document):
        command, rest = root, list(words)
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in (*command.commands, "COMMAND"), f"invivo {' '.join(words)}"
            command = command.commands.get(rest.pop(0), command)
        known = {name for option in command.params for name in option.opts} | {"--help", "-h"}
        asked = {w.split("=")[0] for w in rest if re.match(r"-{1,2}[a-z]", w)}
        assert asked <= known, f"invivo {' '.join(words)}"


@BY_NAME
def test_python_can_be_parsed(document: Path) -> None:
    if document.name == "architecture.md":  # has signatures and no examples
        return
    for block in fenced(document, "python"):
        ast.parse(block)


def anchor(heading: str) -> str:
    """A heading's id as GitHub makes it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


@BY_NAME
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = FENCE.sub("", document.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), target


def test_every_document_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for document in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{document.name})" in text


def test_architecture_names_every_package_and_only_files_that_there_are() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    package = ROOT / "src" / "invivo"
    for folder in package.iterdir():
        if (folder / "__init__.py").is_file():
            assert f"`{folder.name}/`" in text, folder.name
    # A file is named by its path below any folder of the repository.
    files = [path.name for path in ROOT.iterdir()]
    for folder in ("bench", "configs", "docs", "scripts", "src", "tests"):
        files += [p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.*")]
    for name in set(re.findall(r"`([\w./]+\.(?:py|js|c|md|html|toml))(?:: [^`]*)?`", text)):
        assert any(("/" + file).endswith("/" + name) for file in files), name
