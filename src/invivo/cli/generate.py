"""``invivo generate``: one prompt, or a file of them with a bar and resumable output."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli import options
from invivo.cli.jsonl import Record, answer_all, read_records, unanswered
from invivo.cli.output import examples, print_json
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.lm import LM, Completion

EXAMPLES = examples(
    "invivo generate 'The capital of France is' -n 8 -t 0",
    "invivo generate --chat 'Name three rivers.' --json",
    "cat essay.txt | invivo generate --file - -n 200",
    "invivo generate --choice yes --choice no --chat 'Is Paris in France?'",
    "invivo generate --input prompts.jsonl --output answers.jsonl -n 64",
    'A line of prompts.jsonl: {"id": 1, "prompt": "Once", "seed": 7} or {"messages": [...]}',
    "A second run skips the ids that answers.jsonl already answers.",
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file (- = stdin).")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", "-i", help="JSONL of prompts (- = stdin).")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL of answers, written as they come.")
    ] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="System message (with --chat).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole completion as JSON.")] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Lines of a batch at once.")
    ] = 32,
    n: Annotated[int, typer.Option("--samples", min=1, help="Samples of the prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Log-probabilities, and this many others.")
    ] = None,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    adapter: options.Adapters = None,
    use: Annotated[str | None, typer.Option("--use", help="Adapter to answer with.")] = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    choice: options.Choices = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Continue a text, or many from a JSONL file."""
    from invivo.cli.opening import opened

    sources = [name for name in (prompt, file, source) if name is not None]
    if len(sources) > 1:
        raise InvalidRequest("give one of PROMPT, --file and --input", field="PROMPT")
    if not sources:
        if sys.stdin.isatty():
            raise InvalidRequest(
                "nothing to continue", field="PROMPT", remedy="Give a text, --file or --input"
            )
        file = Path("-")
    fields = options.sampling_fields(
        temperature=temperature,
        max_tokens=max_tokens,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        json_schema=json_schema,
        regex=regex,
        choice=choice,
        adapter=use,
        logprobs=logprobs,
    )
    if n > 1:
        fields["n"] = n
    paths = options.adapter_paths(adapter)
    records = None
    if source is not None:
        records = [checked(record, as_chat, system) for record in read_records(source)]
        records = unanswered(records, target) if target is not None else records
    text = prompt if file is None else options.read_text(file, "--file")

    with opened(model, url=url, key=key, device=device, dtype=dtype, adapters=paths) as lm:
        if records is not None:
            if asyncio.run(run_batch(lm, records, fields, target, concurrency)):
                raise typer.Exit(1)
            return
        assert text is not None
        messages = wrap(text, system) if as_chat else None
        if as_json or n > 1:
            done = lm.chat(messages, **fields) if messages else lm.generate(text, **fields)
            show(done, as_json)
        else:
            stream_out(lm, text, messages, fields)


def wrap(text: str, system: str | None) -> list[dict[str, Any]]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def stream_out(
    lm: LM, text: str, messages: list[dict[str, Any]] | None, fields: dict[str, Any]
) -> None:
    """Write the text as it comes."""
    deltas = lm.stream_chat(messages, **fields) if messages else lm.stream(text, **fields)
    try:
        for delta in deltas:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    finally:
        deltas.close()
    sys.stdout.write("\n")


def show(done: Completion, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done))
        return
    for choice in done.choices:
        sys.stdout.write(f"[{choice.index}] {choice.text}\n")


def checked(record: Record, as_chat: bool, system: str | None) -> Record:
    """The record with exactly one of ``prompt`` and ``messages``."""
    where = f"--input id {record['id']}"
    if ("prompt" in record) == ("messages" in record):
        raise InvalidRequest("needs one of prompt and messages", field=where)
    if as_chat and isinstance(record.get("prompt"), str):
        return {**record, "messages": wrap(record["prompt"], system)} | {"prompt": None}
    return record


async def run_batch(
    lm: LM, records: list[Record], fields: dict[str, Any], target: Path | None, concurrency: int
) -> int:
    """Answer all records; returns how many failed."""

    async def answer(record: Record) -> Record:
        own = {k: v for k, v in record.items() if k not in ("id", "prompt", "messages")}
        messages = record.get("messages")
        if messages is not None:
            done = await lm.achat(messages, **{**fields, **own})
        else:
            done = await lm.agenerate(record["prompt"], **{**fields, **own})
        return {"text": done.text, "completion": asdict(done)}

    _, failed = await answer_all(records, answer, target, concurrency, "prompts")
    return failed
