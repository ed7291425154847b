"""Fine-tuning beside serving: what each policy trains and keeps, over the request rate.

    python bench/coserve.py                          # SmolLM2-135M on a CPU, seven minutes
    PYTHONPATH=src python bench/coserve.py --shape llama-8b   # random bf16 weights on a GPU, 4 min
    ... --resume                                     # only the points that --out has not yet
    python bench/coserve.py --shape tiny --device cpu         # a minute, to try the script

One engine, one LoRA job that never ends (rank 16 on the down projections, AdamW, random texts) and
the same arrivals for every policy, one after the other; policies change between points, so all use
the same learnt times. At rate 0 training has the device alone, in iterations of one token's promise
(co-serve) and in whole texts (temporal). Fine-tuning counts half a token for its forward and half
for its backward, while requests come. A request keeps the promise if its first token and its mean
time per further token are in time. --rounds repeats everything with other arrivals.

On a GPU the load begins as it would be after a long time (answers under way), and what is left at
its end is cut off; such a request is judged if it has 64 tokens. ``coserve_figure.py`` draws the
result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coserve_iterations import log_iterations
from coserve_load import Lengths, Point, RandomTexts, equilibrium, serve
from engine_gpu import LLAMA_8B
from invivo.engine.bypasses import BypassSpec
from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.job_spec import JobSpec
from invivo.engine.trace import Arrival, at_rate, drawn, read_trace
from invivo.models.hub_config import config_from_hf
from invivo.models.load import LoadedModel, load_model, random_model

HERE = Path(__file__).parent
POLICIES = ("co-serve", "temporal:64", "temporal:128", "temporal:512", "dynamic-temporal")
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A model's size, the promise, the load and the texts.

    Attributes:
        rates: requests a second.
        compared: policies and the rates at which they are run.
        seconds: of a point; ``warm`` before it, ``alone`` for fine-tuning without requests.
        texts: fewest and most tokens of a text.
        residence: seconds a token that answers under way at the start are expected to stay; 0
            starts with nothing.
    """

    tpot_ms: float
    ttft_ms: float
    rates: tuple[float, ...]
    compared: dict[str, tuple[float, ...]]
    seconds: float
    warm: float
    alone: float
    prompt: Lengths
    answer: Lengths
    texts: tuple[int, int]
    residence: float
    drain: bool
    engine: dict[str, Any] = field(default_factory=dict)


