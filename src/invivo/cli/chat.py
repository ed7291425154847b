"""``invivo chat``: a conversation in the terminal, streamed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli import options
from invivo.cli.output import examples, fail, milliseconds, note
from invivo.errors import InvivoError

if TYPE_CHECKING:
    from invivo.lm import LM

EXAMPLES = examples(
    "invivo chat",
    "invivo chat -s 'You answer in one sentence.' -t 0.2",
    "invivo chat --url http://127.0.0.1:8000",
    "invivo chat -a pirate=./pirate        then /adapter pirate",
    "echo 'What is the capital of Japan?' | invivo chat",
)
COMMANDS = """\
/reset            forget the conversation (the system message stays)
/system TEXT      set the system message; alone: remove it
/adapter NAME     answer with an adapter; alone: with the base model
/adapters         list the loaded adapters
/set NAME VALUE   a sampling parameter, e.g. /set temperature 0.2
/save FILE        write the conversation as JSON
/help             this list
/quit             leave (also Ctrl-D; Ctrl-C stops an answer)"""


@dataclass(slots=True)
class Conversation:
    """What has been said, and how to answer next."""

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    adapter: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def messages(self) -> list[dict[str, Any]]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return opening + self.turns


def chat(
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    adapter: options.Adapters = None,
    use: Annotated[
        str | None, typer.Option("--use", help="Name of the adapter to begin with.")
    ] = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = 512,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Talk to a model; answers stream as they are made.

    Without a terminal each line of standard input is one message.
    """
    from invivo.cli.opening import opened

    conversation = Conversation(
        system=system,
        adapter=use,
        sampling=options.sampling_fields(
            temperature=temperature,
            max_tokens=max_tokens,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        ),
    )
    paths = options.adapter_paths(adapter)
    with opened(model, url=url, key=key, device=device, dtype=dtype, adapters=paths) as lm:
        interactive = sys.stdin.isatty()
        if interactive:
            note(f"{lm.info().name}. /help lists the commands, Ctrl-D leaves.")
        failed = False
        while (line := read_line(interactive)) is not None:
            try:
                if line.startswith("/"):
                    if not command(lm, conversation, line):
                        break
                elif line:
                    answer(lm, conversation, line, interactive)
            except InvivoError as error:
                failed = True
                fail(str(error))
        if failed and not interactive:
            raise typer.Exit(1)


def read_line(interactive: bool) -> str | None:
    """The next message without its line end; None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401  (gives input() editing and history)

    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def answer(lm: LM, conversation: Conversation, text: str, interactive: bool) -> None:
    """Stream one answer; Ctrl-C ends it and keeps what was said."""
    conversation.turns.append({"role": "user", "content": text})
    said, tokens, started, first = "", 0, time.perf_counter(), None
    stream = lm.stream_chat(
        conversation.messages(), adapter=conversation.adapter, **conversation.sampling
    )
    try:
        for delta in stream:
            if first is None and delta.tokens:
                first = time.perf_counter()
            tokens += len(delta.tokens)
            said += delta.text
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        note(" [stopped]")
    except InvivoError:
        conversation.turns.pop()
        raise
    finally:
        stream.close()
    sys.stdout.write("\n")
    sys.stdout.flush()
    conversation.turns.append({"role": "assistant", "content": said})
    if interactive and first is not None:
        spent = time.perf_counter() - first
        rate = f", {(tokens - 1) / spent:.1f} tokens/s" if tokens > 1 and spent > 0 else ""
        note(f"{tokens} tokens, first after {milliseconds(first - started)}{rate}")


def command(lm: LM, conversation: Conversation, line: str) -> bool:
    """Carry out a ``/command``; False ends the conversation."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    match name:
        case "quit" | "exit":
            return False
        case "help":
            note(COMMANDS)
        case "reset":
            conversation.turns.clear()
            note("forgotten")
        case "system":
            conversation.system = rest or None
            note("system message set" if rest else "system message removed")
        case "adapter":
            known = [a.name for a in lm.adapters()]
            if rest and rest not in known:
                fail(f"no adapter {rest!r}; loaded: {', '.join(known) or 'none'}")
            else:
                conversation.adapter = rest or None
                note(f"answering with {rest or 'the base model'}")
        case "adapters":
            note(", ".join(a.name for a in lm.adapters()) or "none loaded")
        case "set":
            set_parameter(conversation, rest)
        case "save":
            save(conversation, rest)
        case _:
            fail(f"no command /{name}; /help lists them")
    return True


def set_parameter(conversation: Conversation, text: str) -> None:
    """``temperature 0.2``: the value as JSON, or as text where it is not JSON."""
    name, _, value = text.partition(" ")
    if not name or not value:
        fail("write /set NAME VALUE, e.g. /set temperature 0.2")
        return
    try:
        conversation.sampling[name] = json.loads(value)
    except json.JSONDecodeError:
        conversation.sampling[name] = value
    note(", ".join(f"{k}={v}" for k, v in conversation.sampling.items()))


def save(conversation: Conversation, name: str) -> None:
    if not name:
        fail("write /save FILE")
        return
    text = json.dumps({"messages": conversation.messages()}, ensure_ascii=False, indent=2)
    try:
        Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        note(f"wrote {name}")
    except OSError as error:
        fail(f"cannot write {name}: {error.strerror}")
