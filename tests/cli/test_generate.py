"""``invivo generate`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo


def test_the_text_streams_and_equals_the_json_answer(invivo: Invivo, tiny: str) -> None:
    streamed = invivo("generate", "the cat", "-m", tiny, "-n", "12", "-t", "0")
    whole = invivo("generate", "the cat", "-m", tiny, "-n", "12", "-t", "0", "--json").json()
    assert streamed.code == 0
    assert streamed.out == whole["choices"][0]["text"] + "\n"
    assert whole["completion_tokens"] == len(whole["choices"][0]["tokens"])


def test_the_prompt_comes_from_argument_file_or_standard_input(
    invivo: Invivo, tiny: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompt"
    file.write_text("you and", encoding="utf-8")
    rest = ("-m", tiny, "-n", "6", "-t", "0")
    answers = {
        invivo("generate", "you and", *rest).out,
        invivo("generate", "--file", str(file), *rest).out,
        invivo("generate", *rest, stdin="you and").out,
    }
    assert len(answers) == 1


def test_here_and_over_http_the_same(invivo: Invivo, tiny: str, url: str) -> None:
    arguments = ("generate", "--chat", "hello", "-n", "10", "--seed", "4")
    assert invivo(*arguments, "-m", tiny).out == invivo(*arguments, "--url", url).out


def test_an_adapter_is_loaded_and_used(invivo: Invivo, tiny: str, adapter: str) -> None:
    base = ("generate", "hello", "-m", tiny, "-n", "10", "-t", "0", "-a", f"odd={adapter}")
    assert invivo(*base).out != invivo(*base, "--use", "odd").out


def test_several_samples_are_numbered(invivo: Invivo, tiny: str) -> None:
    ran = invivo("generate", "red", "-m", tiny, "-n", "2", "--samples", "3", "--regex", "[a-z]{2}")
    assert [line[:3] for line in ran.out.splitlines()] == ["[0]", "[1]", "[2]"]


def test_choice_and_schema_hold_the_output(invivo: Invivo, tiny: str, tmp_path: Path) -> None:
    ran = invivo("generate", "--chat", "x", "-m", tiny, "--choice", "yes", "--choice", "no")
    assert ran.out.strip() in ("yes", "no")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", "b"]}', encoding="utf-8")
    assert json.loads(invivo("generate", "x", "-m", tiny, "--json-schema", str(schema)).out) in "ab"


def test_a_batch_is_answered_resumed_and_equals_single_calls(
    invivo: Invivo, tiny: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = {1: "the cat", 2: "hello world", "third": "not red"}
    lines = [json.dumps({"id": i, "prompt": text}) for i, text in prompts.items()]
    source.write_text("\n".join([*lines, '{"id": 4, "messages": []}']), encoding="utf-8")
    command = ("generate", "-i", str(source), "-o", str(target), "-m", tiny, "-n", "5", "-t", "0")

    first = invivo(*command)
    assert first.code == 1  # the conversation without messages failed, the rest did not
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    answers = {line["id"]: line["text"] for line in written if "error" not in line}
    assert set(answers) == set(prompts)
    for i, text in prompts.items():
        alone = invivo("generate", text, "-m", tiny, "-n", "5", "-t", "0").out
        assert answers[i] + "\n" == alone

    source.write_text("\n".join([*lines, '{"id": 4, "prompt": "dog"}']), encoding="utf-8")
    second = invivo(*command)
    assert second.code == 0
    assert "3 of 4 answered already" in second.err
    ids = [json.loads(line)["id"] for line in target.read_text(encoding="utf-8").splitlines()]
    assert sorted(map(str, ids)) == ["1", "2", "4", "third"]


def test_lines_may_set_their_own_sampling(invivo: Invivo, tiny: str) -> None:
    lines = '{"prompt": "a", "max_tokens": 2, "ignore_eos": true}\n{"prompt": "b", "sing": 1}\n'
    ran = invivo("generate", "-i", "-", "-m", tiny, stdin=lines)
    good, bad = sorted(ran.lines(), key=lambda line: int(line["id"]))
    assert len(good["completion"]["choices"][0]["tokens"]) == 2
    assert "sing" in bad["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "--file", "b"], "one of PROMPT"),
        (["a", "--url", "http://127.0.0.1:1", "--device", "cpu"], "--device"),
        (["a", "--json-schema", "{"], "--json-schema"),
        (["a", "-a", "nothing"], "NAME=PATH"),
    ],
)
def test_contradictions_are_usage_errors(invivo: Invivo, arguments: list[str], text: str) -> None:
    ran = invivo("generate", *arguments)
    assert ran.code == 2
    assert text in ran.err


def test_bad_parameters_are_explained(invivo: Invivo, tiny: str) -> None:
    ran = invivo("generate", "a", "-m", tiny, "-t", "-1")
    assert ran.code == 2
    assert "temperature" in ran.err


def test_a_server_that_is_not_there_is_an_error_of_one_line(invivo: Invivo) -> None:
    ran = invivo("generate", "a", "--url", "http://127.0.0.1:9")
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
