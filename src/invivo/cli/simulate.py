"""``invivo simulate``: policies of sharing a device between serving and fine-tuning, compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invivo.cli.output import examples, note, print_json, print_table
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.engine.latency import Sample
    from invivo.engine.simulate import Result
    from invivo.engine.trace import Arrival

EXAMPLES = examples(
    "invivo simulate",
    "invivo simulate --rates 4,12,20 --policies co-serve,temporal:64,temporal:128 -o sweep.png",
    "invivo simulate --trace traces.csv.gz --trace-name sharegpt --seconds 120 --json",
)

# Lengths of prompts and answers where no trace gives them: about those of chat logs.
LENGTHS = ((20, 40), (30, 150), (60, 250), (120, 300), (300, 350), (900, 450))


def simulate(
    policies: Annotated[
        str, typer.Option("--policies", "-p", help="Policies to compare, with commas.")
    ] = "co-serve,temporal:64,temporal:128,dynamic-temporal,spatial,separate",
    rates: Annotated[
        str, typer.Option("--rates", "-r", help="Requests a second, with commas.")
    ] = "4,8,12,16,20",
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="How long requests come, after the warm-up.")
    ] = 30.0,
    warm: Annotated[
        float,
        typer.Option(
            "--warm", min=0, help="Seconds of requests before tokens count: an empty machine lies."
        ),
    ] = 10.0,
    tpot_ms: Annotated[
        float, typer.Option("--tpot-ms", help="Promised time of each further token.")
    ] = 50.0,
    ttft_ms: Annotated[
        float, typer.Option("--ttft-ms", help="Promised time to the first token.")
    ] = 5000.0,
    length: Annotated[
        int, typer.Option("--length", min=2, help="Tokens of a fine-tuning text.")
    ] = 2048,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="CSV of arrivals and lengths; without it they are drawn."),
    ] = None,
    trace_name: Annotated[
        str | None, typer.Option("--trace-name", help="Which trace of the file.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option("--burstiness", help="Drawn arrivals: 1 is Poisson, more is Gamma.")
    ] = 1.0,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="CSV of step times; without it 8B on an H200."),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of the model.")] = 32,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, help="Requests that run at once.")
    ] = 256,
    max_batch_tokens: Annotated[
        int, typer.Option("--max-batch-tokens", min=2, help="Rows of an iteration.")
    ] = 2048,
    burst: Annotated[
        float,
        typer.Option(
            "--burst", min=1, help="As of the server: --tpot-ms between two tokens at most."
        ),
    ] = 2.5,
    seed: Annotated[int, typer.Option("--seed", help="Of drawn arrivals.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Figure to write (.png, .svg or .html).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results as JSON.")] = False,
) -> None:
    """Fine-tuning tokens a second and promises kept, over the request rate, for each policy.

    The scheduler and the policies are the engine's own; only the time of an iteration comes from
    measured step times, so no model and no GPU is needed.
    """
    from dataclasses import asdict

    from invivo.engine import simulate as simulator
    from invivo.engine.coserve import Sizes
    from invivo.engine.policies import Slo, policy_of

    chosen = [policy_of(text.strip()) for text in policies.split(",")]
    slo = Slo(tpot_ms=tpot_ms, ttft_ms=ttft_ms, burst=burst)
    limits = simulator.simulated_limits(max_batch_tokens=max_batch_tokens, max_running=max_running)
    results = []
    for rate in positive_numbers(rates, "--rates"):
        arrivals = _arrivals(rate, warm + seconds, trace, trace_name, burstiness, seed)
        for policy in chosen:
            result = simulator.simulate(
                arrivals,
                policy,
                _profile(profile),
                slo=slo,
                limits=limits,
                training=simulator.Training(length, layers),
                sizes=Sizes(quantum_ms=tpot_ms * burst),
                warm=warm,
            )
            results.append(result)
    if out is not None:
        from invivo.cli.simulate_figure import write_figure

        write_figure(results, out, slo)
        note(f"figure: {out}")
    if as_json:
        print_json([asdict(result) for result in results])
        return
    _table(results)


def positive_numbers(text: str, field: str) -> list[float]:
    """``4,8.5`` as numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        raise InvalidRequest("positive numbers with commas", field=field, given=text)
    return numbers


def _arrivals(
    rate: float,
    seconds: float,
    trace: Path | None,
    name: str | None,
    burstiness: float,
    seed: int,
) -> list[Arrival]:
    from invivo.engine.trace import at_rate, drawn, read_trace

    if trace is not None:
        return at_rate(read_trace(trace, name=name), rate, seconds)
    if not burstiness > 0:
        raise InvalidRequest("must be positive", field="--burstiness", given=burstiness)
    return drawn(rate, seconds, LENGTHS, burstiness=burstiness, seed=seed)


def _profile(path: Path | None) -> list[Sample]:
    from invivo.engine.profiles import h200_8b, read_profile

    return h200_8b() if path is None else read_profile(path)


def _table(results: list[Result]) -> None:
    columns = (
        "policy",
        "req/s>",
        "in SLO>",
        "trained/s>",
        "out/s>",
        "TTFT ms>",
        "TPOT ms>",
    )
    rows = [
        (
            r.policy,
            f"{r.rate:.3g}",
            f"{r.in_slo:.1%}",
            f"{r.finetune:,.0f} {r.finetune / r.alone:4.0%}",
            f"{r.inference:,.0f}",
            f"{r.ttft[1] * 1e3:,.0f}",
            f"{r.tpot[1] * 1e3:.1f}",
        )
        for r in results
    ]
    print_table("", columns, rows)
    note("trained: % of fine-tuning alone; TTFT, TPOT: 99th percentile")