CPU_RATES = (1.0, 2.0, 3.0)
GPU_RATES = (4.0, 20.0, 12.0)
GPU_POLICIES = ("co-serve", "dynamic-temporal", "temporal:64", "temporal:128")
# ShareGPT's lengths in tokens have these log-normal moments; answers end at 768.
SHAREGPT = (Lengths(4.0, 1.7, 4, 3840), Lengths(5.2, 1.05, 4, 768))
SETTINGS = {
    "smollm2": Setting(
        tpot_ms=150.0,
        ttft_ms=5000.0,
        rates=CPU_RATES,
        compared=dict.fromkeys(POLICIES, CPU_RATES) | {"temporal:512": (2.0,), "none": (2.0,)},
        seconds=22.0,
        warm=0.0,
        alone=10.0,
        prompt=Lengths(3.5, 0.7, 8, 128),
        answer=Lengths(3.5, 0.5, 12, 64),
        texts=(1024, 1024),
        residence=0.0,
        drain=True,
        engine={"max_model_len": 2048},
    ),
    "llama-8b": Setting(
        tpot_ms=50.0,
        ttft_ms=5000.0,
        rates=GPU_RATES,
        compared=dict.fromkeys(GPU_POLICIES, GPU_RATES),
        seconds=9.0,
        warm=3.0,
        alone=4.0,
        prompt=SHAREGPT[0],
        answer=SHAREGPT[1],
        texts=(1024, 2048),
        residence=0.04,
        drain=False,
        engine={"max_model_len": 8192, "memory_fraction": 0.8, "max_running": 384, "burst": 2.5},
    ),
}
SETTINGS["tiny"] = Setting(
    tpot_ms=20.0,
    ttft_ms=1000.0,
    rates=GPU_RATES,
    compared=SETTINGS["llama-8b"].compared,
    seconds=3.0,
    warm=1.0,
    alone=2.0,
    prompt=SHAREGPT[0],
    answer=SHAREGPT[1],
    texts=(1024, 2048),
    residence=0.01,
    drain=False,
    engine={"max_model_len": 8192},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SETTINGS, default="smollm2")
    parser.add_argument("--device", help="default: cuda for llama-8b, cpu otherwise")
    parser.add_argument("--layers", type=int, help="fewer layers of a random model")
    parser.add_argument("--rates", help="comma-separated, only these")
    parser.add_argument("--policies", help="comma-separated, only these")
    parser.add_argument("--seconds", type=float, help="of a point")
    parser.add_argument("--burst", type=float, help="of the engine, see EngineConfig")
    parser.add_argument("--texts", type=int, help="tokens of every text")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--resume", action="store_true", help="keep the points of --out and run what is missing"
    )
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which none begins")
    parser.add_argument("--iterations", type=Path, help="a line for every iteration goes there")
    parser.add_argument("--trace", type=Path, help="arrivals and lengths instead of drawn ones")
    parser.add_argument("--trace-name")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="default: bench/results/coserve-cpu or -h200.json")
    args = parser.parse_args()
    begun = time.monotonic()
    on_gpu = args.shape == "llama-8b"
    device = args.device or ("cuda" if on_gpu else "cpu")
    out = args.out or HERE / "results" / f"coserve-{'h200' if on_gpu else 'cpu'}.json"
    torch.set_num_threads(args.threads)
    sys.path.remove(str(HERE.resolve()))  # transformers would take kernels.py for a library
    setting = SETTINGS[args.shape]
    if args.burst is not None:
        setting = replace(setting, engine=setting.engine | {"burst": args.burst})
    if args.texts is not None:
        setting = replace(setting, texts=(args.texts, args.texts))
    seconds = args.seconds or setting.seconds
    kept = points_of(out, setting) if args.resume and out.exists() else []
    done = {(point["round"], point["policy"], point["rate"]) for point in kept}
    wanted = [point for point in points(args, setting) if point not in done]
    if not wanted:
        print(f"{out} has everything")
        return
    engine = open_engine(args.shape, device, args.layers, setting)
    print(f"engine ready after {time.monotonic() - begun:.1f} s", flush=True)
    trace = read_trace(args.trace, name=args.trace_name) if args.trace else None
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shape": args.shape,
        "setting": asdict(setting),
        "points": kept,
        "failed": [],
    }
    spec = JobSpec("bench", (BypassSpec("lora", ("down",), 16, alpha=32.0),), 10**9)
    texts = RandomTexts(engine.model.config.vocab_size, *setting.texts)
    events: list[dict[str, Any]] = []
    if args.iterations is not None:
        log_iterations(engine, args.iterations)
    engine.finetune(spec, texts, events.append)
    warm_up(engine, setting, events)
    print(f"first texts learnt after {time.monotonic() - begun:.1f} s", flush=True)
    for number, policy, rate in wanted:
        if time.monotonic() - begun > args.limit:
            result["failed"].append([policy, rate, "no time left"])
            continue
        try:
            engine.set_policy(policy)
            point = serve(
                engine,
                load(setting, rate, seconds, trace, number) if rate else [],
                policy=policy,
                rate=rate,
                seconds=seconds if rate else setting.alone,
                tpot=setting.tpot_ms / 1e3,
                ttft=setting.ttft_ms / 1e3,
                drain=setting.drain,
                number=number,
            )
            result["points"].append(asdict(point))
            print(line(point), flush=True)
        except Exception:
            result["failed"].append([policy, rate, traceback.format_exc()])
            print(f"{policy} at {rate}: {traceback.format_exc()}", flush=True)
        result["wall_s"] = time.monotonic() - begun
        result["events"] = [e for e in events if e["event"] not in ("step", "started")][:20]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out} after {time.monotonic() - begun:.1f} s")
    engine.close()


