"""Gated linear attention on a GPU: right against float64, and how fast beside its rivals.

    PYTHONPATH=src python bench/gla.py [--out FILE] [--seconds 90] [--only WORDS] [--compilers N]

Every row is one shape: log gates given in float32, tau 16, bf16 tensors, forward and forward +
backward, with the errors of o, dq, dk, dv and dg against the float64 definition by chunks; a row
whose error is over the bar is marked. Rivals, in the same run: flash-linear-attention's chunk_gla
(if fla-core can be imported; its first call at a shape compiles for minutes, which ``--compilers``
lets several processes do beforehand) and torch's attention of the same width by cuDNN and
FlashAttention. Rows are printed as they come and written after each; a
second call goes on where the first stopped. ``device_*_ms`` is the time that the device works,
kernel by kernel, whatever the host does meanwhile. The floor is that of the bytes of inputs,
outputs and gradients, or of the operations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import (
    Ceilings,
    device_ms,
    event_ms,
    graph_ms,
    measure_ceilings,
    relative_error,
)
from invivo.kernels.gla import gla_chunked, log_gates
from invivo.kernels.triton_gla.ops import gla_step_triton, gla_triton

BF16 = torch.bfloat16
# batch, tokens, heads, keys, values: the anchors' table, then one row count over lengths.
SHAPES = [
    (8, 2048, 4, 256, 512), (4, 4096, 4, 256, 512), (2, 8192, 4, 256, 512),
    (1, 16384, 4, 256, 512), (32, 2048, 4, 128, 256), (1, 8192, 96, 128, 128),
    (2, 16384, 16, 128, 128), (4, 2048, 16, 128, 128), (4, 4096, 64, 128, 128),
    (8, 2048, 32, 256, 256), (8, 1024, 8, 64, 64), (2, 16384, 4, 64, 64), (1, 65536, 4, 256, 512),
]  # fmt: skip
DECODES = (1, 8, 64, 256)
TAUS = (16.0, 1.0, 0.3, 0.1)
HEADS = [(keys, values) for keys in (32, 64, 128, 256) for values in (64, 128, 256, 512)]
RAGGED = (1, 2, 15, 64, 65, 333, 1000, 2048, 8192)
BARS = {"o": 3e-3, "dq": 3e-3, "dk": 3e-3, "dv": 3e-3, "dg": 5e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "gla-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=90.0, help="start no row after this")
    parser.add_argument("--only", default="", help="rows whose names hold one of these words")
    parser.add_argument("--compilers", type=int, default=0, help="processes that compile fla first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gla.py needs a CUDA device")
    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found |= {
        "command": " ".join(["bench/gla.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }
    rows = found.setdefault("rows", {})
    words = args.only.split(",")

    def is_wanted(name: str) -> bool:
        missing = "failed" in rows.get(name, {}) or name not in rows
        return missing and any(word in name for word in words)

    if args.compilers:
        compile_fla([s for s in SHAPES if is_wanted(f"fla {label_of(s)}")], args.compilers)
    ceilings = measure_ceilings()
    jobs = work(ceilings)
    in_order = dict(job for word in words for job in jobs if word in job[0])
    for name, measure in in_order.items():
        if not is_wanted(name):
            continue
        if time.monotonic() - began > args.seconds:
            print("out of time: call again for the rest")
            break
        try:
            rows[name] = measure()
        except Exception as error:  # a variant that fails must not take the others with it
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(name, json.dumps(rows[name]), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def versions() -> dict:
    """Of what is measured; None where a rival is not there."""
    there = {}
    for name in ("torch", "triton", "fla-core"):
        try:
            there[name] = version(name)
        except PackageNotFoundError:
            there[name] = None
    return there


def work(ceilings: Ceilings) -> list[tuple[str, Callable[[], dict]]]:
    jobs: list[tuple[str, Callable[[], dict]]] = [
        (f"errors tau {tau}", partial(errors, 2, 512, 4, 256, 512, tau)) for tau in TAUS
    ]
    jobs += [(f"errors heads {k}x{v}", partial(errors_of_heads, k, v)) for k, v in HEADS]
    for shape in SHAPES:
        label = label_of(shape)
        jobs.append((f"ours {label}", partial(ours, ceilings, *shape)))
        jobs.append((f"attention {label}", partial(attention, *shape)))
    jobs += [(f"decode {batch}", partial(decode, ceilings, batch)) for batch in DECODES]
    jobs += [(f"fla {label_of(shape)}", partial(fla, *shape)) for shape in SHAPES]
    return jobs


def label_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def inputs(batch: int, length: int, heads: int, keys: int, values: int, tau: float) -> list:
    rows = batch * length
    q, k = (torch.randn(rows, heads, keys, device="cuda").to(BF16) for _ in range(2))
    v = torch.randn(rows, heads, values, device="cuda").to(BF16)
    g = log_gates(torch.randn(rows, heads, keys, device="cuda"), tau)
    return [x.requires_grad_() for x in (q, k, v, g)]


def on_card(starts: list[int]) -> torch.Tensor:
    return torch.tensor(starts, device="cuda", dtype=torch.int32)


def errors(
    batch: int,
    length: int,
    heads: int,
    keys: int,
    values: int,
    tau: float,
    form: Callable | None = None,
) -> dict:
    """Relative errors against float64, at the worst of three seeds."""
    worst = dict.fromkeys(BARS, 0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        leaves = inputs(batch, length, heads, keys, values, tau)
        starts = [i * length for i in range(batch + 1)]
        widen(worst, form or partial(gla_triton, span_start=on_card(starts)), leaves, starts)
    return {**worst, "over_the_bar": over_the_bar(worst)}


def errors_of_heads(keys: int, values: int) -> dict:
    """The same over packed spans of ragged lengths, two heads of this size, by tau: the worst of
    two seeds. Tensors lie beside memory that holds no numbers."""
    found: dict = {}
    starts = [0, *accumulate(RAGGED)]
    for tau in TAUS:
        worst = dict.fromkeys(BARS, 0.0)
        for seed in range(2):
            torch.manual_seed(seed)
            torch.full((2**28,), float("nan"), device="cuda")  # what is allocated next holds NaN
            leaves = inputs(1, starts[-1], 2, keys, values, tau)
            widen(worst, partial(gla_triton, span_start=on_card(starts)), leaves, starts)
        found[f"tau {tau:g}"] = worst
        found.setdefault("over_the_bar", []).extend(f"{n}, {tau:g}" for n in over_the_bar(worst))
    return found


def widen(worst: dict, call: Callable, leaves: list, starts: list[int]) -> None:
    """Raise ``worst`` to the errors of one forward and backward pass."""
    dz = torch.randn_like(leaves[2])
    got = call(*leaves)[0]
    got = [got, *torch.autograd.grad(got, leaves, dz)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = gla_chunked(*wide, span_start=starts)[0]
    wanted = [wanted, *torch.autograd.grad(wanted, wide, dz.double())]
    for name, value, expected in zip(BARS, got, wanted, strict=True):
        error = relative_error(value.detach(), expected.detach())
        worst[name] = max(worst[name], error) if error == error else float("inf")


def over_the_bar(worst: dict) -> list[str]:
    return [name for name, bar in BARS.items() if not worst[name] < bar]


def both_ms(call: Callable, leaves: list, dz: torch.Tensor, *, graph: bool = True) -> dict:
    """Forward, and forward + backward: called one by one, and in a graph as in a captured step,
    where no launch is waited for."""

    def step() -> None:
        torch.autograd.grad(call(*leaves), leaves, dz)

    def forward() -> None:
        with torch.no_grad():
            call(*leaves)

    found = {"forward_ms": event_ms(forward)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found["both_ms"] = event_ms(step)
    found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    if not graph:
        return found
    try:
        found["graph_forward_ms"] = graph_ms([forward] * 3)
        found["graph_both_ms"] = graph_ms([step] * 3)
    except RuntimeError as error:  # an operation that waits for the device cannot be captured
        found["graph_failed"] = str(error)[:120]
    try:
        found["device_forward_ms"], found["device_both_ms"] = device_ms(forward), device_ms(step)
    except RuntimeError as error:  # a machine may not let anyone count
        found["device_failed"] = str(error)[:120]
    return found


def ours(ceilings: Ceilings, batch: int, length: int, heads: int, keys: int, values: int) -> dict:
    leaves = inputs(batch, length, heads, keys, values, 16.0)
    starts = on_card([i * length for i in range(batch + 1)])
    found = both_ms(lambda *x: gla_triton(*x, span_start=starts)[0], leaves, leaves[2].detach())
    units = batch * length * heads
    flops = (4 * keys * values + 128 * (keys + values), 14 * keys * values + 384 * (keys + values))
    n_bytes = (8 * keys + 4 * values, 24 * keys + 10 * values)
    floors = [ceilings.floor_ms(units * b, units * f) for b, f in zip(n_bytes, flops, strict=True)]
    return {**found, "floor_forward_ms": floors[0], "floor_both_ms": floors[1]}


def compile_fla(shapes: list[tuple[int, ...]], processes: int) -> None:
    """Put every kernel from which fla chooses into Triton's cache on disk, a shape a process.

    Which of them is fastest is not learnt here, where they run beside each other: the process that
    measures chooses alone, out of what is compiled by then.
    """
    began = time.monotonic()
    # A process knows what it has chosen: a second shape in it might compile nothing.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1)
    with pool:
        for shape, failed in zip(shapes, pool.map(compile_one, shapes), strict=True):
            print(f"fla {label_of(shape)} compiled", failed, f"{time.monotonic() - began:.0f} s")


def compile_one(shape: tuple[int, int, int, int, int]) -> str:
    """One step of fla; what went wrong, if anything did."""
    os.environ["FLA_CACHE_RESULTS"] = "0"  # read when fla is imported
    try:
        call, leaves = fla_call(shape[0]), inputs(*shape, 16.0)
        torch.autograd.grad(call(*leaves)[0], leaves, leaves[2].detach())
        torch.cuda.synchronize()
    except Exception as error:
        return f"with {type(error).__name__}: {error}"[:300]
    return ""


def fla_call(batch: int) -> Callable[..., tuple]:
    """fla's function of packed rows, of so many sequences of one length."""
    from fla.ops.gla import chunk_gla

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> tuple:
        split = [x.unflatten(0, (batch, -1)) for x in (q, k, v, g)]
        return (chunk_gla(*split)[0].flatten(0, 1),)

    return call


