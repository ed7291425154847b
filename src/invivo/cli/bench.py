"""``invivo bench``: latency and throughput of a model here or behind a URL."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli import options
from invivo.cli.output import examples, milliseconds, print_json, print_table, progress
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.lm import LM
    from invivo.timing import Summary, Timing

EXAMPLES = examples(
    "invivo bench",
    "invivo bench --concurrency 1,8,32 --prompt-tokens 512 --max-tokens 64",
    "invivo bench --url http://127.0.0.1:8000 --json",
)


def bench(
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Requests at once; several with commas.")
    ] = "1,8",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, help="Length of each prompt.")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=2, help="Length of each answer.")
    ] = 64,
    requests: Annotated[
        int | None,
        typer.Option("--requests", "-r", min=1, help="Requests a level (default: 2 rounds)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results as JSON.")] = False,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure time to first token (TTFT), time of each further token (TPOT) and tokens a second.

    The prompts are different cuts of real text, answered greedily and to their full length.
    """
    from invivo.cli.opening import opened

    levels = parse_levels(concurrency)
    with opened(model, url=url, key=key, device=device, dtype=dtype) as lm:
        info = lm.info()
        if prompt_tokens + max_tokens > info.max_model_len:
            raise InvalidRequest(
                f"together with --max-tokens over the model's {info.max_model_len}",
                field="--prompt-tokens",
                given=prompt_tokens,
            )
        rows = asyncio.run(measure(lm, levels, prompt_tokens, max_tokens, requests))
    if as_json:
        print_json(
            {
                "model": asdict(info),
                "prompt_tokens": prompt_tokens,
                "max_tokens": max_tokens,
                "levels": [{"concurrency": level, **asdict(row)} for level, row in rows],
            }
        )
        return
    print_table(
        f"{info.name}, {info.dtype} on {info.device}: "
        f"{prompt_tokens} prompt tokens, {max_tokens} new ones",
        ["at once>", "requests>", "TTFT p50>", "p95>", "TPOT p50>", "p95>", "tokens/s>"],
        [table_row(level, row) for level, row in rows],
    )


def parse_levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise InvalidRequest(
            "is not a list of positive numbers",
            field="--concurrency",
            given=text,
            remedy="Write 1,8,32",
        )
    return levels


def table_row(level: int, row: Summary) -> list[str]:
    return [
        str(level),
        str(row.requests),
        milliseconds(row.ttft_p50),
        milliseconds(row.ttft_p95),
        milliseconds(row.tpot_p50),
        milliseconds(row.tpot_p95),
        f"{row.tokens_per_second:.1f}",
    ]


def cuts(ids: list[int], length: int, count: int) -> list[list[int]]:
    """``count`` cuts of ``length`` tokens that begin at different places, so share no prefix."""
    ring = ids * (length // len(ids) + 2)
    step = max(1, len(ids) // count)
    return [ring[(i * step) % len(ids) :][:length] for i in range(count)]


async def measure(
    lm: LM, levels: list[int], prompt_tokens: int, max_tokens: int, requests: int | None
) -> list[tuple[int, Summary]]:
    """Each level in turn, after one short request that warms everything up."""
    from invivo.demo.passages import passages
    from invivo.timing import summarize, time_stream

    ids = lm.tokenize("\n\n".join(passages().values()))
    counts = [requests or 2 * level for level in levels]
    prompts = iter(cuts(ids, prompt_tokens, sum(counts) + 1))
    sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    await time_stream(lm.astream(next(prompts), max_tokens=2, **sampling))

    rows: list[tuple[int, Summary]] = []
    with progress("requests") as bar:
        shown = bar.add_task("measuring", total=sum(counts))
        for level, count in zip(levels, counts, strict=True):
            gate = asyncio.Semaphore(level)

            async def one(prompt: list[int], gate: asyncio.Semaphore = gate) -> Timing:
                async with gate:
                    stream = lm.astream(prompt, max_tokens=max_tokens, **sampling)
                    timing = await time_stream(stream)
                bar.advance(shown)
                return timing

            timings = await asyncio.gather(*[one(next(prompts)) for _ in range(count)])
            rows.append((level, summarize(timings)))
    return rows
