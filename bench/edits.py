"""What looking into a model and changing it costs on a CPU, beside TransformerLens.

    python bench/edits.py --peer-python PATH [--rounds 3] [--peer-heads 6] [--passive]
    python bench/edits.py --peer-python PATH --parts peers --jobs capture --threads 1 --out FILE

PATH is the interpreter of an environment that has transformer-lens. SmolLM2-135M, float32, each
engine in a process of its own (``edits_worker.py``), rounds interleaved, so that both see the same
machine; ratios are medians over rounds of the ratio within a round.

- capture: every residual stream of 32 prompts of 24 tokens of real text, as a user of either side
  asks for them. TransformerLens computes the logits of all tokens whether they are wanted or not
  (27 % more multiplications); invivo computes what is asked for, and here no logits are.
- capture lean: the same with TransformerLens told to unembed no more than it must, one token a
  prompt. capture both: the same with the logits of all tokens given out by both sides.
- patch last, patch all: activation patching of every head (30 layers of 9) on 32 pairs of prompts,
  at the last token or at all tokens, to a difference of two logits. The peer is a plain loop: one
  batch of the 32 prompts for each head, with a hook. It is timed on a few heads, whose time is
  multiplied; at all tokens both sides are timed on fewer pairs, named in the result. The numbers of
  both sides are compared.
- touched rows: steps of 64 decoding rows, of which none, one (a vector added behind a layer; four
  layers touched) or all (a vector added) carry a program. Engines of one process take steps in
  turn, another one first each time; the ratio is that of the lower quartiles.
- resolve: a program of 20 steps, resolved anew and found again.

Beside seconds stand those of the CPU. With one thread their ratio hardly depends on who else uses
the machine; with more, threads that spin while they wait count as well.

The floor of a pass is its multiplications at the measured speed of a matrix product. For a sweep
that shares everything before its changes it is half of the layers of a row for each head, and the
unembedding of a row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine import HERE, count_weights, measure_matmul, processor

TOKENS, PAIRS, FEWER = 24, 32, 2
UNEMBED = {"capture": "default", "capture lean": "none", "capture both": "all"}
BARS = {"capture": 1.5, "patch last": 5.0}
TOUCHED = {"one": 1.05, "one, 4 layers": 1.05, "all": 1.03}
Ask = Callable[[dict[str, Any]], dict[str, Any]]
Seconds = dict[str, dict[str, list[float]]]  # by job and side, a number a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peer-python")
    parser.add_argument("--parts", default="peers,touched,resolve", help="others stay as they are")
    parser.add_argument("--jobs", default="capture,patch", help="of the peers: what is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-heads", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24, help="of 64 decoding rows, each kind")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--passive", action="store_true", help="threads sleep: for busy machines")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "edits-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.passive:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # of the workers; this process has begun
    if str(HERE.resolve()) in sys.path:
        sys.path.remove(str(HERE.resolve()))  # transformers would take kernels.py for a library

    from invivo.models.hub_config import config_from_hf
    from invivo.models.resolve import resolve

    folder = resolve(args.model)
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    shape = (config.n_layers, config.n_heads)
    prompts = read_prompts(folder)
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {
        "device": processor(),
        "python": platform.python_version(),
        "model": args.model,
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "peers": partial(beside_peer, args, folder, prompts, shape),
        "touched": partial(touched, folder, prompts, args.steps),
        "resolve": partial(resolving, folder),
    }
    for name in args.parts.split(","):
        result[name] = parts[name]() | {
            "command": " ".join(sys.argv),
            "time": time.strftime("%Y-%m-%d %H:%M"),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def beside_peer(
    args: argparse.Namespace, folder: Path, prompts: list[list[int]], shape: tuple[int, int]
) -> dict[str, Any]:
    """Capturing and patching, both sides in turn."""
    pairs = [[a, b] for a, b in zip(prompts, prompts[1:] + prompts[:1], strict=True)]
    start = {"model": str(folder), "threads": args.threads, "layers": shape[0]}
    ours, about = worker("invivo", sys.executable, start)
    peer, peer_about = worker("transformer_lens", args.peer_python, start)
    for ask in (ours, peer):  # touch every path once before anything is timed
        ask({"job": "capture", "prompts": prompts, "unembed": "all"})
    flops = measure_matmul()
    layers, head = count_weights(folder)
    seconds: Seconds = {}
    cpu_seconds: Seconds = {}
    agreement: dict[str, float] = {}
    for number in range(args.rounds):
        for what, mine, other, scale in jobs(prompts, pairs, shape, args.peer_heads, number):
            if what.split()[0] not in args.jobs.split(","):
                continue
            a, b = ours(mine), peer(other)
            for kind, found in (("seconds", seconds), ("cpu_seconds", cpu_seconds)):
                entry = found.setdefault(what, {"invivo": [], "transformer_lens": []})
                entry["invivo"].append(a[kind])
                entry["transformer_lens"].append(b[kind] * scale)
            far = differ(what, a["numbers"], b["numbers"], mine, other)
            agreement[what] = max(far, agreement.get(what, 0.0))
            told = f"{a['seconds']:.2f} s, {b['seconds'] * scale:.2f} s"
            cpu = f"of the CPU {a['cpu_seconds']:.2f} s, {b['cpu_seconds'] * scale:.2f} s"
            print(f"round {number + 1}, {what}: {told}; {cpu}", flush=True)
    for ask in (ours, peer):
        ask({})
    floors = floors_of(layers, head, shape, flops)
    ratios, cpu_ratios = ratios_of(seconds), ratios_of(cpu_seconds)
    heads = f"{'seconds':14}{'floor':>9}{'invivo':>9}{'peer':>9}{'ratio':>8}{'of CPU s':>10}"
    print(f"\n{heads}  largest difference")
    for what, s in seconds.items():
        own, theirs = (statistics.median(s[name]) for name in ("invivo", "transformer_lens"))
        print(
            f"{what:14}{floors[what]:9.2f}{own:9.2f}{theirs:9.2f}{ratios[what]:7.2f}x"
            f"{cpu_ratios[what]:9.2f}x  {agreement[what]:.1e}"
            + (f"   at least {BARS[what]}x: {ratios[what] >= BARS[what]}" if what in BARS else "")
        )
    return {
        "invivo": about,
        "transformer_lens": peer_about,
        "matmul_flop_per_s": flops,
        "prompts": PAIRS,
        "tokens": TOKENS,
        "peer_heads": args.peer_heads,
        "pairs_at_all_tokens": FEWER,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "floors_s": floors,
        "largest_differences": agreement,
    }


def ratios_of(seconds: Seconds) -> dict[str, float]:
    """The peer's over ours: medians over rounds of the ratio within a round."""
    return {
        what: statistics.median(
            b / a for a, b in zip(s["invivo"], s["transformer_lens"], strict=True)
        )
        for what, s in seconds.items()
    }