def fla(batch: int, length: int, heads: int, keys: int, values: int) -> dict:
    call = fla_call(batch)
    leaves = inputs(batch, length, heads, keys, values, 16.0)
    # A capture of it fails, and no random numbers can be drawn in the process after that.
    found = both_ms(lambda *x: call(*x)[0], leaves, leaves[2].detach(), graph=False)
    if batch * length * heads * keys * values < 2**34:
        found["errors"] = errors(batch, length, heads, keys, values, 16.0, call)
    return found


def attention(batch: int, length: int, heads: int, keys: int, values: int) -> dict:
    """Causal attention as wide as the values, heads of 128."""
    width = max(128, heads * values)
    leaves = [
        torch.randn(batch, width // 128, length, 128, device="cuda").to(BF16).requires_grad_()
        for _ in range(3)
    ]
    found = {}
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for name, backend in kinds.items():
        with sdpa_kernel(backend):
            call = partial(F.scaled_dot_product_attention, is_causal=True)
            found[name] = both_ms(call, leaves, leaves[0].detach())
    return found


def decode(ceilings: Ceilings, batch: int) -> dict:
    """One step of the 1.3B model's heads, in a graph over several states."""
    heads, keys, values = 4, 256, 512
    copies = max(2, 256 // batch)
    q, k, v, g = (x.detach() for x in inputs(batch, 1, heads, keys, values, 16.0))
    states = [
        torch.randn(batch + 1, heads, keys, values, device="cuda") for _ in range(min(copies, 64))
    ]
    slots = torch.arange(1, batch + 1, device="cuda", dtype=torch.int32)
    calls = [partial(gla_step_triton, q, k, v, g, state, slots, 0.06) for state in states]
    floor = ceilings.floor_ms(8 * batch * heads * keys * values)
    return {"ms": graph_ms(calls), "floor_ms": floor}


if __name__ == "__main__":
    main()