def open_engine(shape: str, device: str, layers: int | None, setting: Setting) -> Engine:
    if shape == "smollm2":
        model = load_model("smollm2-135m", device=device, dtype=torch.float32)
    else:
        raw = dict(TINY if shape == "tiny" else LLAMA_8B)
        if layers is not None:
            raw["num_hidden_layers"] = layers
        config = config_from_hf(raw)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        decoder = random_model(config, device=device, dtype=dtype)
        model = LoadedModel(shape, Path(), config, decoder, tokenizer=None, fingerprint="")
    return Engine(
        model,
        EngineConfig(tpot_ms=setting.tpot_ms, ttft_ms=setting.ttft_ms, **setting.engine),
    )


def points(args: argparse.Namespace, setting: Setting) -> Iterator[tuple[int, str, float]]:
    """(round, policy, rate) of all points; rate 0 is fine-tuning alone."""
    rates = setting.rates if args.rates is None else tuple(map(float, args.rates.split(",")))
    chosen = list(setting.compared) if args.policies is None else args.policies.split(",")
    for number in range(args.rounds):
        yield number, "co-serve", 0.0
        yield number, "temporal:64", 0.0  # whole texts: no iteration ends early for an arrival
        for rate in rates:
            for policy in chosen:
                if args.policies is not None or rate in setting.compared[policy]:
                    yield number, policy, rate


def points_of(path: Path, setting: Setting) -> list[dict[str, Any]]:
    """What an earlier call has measured.

    Raises:
        SystemExit: with another setting.
    """
    earlier = json.loads(path.read_text())
    if earlier["setting"] != json.loads(json.dumps(asdict(setting))):
        raise SystemExit(f"{path} was measured with another setting")
    points: list[dict[str, Any]] = earlier["points"]
    return points


def load(
    setting: Setting, rate: float, seconds: float, trace: list[Arrival] | None, number: int
) -> list[Arrival]:
    """Arrivals until ``seconds``, the same for every policy; those before 0 warm up."""
    warm = setting.warm
    if trace is not None:
        found = at_rate(trace, rate, warm + seconds)
    else:
        rng = random.Random(number)
        lengths = [(setting.prompt.draw(rng), setting.answer.draw(rng)) for _ in range(997)]
        found = drawn(rate, warm + seconds, lengths, seed=number)
    coming = [Arrival(a.at - warm, a.prompt, a.response) for a in found]
    if not setting.residence:
        return coming
    under_way = equilibrium(
        rate, setting.prompt, setting.answer, setting.residence, -warm, seed=number
    )
    return under_way + coming


def warm_up(engine: Engine, setting: Setting, events: list[dict[str, Any]]) -> None:
    """Two texts, then some requests beside training."""
    while sum(event["event"] == "step" for event in events) < 2:
        engine.step()
        if any(event["event"] == "failed" for event in events):
            raise SystemExit(f"the job has failed: {events[-1]}")
    arrivals = load(setting, max(setting.rates), 2.0, None, 99)
    serve(
        engine,
        [Arrival(0.0, a.prompt, min(a.response, 48)) for a in arrivals[:16]],
        policy="warm-up",
        rate=0.0,
        seconds=1.0,
        tpot=1.0,
        ttft=1.0,
        drain=True,
    )


def line(point: Point) -> str:
    kept = "" if point.in_slo is None else f"{100 * point.in_slo:5.1f} % of {point.judged} in SLO"
    times = ""
    if point.tpot:
        tpot, ttft = (
            " / ".join(f"{1e3 * t:.0f}" for t in values) for values in (point.tpot, point.ttft)
        )
        times = f"  TPOT {tpot} ms, TTFT {ttft} ms"
    return (
        f"{point.rate:4g}/s  {point.policy:17}{point.finetune:8.1f} tok/s trained, "
        f"{point.inference:7.1f} answered  {kept}{times}  "
        f"real / predicted {point.prediction}, restarts {point.restarts}"
    )


def processor() -> str:
    for entry in Path("/proc/cpuinfo").read_text().splitlines():
        if entry.startswith("model name"):
            return f"{entry.split(':', 1)[1].strip()}, {os.cpu_count()} processors"
    return platform.processor()


if __name__ == "__main__":
    main()