def touched(folder: Path, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Steps of 64 decoding rows, some of which carry a program."""
    took = touched_rows(folder, prompts, steps)
    ratios = step_ratios(took)
    for what, ratio in ratios.items():
        ms = 1e3 * statistics.quantiles(took[what], n=4)[0]
        bar = f"at most {TOUCHED[what]}: {ratio <= TOUCHED[what]}"
        print(f"64 rows, touched {what}: {ms:.1f} ms, {ratio:.3f}   {bar}")
    return {"step_seconds": took, "ratios": ratios}


def resolving(folder: Path) -> dict[str, Any]:
    """A program of 20 steps, resolved anew and found again."""
    ms = resolve_ms(folder)
    print("resolve of 20 steps: " + ", ".join(f"{k} {v:.3f} ms" for k, v in ms.items()))
    return {"ms": ms}


def read_prompts(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (HERE / "prompts.txt").read_text(encoding="utf-8")
    passages = [tokenizer(passage)["input_ids"] for passage in text.strip().split("\n\n")]
    pieces = [ids[i : i + TOKENS] for ids in passages for i in range(0, len(ids), TOKENS)]
    prompts = [piece for piece in pieces if len(piece) == TOKENS][:PAIRS]
    assert len(prompts) == PAIRS
    return prompts


def worker(name: str, python: str, start: dict[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """One engine in a process of its own; it sleeps while the other runs. {} ends it."""
    log = (Path(tempfile.gettempdir()) / f"invivo-bench-edits-{name}.log").open("w")
    process = subprocess.Popen(
        [python, "-P", str(HERE / "edits_worker.py"), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": str(HERE.parent / "src") if name == "invivo" else ""},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(message: dict[str, Any]) -> dict[str, Any]:
        if not message:
            stdin.close()
            process.wait(60)
            log.close()
            return {}
        stdin.write(json.dumps(message) + "\n")
        line = stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {name} ended; see {log.name}")
        return dict(json.loads(line))

    return ask, ask(start)


def jobs(
    prompts: list[list[int]],
    pairs: list[list[list[int]]],
    shape: tuple[int, int],
    peer_heads: int,
    number: int,
) -> list[tuple[str, dict[str, Any], dict[str, Any], float]]:
    """(what, our job, the peer's, by what the peer's seconds are multiplied)."""
    every = [[layer, head] for layer in range(shape[0]) for head in range(shape[1])]
    few = [every[i * len(every) // peer_heads] for i in range(peer_heads)]
    scale = len(every) / peer_heads
    found = []
    for what, unembed in UNEMBED.items():
        capture = {"job": "capture", "prompts": prompts, "unembed": unembed}
        found.append((what, capture, capture, 1.0))
    for where, some in (("last", pairs), ("all", pairs[:FEWER])):
        job = {
            "job": "patch",
            "pairs": some,
            "positions": where,
            "tokens": [260, 905],
            "salt": f"{where} {number}",
        }
        found.append((f"patch {where}", job | {"heads": every}, job | {"heads": few}, scale))
    return found


def differ(
    what: str, ours: list[float], theirs: list[float], mine: dict[str, Any], other: dict[str, Any]
) -> float:
    """The largest difference between the numbers of both sides."""
    if what.startswith("capture"):
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    n = len(mine["pairs"])
    at = {tuple(head): i for i, head in enumerate(mine["heads"])}
    mine_there = [ours[at[tuple(head)] * n + pair] for head in other["heads"] for pair in range(n)]
    return max(abs(a - b) for a, b in zip(mine_there, theirs, strict=True))


def floors_of(layers: int, head: int, shape: tuple[int, int], flops: float) -> dict[str, float]:
    """Seconds of the multiplications alone."""
    whole = 2 * layers * TOKENS * PAIRS / flops
    heads = shape[0] * shape[1]
    row = (layers + 2 * head) / flops  # half of the layers, one unembedding
    both = 2 * 2 * layers * TOKENS / flops  # the two runs of a pair
    return {
        "capture": whole,
        "capture lean": whole,
        "capture both": whole + 2 * head * TOKENS * PAIRS / flops,
        "patch last": PAIRS * (both + heads * row),
        "patch all": FEWER * (both + heads * (layers * TOKENS + 2 * head) / flops),
    }


# --- in this process ------------------------------------------------------------------------
def touched_rows(folder: Path, prompts: list[list[int]], steps: int) -> dict[str, list[float]]:
    """Seconds of steps in which 64 rows decode, engines taking turns."""
    from invivo.edits.blobs import Blobs
    from invivo.edits.program import parse_program
    from invivo.edits.prompt_text import prompt_of_pieces
    from invivo.edits.resolve import resolve
    from invivo.engine.engine import Engine, EngineConfig
    from invivo.engine.types import Intervention, Request, SamplingParams
    from invivo.models.load import load_model

    model = load_model(str(folder), dtype=torch.float32)
    width = model.config.d_model
    blobs = Blobs()
    blobs.add("v", torch.randn(width, generator=torch.Generator().manual_seed(0)) / width**0.5)
    add = {"at": "layers.15.resid.post", "do": "add", "v": "blob:v", "pos": "@generated"}
    four = [
        {"at": f"layers.{layer}.attn.head.1.z", "do": "zero", "pos": "@generated"}
        for layer in range(14, 18)
    ]
    variants: dict[str, dict[int, Any]] = {
        "none": {},
        "one": {7: [add]},
        "one, 4 layers": {7: four},
        "all": {i: [add] for i in range(64)},
    }
    n_new = steps + 40

    def begin(name: str, edits: dict[int, Any]) -> Engine:
        engine = Engine(model, EngineConfig(kv_bytes=256 << 20, max_batch_tokens=192))
        begun = [False] * 64
        for i in range(64):
            ids = prompts[i % len(prompts)]
            program = None
            if i in edits:
                text = prompt_of_pieces([(t, " w") for t in ids], n_new=n_new)
                parsed = parse_program({"steps": edits[i]})
                program = Intervention(
                    resolve(parsed, model.config, {"main": text}, blobs=blobs), blobs
                )

            def listen(output: Any, i: int = i) -> None:
                assert output.error is None, output.error
                begun[i] |= bool(output.tokens)

            params = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True)
            request = Request(f"{name}{i}", tuple(ids), params=params, intervention=program)
            engine.submit(request, listen)
        while not all(begun):
            engine.step()
        return engine

    engines = {name: begin(name, edits) for name, edits in variants.items()}
    took: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for number in range(steps + 2):
        first = number % len(names)  # another begins each turn
        for name in names[first:] + names[:first]:
            before = time.perf_counter()
            engines[name].step()
            if number >= 2:
                took[name].append(time.perf_counter() - before)
    return took


def step_ratios(took: dict[str, list[float]]) -> dict[str, float]:
    """A step's time over that of the untouched one: of the quickest quarter of the steps, which
    are those that others on the machine disturbed least."""
    quick = {name: statistics.quantiles(seconds, n=4)[0] for name, seconds in took.items()}
    return {name: quick[name] / quick["none"] for name in took if name != "none"}


def resolve_ms(folder: Path) -> dict[str, float]:
    """Milliseconds to resolve a program of 20 steps anew and to find it again."""
    import invivo
    from invivo.marked_prompt import MarkedPrompt

    lm = invivo.load(str(folder), kv_bytes=64 << 20)
    steps = [
        {
            "at": f"layers.{i}.attn.head.{i % 9}.z",
            "pos": {"span": " river"},
            "do": "scale",
            "a": 0.5,
        }
        for i in range(20)
    ]
    program = {"steps": steps, "out": [{"measure": "logit_diff", "a": 260, "b": 905}]}
    prompt = MarkedPrompt(tuple(lm.tokenize("The mines lay by the river and the railway ran on")))
    given = lm.programs.given(program)
    lm.programs.intervention(given, prompt)
    fresh: list[float] = []
    for i in range(100):  # another token each time: nothing is found
        changed = MarkedPrompt((*prompt.ids, 1000 + i))
        lm.programs._text_of(changed, 0)
        before = time.perf_counter()
        lm.programs.intervention(given, changed)
        fresh.append(time.perf_counter() - before)
    found: list[float] = []
    for _ in range(200):
        before = time.perf_counter()
        lm.programs.intervention(given, prompt)
        found.append(time.perf_counter() - before)
    lm.close()
    return {"cold": 1e3 * statistics.median(fresh), "cached": 1e3 * statistics.median(found)}


if __name__ == "__main__":
    main()
