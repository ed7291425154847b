"""What programs cost beside decoding on a GPU, at the sizes of SmolLM2-135M and Llama-3.1-8B.

    PYTHONPATH=src python bench/edits_gpu.py [--shapes 135m,8b] [--rounds 5] [--out FILE]

Random bf16 weights. 64 requests decode behind prompts of 512 tokens (shared by all variants through
the prefix cache). A variant says which of them carry a program that acts on every generated token:

- none: no request has one;
- one: a vector is added to the residual stream behind the middle layer, in one request of 64;
- one, 4 heads: one request has a head's z set to zero in each of four layers;
- all: every request has the vector of its own;
- none again: no request has one, in an engine that has carried all of the above.

The time is that of an iteration in which all 64 decode, scheduler, sampling and overlap included:
a stretch of them between two synchronisations, divided by their number. Variants are interleaved,
ratios are medians over rounds of the ratio to "none" within a round. The kernels of a step without
programs are listed by torch's profiler before and after any program has run: the lists must be the
same. "resolve" is host time: a program of 20 steps, resolved anew and found again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine_gpu import LLAMA_8B, kv_bytes, read_weights
from gpu_timing import Ceilings, measure_ceilings
from invivo.edits.blobs import Blobs
from invivo.edits.program import Program, parse_program
from invivo.edits.prompt_text import PromptText, prompt_of_pieces
from invivo.edits.resolve import ResolveCache, resolve
from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.types import Intervention, Output, Request, SamplingParams
from invivo.models.config import ModelConfig
from invivo.models.hub_config import config_from_hf
from invivo.models.load import LoadedModel, random_model

ROWS, PROMPT, NEW, STEPS, WARM = 64, 512, 64, 40, 8
SMOLLM2_135M = LLAMA_8B | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {"135m": SMOLLM2_135M, "8b": LLAMA_8B}
BARS = {"one": 1.05, "one, 4 heads": 1.05, "all": 1.03, "none again": 1.01}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "edits-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--shapes", default="135m,8b")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/edits_gpu.py needs a CUDA device")
    ceilings = measure_ceilings()
    body: dict[str, Any] = {
        "device": ceilings.name,
        "torch": torch.__version__,
        "copy_gb_per_s": ceilings.bytes_per_s / 1e9,
        "rows": ROWS,
        "steps": STEPS,
        "shapes": {},
    }
    for name in args.shapes.split(","):
        body["shapes"][name] = measure(name, args.rounds, ceilings)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(body, indent=1) + "\n")  # what is there is kept
        torch.cuda.empty_cache()


def measure(name: str, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    config = config_from_hf(SHAPES[name])
    with torch.inference_mode():
        decoder = random_model(config, device="cuda", dtype=torch.bfloat16)
    model = LoadedModel(name, Path(), config, decoder, None, "")  # type: ignore[arg-type]
    engine = Engine(
        model, EngineConfig(max_model_len=1024, max_running=ROWS, kv_bytes=_cache_bytes(config))
    )
    bench = Bench(engine)
    kernels = bench.kernels()
    times: dict[str, list[float]] = {variant: [] for variant in bench.variants}
    for variant in bench.variants:
        bench.step_ms(variant)  # libraries choose their kernels, graphs are captured
    for _ in range(rounds):
        for variant in bench.variants:
            times[variant].append(bench.step_ms(variant))
    again = bench.kernels()
    engine.close()
    n_bytes = 2 * read_weights(config) + ROWS * (PROMPT + NEW // 2) * kv_bytes(config)
    floor = ceilings.floor_ms(n_bytes, 2 * read_weights(config) * ROWS)
    ratios = {
        variant: statistics.median(
            a / b for a, b in zip(times[variant], times["none"], strict=True)
        )
        for variant in times
    }
    cold, cached = resolve_ms(config)
    same = kernels == again and len(kernels) > 0
    print(f"{name}: floor of a step {floor:.3f} ms; kernels of a step {len(kernels)}, same {same}")
    for variant, ms in times.items():
        bar = BARS.get(variant)
        told = "" if bar is None else f"   at most {bar:.2f}: {ratios[variant] <= bar}"
        print(f"  {variant:<14}{statistics.median(ms):9.3f} ms {ratios[variant]:7.3f}{told}")
    print(f"  resolve of 20 steps: {cold:.2f} ms, found again {cached:.4f} ms")
    return {
        "floor_ms": floor,
        "step_ms": times,
        "ratios": ratios,
        "same_kernels": same,
        "n_kernels": len(kernels),
        "resolve_ms": {"cold": cold, "cached": cached},
    }


class Bench:
    """64 requests on one engine, in each variant."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        config = engine.model.config
        generator = torch.Generator().manual_seed(0)
        shape = (ROWS, PROMPT)
        self.prompts = torch.randint(0, config.vocab_size, shape, generator=generator).tolist()
        middle = config.n_layers // 2
        self.vector = torch.randn(config.d_model, generator=generator) / config.d_model**0.5
        add = {"at": f"layers.{middle}.resid.post", "do": "add", "v": "blob:v", "pos": "@generated"}
        heads = [
            {"at": f"layers.{layer}.attn.head.1.z", "do": "zero", "pos": "@generated"}
            for layer in range(middle, middle + 4)
        ]
        self.variants: dict[str, dict[int, list[dict[str, Any]]]] = {
            "none": {},
            "one": {7: [add]},
            "one, 4 heads": {7: heads},
            "all": {i: [add] for i in range(ROWS)},
            "none again": {},
        }
        self._n = 0

    def step_ms(self, variant: str) -> float:
        """Milliseconds of an iteration in which all requests decode."""
        finish = self._begin(variant)
        for _ in range(WARM):
            self.engine.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            self.engine.step()
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        finish()
        return 1e3 * took / STEPS

    def kernels(self) -> list[str]:
        """Names of the kernels of one iteration without programs, in order."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        finish = self._begin("none")
        for _ in range(WARM):
            self.engine.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(2):
                self.engine.step()
            torch.cuda.synchronize()
        finish()
        events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
        return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]

    def _begin(self, variant: str) -> Callable[[], None]:
        """Submit all requests and step until all decode; gives what ends them."""
        self._n += 1
        edits = self.variants[variant]
        begun = [False] * ROWS
        over = [False] * ROWS

        def listen(i: int, output: Output) -> None:
            assert output.error is None, output.error
            begun[i] |= bool(output.tokens)
            over[i] |= output.final

        params = SamplingParams(temperature=0.0, max_tokens=NEW + 256, ignore_eos=True)
        ids = [f"{variant}-{self._n}-{i}" for i in range(ROWS)]
        for i, prompt in enumerate(self.prompts):
            program = self._program(edits[i], prompt) if i in edits else None
            request = Request(ids[i], tuple(prompt), params=params, intervention=program)
            self.engine.submit(request, partial(listen, i))
        while not all(begun):
            self.engine.step()

        def finish() -> None:
            assert not any(over)
            for request_id in ids:
                self.engine.abort(request_id)
            while not all(over):
                self.engine.step()

        return finish

    def _program(self, steps: list[dict[str, Any]], prompt: list[int]) -> Intervention:
        blobs = Blobs()
        blobs.add("v", self.vector)
        text = prompt_of_pieces([(i, " w") for i in prompt], n_new=NEW + 256)
        program = parse_program({"steps": steps})
        resolved = resolve(program, self.engine.model.config, {"main": text}, blobs=blobs)
        return Intervention(resolved, blobs)


def resolve_ms(config: ModelConfig) -> tuple[float, float]:
    """Milliseconds to resolve a program of 20 steps anew, and to find it again."""
    steps = [
        {"at": f"layers.{i}.attn.head.{i % 8}.z", "pos": {"span": " w7"}, "do": "scale", "a": 0.5}
        for i in range(20)
    ]
    program = parse_program({"steps": steps, "out": [{"measure": "logit_diff", "a": 1, "b": 2}]})
    text = prompt_of_pieces([(i, f" w{i}") for i in range(32)])

    def cold() -> object:
        return resolve(program, config, {"main": text})

    cache = ResolveCache()
    found = partial(_found, cache, program, text, cold)
    found()
    return _median_ms(cold, 50), _median_ms(found, 200)


def _found(
    cache: ResolveCache, program: Program, text: PromptText, make: Callable[[], Any]
) -> object:
    return cache.get((program.hash, text.ids), make)


def _median_ms(call: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _cache_bytes(config: ModelConfig) -> int:
    """Room for all requests, twice."""
    return 2 * ROWS * 1024 * kv_bytes(config)


if __name__ == "__main__":
    main()
