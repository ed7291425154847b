"""``invivo score``: how probable a text is to a model; perplexity and bits per byte."""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invivo.cli import options
from invivo.cli.jsonl import Record, answer_all, read_records, unanswered
from invivo.cli.output import examples, note, print_json, progress, stdout
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.lm import LM, Token

EXAMPLES = examples(
    "invivo score 'The cat sat on the mat.'",
    "invivo score --file book.txt     long texts go in overlapping windows",
    "invivo score 'Paris.' --context 'The capital of France is ' --json",
    "invivo score --tokens 'Colourless green ideas sleep furiously.'",
    "invivo score --input pairs.jsonl --output scores.jsonl",
    'A line of pairs.jsonl: {"id": "a", "context": "2 + 2 =", "text": " 4"}, or no context',
)


@dataclass(slots=True)
class Reading:
    """A text's probability under a model: natural-log sum over ``tokens`` scored tokens."""

    tokens: int
    bytes: int
    logprob: float
    greedy: bool

    @property
    def perplexity(self) -> float:
        return math.exp(-self.logprob / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return -self.logprob / math.log(2) / self.bytes if self.bytes else math.nan

    def record(self) -> Record:
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "logprob": self.logprob,
            "greedy": self.greedy,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def score(
    text: Annotated[str | None, typer.Argument(help="Text to score.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the text from a file (- = stdin).")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", "-i", help="JSONL of texts (- = stdin).")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL of scores, written as they come.")
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", help="What stands before; not scored itself.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=2, help="Tokens of a window of a long text.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option("--overlap", min=1, help="Tokens a window sees of the last one.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show each token's surprise.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Lines of a batch at once.")
    ] = 32,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    adapter: options.Adapters = None,
    use: Annotated[str | None, typer.Option("--use", help="Adapter to score with.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Score a text: log-probability, perplexity, bits per byte.

    The first token of a text is not scored: nothing precedes it (unless there is a context).
    """
    from invivo.cli.opening import opened

    if len([given for given in (text, file, source) if given is not None]) > 1:
        raise InvalidRequest("give one of TEXT, --file and --input", field="TEXT")
    if text is None and file is None and source is None:
        if sys.stdin.isatty():
            raise InvalidRequest(
                "nothing to score", field="TEXT", remedy="Give a text, --file or --input"
            )
        file = Path("-")
    paths = options.adapter_paths(adapter)
    records = None
    if source is not None:
        records = [checked(record) for record in read_records(source)]
        records = unanswered(records, target) if target is not None else records
    whole = text if file is None else options.read_text(file, "--file")

    with opened(model, url=url, key=key, device=device, dtype=dtype, adapters=paths) as lm:
        if records is not None:
            if asyncio.run(run_batch(lm, records, use, target, concurrency)):
                raise typer.Exit(1)
            return
        assert whole is not None
        if context is not None:
            done = lm.score((context, whole), adapter=use)
            scored, count = done.tokens, continued_bytes(context, whole)
        else:
            scored, count = score_long(lm, whole, use, window, overlap)
        reading = Reading(
            tokens=len(scored),
            bytes=count,
            logprob=math.fsum(t.logprob for t in scored),
            greedy=all(t.rank == 1 for t in scored),
        )
        if as_json:
            listed = [{"id": t.id, "text": t.text, "logprob": t.logprob} for t in scored]
            print_json(reading.record() | ({"token_list": listed} if tokens else {}))
        else:
            if tokens:
                show_tokens(scored)
            show(reading)


def checked(record: Record) -> Record:
    if not isinstance(record.get("text"), str):
        raise InvalidRequest("needs a text", field=f"--input id {record['id']}")
    return record


async def run_batch(
    lm: LM, records: list[Record], adapter: str | None, target: Path | None, concurrency: int
) -> int:
    """Score all records; a summary over those that succeeded goes to standard error."""

    async def answer(record: Record) -> Record:
        text, context = record["text"], record.get("context")
        if context is None:
            ids = await asyncio.to_thread(lm.tokenize, text, special=True)
            first = await asyncio.to_thread(lm.detokenize, ids[:1])
            done, count = await lm.ascore(ids, adapter=adapter), scored_bytes(text, first)
        else:
            done = await lm.ascore((context, text), adapter=adapter)
            count = continued_bytes(context, text)
        return Reading(len(done.tokens), count, done.logprob, done.greedy).record()

    answers, failed = await answer_all(records, answer, target, concurrency, "texts")
    good = [a for a in answers if "error" not in a]
    if good:
        total = Reading(
            tokens=sum(a["tokens"] for a in good),
            bytes=sum(a["bytes"] for a in good),
            logprob=math.fsum(a["logprob"] for a in good),
            greedy=all(a["greedy"] for a in good),
        )
        note(
            f"{len(good)} texts, {total.tokens} tokens: perplexity {total.perplexity:.3f}, "
            f"{total.bits_per_byte:.4f} bits per byte"
        )
    return failed


def score_long(
    lm: LM, text: str, adapter: str | None, window: int | None, overlap: int | None
) -> tuple[list[Token], int]:
    """Scored tokens of a text of any length, and how many bytes of it they are.

    A text over the window goes in several: each repeats ``overlap`` tokens of the one before as
    context, and every token is scored once.
    """
    limit = lm.info().max_model_len
    size = min(window or limit, limit)
    shared = size // 4 if overlap is None else overlap
    if shared >= size:
        raise InvalidRequest(
            f"must be under the window of {size} tokens", field="--overlap", given=overlap
        )
    ids = lm.tokenize(text, special=True)
    if len(ids) < 2:
        raise InvalidRequest(
            "has fewer than two tokens, so there is nothing to score",
            field="TEXT",
            given=text,
            remedy="Give --context, or a longer text",
        )
    count = scored_bytes(text, lm.detokenize(ids[:1]))
    scored: list[Token] = []
    done = 1
    with progress("tokens") as bar:
        shown = bar.add_task("scoring", total=len(ids), completed=1, visible=len(ids) > size)
        while done < len(ids):
            start = max(0, done - shared) if done > 1 else 0
            stop = min(len(ids), start + size)
            part = lm.score(ids[start:stop], adapter=adapter).tokens
            scored += part[len(part) - (stop - done) :]
            done = stop
            bar.update(shown, completed=done)
    return scored, count


def scored_bytes(text: str, first: str) -> int:
    """Bytes of the text without its first token, which nothing predicts.

    ``first`` is that token's text; an opening token that the tokenizer adds is not in the text,
    then all of the text is scored.
    """
    size = len(text.encode())
    return size - len(first.encode()) if first and text.startswith(first) else size


def continued_bytes(context: str, text: str) -> int:
    """Bytes scored of a text after a context, whose last blanks count to the text."""
    return len(text.encode()) + len(context) - len(context.rstrip())


def show(reading: Reading) -> None:
    rows = [
        ("tokens scored", str(reading.tokens)),
        ("log-probability", f"{reading.logprob:.4f}"),
        ("perplexity", f"{reading.perplexity:.4f}"),
        ("bits per byte", f"{reading.bits_per_byte:.4f}"),
        ("greedy", "yes" if reading.greedy else "no"),
    ]
    for name, value in rows:
        sys.stdout.write(f"{name:<16} {value:>14}\n")


def show_tokens(scored: list[Token]) -> None:
    """The text with each token's colour from green (expected) to red (surprising).

    Without a terminal, which has no colours: a line for each token, its log-probability before it.
    """
    from rich.text import Text

    if not stdout().is_terminal:
        for token in scored:
            sys.stdout.write(f"{token.logprob:10.4f}  {token.text!r}\n")
        return
    line = Text()
    for token in scored:
        surprise = min(-token.logprob / math.log(2) / 16, 1.0)
        red, green = int(90 + 165 * surprise), int(220 - 150 * surprise)
        line.append(token.text, style=f"rgb({red},{green},90)")
    stdout().print(line, soft_wrap=True)
    note("green: expected, red: surprising (16 bits and more)")
