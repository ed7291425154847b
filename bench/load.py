"""Load on a running server, as its clients see it: Poisson arrivals of streaming requests.

    invivo serve &
    python bench/load.py --rate 2 --requests 60
    python bench/load.py --trace ../shared/data/02-flexllm/traces_lengths_arrivals.csv.gz \
        --trace-name wildchat --trace-rate 0.5 --requests 100

Prompts are cuts of the
real text in prompts.txt with exactly the wanted number of tokens; answers are greedy and run to
their full length. Arrivals never wait for answers (open loop), so a server that is too slow shows
a growing time to first token rather than a smaller load.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

HERE = Path(__file__).parent
LENGTHS = "32:64,64:128,128:64,256:32,512:64"


@dataclass(slots=True)
class Job:
    """One request: when it arrives (seconds from the start) and how long it is."""

    arrival: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What a client saw of its request; times in seconds."""

    arrival: float
    prompt_tokens: int
    output_tokens: int = 0
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    late: float = 0.0  # how much later than planned the request was sent
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="name in the requests; default: the server's first")
    parser.add_argument("--key", help="bearer key")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second (Poisson)")
    parser.add_argument("--lengths", default=LENGTHS, help="prompt:output, drawn at random")
    parser.add_argument("--trace", type=Path, help="CSV with arrivals and lengths (may be .gz)")
    parser.add_argument("--trace-name", default="sharegpt")
    parser.add_argument("--trace-rate", type=float, default=0.5, help="target_req_per_s in it")
    parser.add_argument("--max-len", type=int, default=2048, help="cut prompt + output to this")
    parser.add_argument("--slo-ttft", type=float, default=1.0, help="seconds")
    parser.add_argument("--slo-tpot", type=float, default=0.1, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "load.json")
    args = parser.parse_args()

    if args.trace is not None:
        jobs = from_trace(args.trace, args.trace_name, args.trace_rate, args.requests)
    else:
        jobs = poisson(args.rate, args.lengths, args.requests, random.Random(args.seed))
    for job in jobs:
        job.prompt_tokens = max(1, min(job.prompt_tokens, args.max_len - 1))
        job.output_tokens = max(1, min(job.output_tokens, args.max_len - job.prompt_tokens))
    try:
        outcomes, seconds, model = asyncio.run(drive(args, jobs))
    except httpx.HTTPError as error:
        raise SystemExit(f"{args.url} does not answer as expected: {error}") from error
    summary = summarise(outcomes, seconds, args.slo_ttft, args.slo_tpot)
    print_table(summary)
    result = {
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "model": model,
        "summary": summary,
        "requests": [
            {k: v for k, v in asdict(outcome).items() if k != "gaps"} for outcome in outcomes
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")
    if summary["failed"]:
        raise SystemExit(
            f"{summary['failed']} requests failed, the first: {summary['first_error']}"
        )


def poisson(rate: float, lengths: str, n: int, rng: random.Random) -> list[Job]:
    """``n`` requests with exponential gaps of mean 1 / ``rate``."""
    choices = [tuple(map(int, pair.split(":"))) for pair in lengths.split(",")]
    jobs, at = [], 0.0
    for _ in range(n):
        prompt, output = rng.choice(choices)
        jobs.append(Job(at, prompt, output))
        at += rng.expovariate(rate)
    return jobs


def from_trace(path: Path, name: str, rate: float, n: int) -> list[Job]:
    """The first ``n`` requests of one trace, from its first arrival on."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        every = list(csv.DictReader(file))
    rows = [r for r in every if r["trace"] == name and float(r["target_req_per_s"]) == rate][:n]
    if not rows:
        known = sorted({(r["trace"], float(r["target_req_per_s"])) for r in every})
        raise SystemExit(f"no trace {name!r} at {rate} requests a second; known: {known}")
    start = float(rows[0]["arrival_s"])
    return [
        Job(float(r["arrival_s"]) - start, int(r["prompt_tokens"]), int(r["response_tokens"]))
        for r in rows
    ]


async def drive(args: argparse.Namespace, jobs: list[Job]) -> tuple[list[Outcome], float, str]:
    """Send every job at its time; the outcomes, the whole time and the model's name."""
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, timeout=600, limits=limits
    ) as client:
        model = args.model
        if model is None:
            listed = (await client.get("/v1/models")).raise_for_status().json()
            model = listed["data"][0]["id"]
        text = (HERE / "prompts.txt").read_text(encoding="utf-8")
        answer = await client.post("/tokenize", json={"model": model, "text": text})
        tokens: list[int] = answer.raise_for_status().json()["tokens"]
        rng = random.Random(args.seed + 1)
        start = time.perf_counter()
        tasks = []
        for job in jobs:
            await asyncio.sleep(max(0.0, start + job.arrival - time.perf_counter()))
            prompt = cut(tokens, job.prompt_tokens, rng)
            tasks.append(asyncio.create_task(ask(client, model, prompt, job, start)))
            print(f"\r{len(tasks)} of {len(jobs)} sent", end="", file=sys.stderr)
        outcomes = await asyncio.gather(*tasks)
        print(file=sys.stderr)
        return list(outcomes), time.perf_counter() - start, model


def cut(tokens: list[int], n: int, rng: random.Random) -> list[int]:
    """``n`` consecutive tokens from a random place of the text, which repeats at its end."""
    at = rng.randrange(len(tokens))
    rounds = (at + n) // len(tokens) + 1
    return (tokens * rounds)[at : at + n]


async def ask(
    client: httpx.AsyncClient, model: str, prompt: list[int], job: Job, start: float
) -> Outcome:
    """One streaming request, watched."""
    outcome = Outcome(job.arrival, job.prompt_tokens)
    begin = time.perf_counter()
    outcome.late = begin - start - job.arrival
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": job.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last = None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                outcome.error = (await response.aread()).decode(errors="replace")[:300]
                return outcome
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    outcome.error = json.dumps(event["error"])[:300]
                    return outcome
                if event.get("usage"):
                    outcome.output_tokens = event["usage"]["completion_tokens"]
                if not event.get("choices"):
                    continue
                now = time.perf_counter()
                if last is None:
                    outcome.ttft = now - begin
                else:
                    outcome.gaps.append(now - last)
                last = now
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    if last is None:
        outcome.error = "the stream had no tokens"
        return outcome
    outcome.e2e = last - begin
    if outcome.output_tokens > 1 and outcome.ttft is not None:
        outcome.tpot = (outcome.e2e - outcome.ttft) / (outcome.output_tokens - 1)
    return outcome


def summarise(
    outcomes: list[Outcome], seconds: float, slo_ttft: float, slo_tpot: float
) -> dict[str, object]:
    good = [o for o in outcomes if o.error is None]
    failed = [o for o in outcomes if o.error is not None]
    inside = sum(
        o.ttft is not None and o.ttft <= slo_ttft and (o.tpot or 0.0) <= slo_tpot for o in good
    )
    return {
        "requests": len(outcomes),
        "failed": len(failed),
        "first_error": failed[0].error if failed else None,
        "seconds": seconds,
        "output_tokens_per_s": sum(o.output_tokens for o in good) / seconds,
        "prompt_tokens_per_s": sum(o.prompt_tokens for o in good) / seconds,
        "requests_per_s": len(good) / seconds,
        "ttft": percentiles([o.ttft for o in good if o.ttft is not None]),
        "tpot": percentiles([o.tpot for o in good if o.tpot is not None]),
        "gap": percentiles([gap for o in good for gap in o.gaps]),
        "e2e": percentiles([o.e2e for o in good if o.e2e is not None]),
        "slo": {"ttft": slo_ttft, "tpot": slo_tpot, "attained": inside / max(1, len(outcomes))},
        "latest_send": max((o.late for o in outcomes), default=0.0),
    }


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Mean, p50, p95 and p99 (nearest rank); None for no values."""
    if not values:
        return None
    ranked = sorted(values)
    at = {p: ranked[min(len(ranked) - 1, int(p / 100 * len(ranked)))] for p in (50, 95, 99)}
    return {"mean": sum(ranked) / len(ranked)} | {f"p{p}": v for p, v in at.items()}


def print_table(summary: dict[str, object]) -> None:
    print(f"\n{'milliseconds':16}{'mean':>10}{'p50':>10}{'p95':>10}{'p99':>10}")
    names = {"ttft": "first token", "tpot": "each token", "gap": "between events", "e2e": "whole"}
    for key, name in names.items():
        row = summary[key]
        if isinstance(row, dict):
            print(f"{name:16}" + "".join(f"{1000 * row[k]:10.1f}" for k in row))
    slo = summary["slo"]
    assert isinstance(slo, dict)
    print(
        f"{summary['requests']} requests in {summary['seconds']:.1f} s, "
        f"{summary['failed']} failed; "
        f"{summary['output_tokens_per_s']:.1f} output tokens/s, "
        f"{summary['prompt_tokens_per_s']:.1f} prompt tokens/s\n"
        f"within {slo['ttft']} s to the first and {slo['tpot']} s a token: "
        f"{100 * slo['attained']:.1f} %"
    )


if __name__ == "__main__":
    main()
