"""``invivo chat`` fed from standard input, a line a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

GREEDY = ("-t", "0", "-n", "8")


def test_the_conversation_is_remembered_until_reset(
    invivo: Invivo, tiny: str, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"hello\nthe dog\n/save {saved}\n/reset\nhello\n/quit\nnever said\n"
    ran = invivo("chat", "-m", tiny, *GREEDY, stdin=lines)
    assert ran.code == 0
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    first = messages[1]["content"]
    assert ran.out == f"{first}\n{messages[3]['content']}\n{first}\n"


def test_the_second_answer_depends_on_the_first_turn(invivo: Invivo, tiny: str) -> None:
    fresh = invivo("chat", "-m", tiny, *GREEDY, stdin="the dog\n").out
    after = invivo("chat", "-m", tiny, *GREEDY, stdin="hello world you\nthe dog\n").out
    assert not after.endswith(fresh)


def test_system_adapter_and_parameters_change_the_answer(
    invivo: Invivo, tiny: str, adapter: str
) -> None:
    options = ("-m", tiny, *GREEDY, "-a", f"odd={adapter}")
    plain = invivo("chat", *options, stdin="hello\n").out
    assert invivo("chat", *options, stdin="/system you are red\nhello\n").out != plain
    assert invivo("chat", *options, stdin="/adapter odd\nhello\n").out != plain
    assert invivo("chat", *options, "--use", "odd", stdin="/adapter\nhello\n").out == plain
    short = invivo("chat", *options, stdin="/set max_tokens 1\nhello\n").out
    assert len(short) <= len(plain)


def test_here_and_over_http_the_same(invivo: Invivo, tiny: str, url: str) -> None:
    lines = "hello\nthe dog\n"
    here = invivo("chat", "-m", tiny, *GREEDY, stdin=lines)
    assert here.out == invivo("chat", "--url", url, *GREEDY, stdin=lines).out


def test_mistakes_are_explained_and_the_conversation_goes_on(invivo: Invivo, tiny: str) -> None:
    lines = "/dance\n/adapter none\n/set temperature -1\nhello\n/set temperature 0\nhello\n"
    ran = invivo("chat", "-m", tiny, *GREEDY, stdin=lines)
    assert "no command /dance" in ran.err
    assert "no adapter 'none'" in ran.err
    assert "temperature" in ran.err
    assert ran.out  # the last message was answered
    assert ran.code == 1
