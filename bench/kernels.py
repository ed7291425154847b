"""The GPU kernels: right against float64, and how near to what the card can do.

    PYTHONPATH=src python bench/kernels.py [--out FILE] [--quick]

Shapes are those of Llama-3.1-8B: 32 query heads and 8 key heads of 128, width 4096, hidden 14336.
Every check draws fresh random inputs; outputs are compared by relative Frobenius error. Times are
of one call within a graph of many calls on different data, as layers have. A floor is the time to
move the bytes, or to do the operations, at the rates measured first on the same card. The rival of
prefill is torch's scaled_dot_product_attention on ready-made contiguous tensors.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from gpu_timing import Ceilings, Row, event_ms, graph_ms, measure_ceilings, relative_error, report
from invivo.kernels import activation, attention, lora, norm, rotary
from invivo.kernels.paging import PagedLayout

HEADS, GROUPS, HEAD_DIM, WIDTH, HIDDEN = 32, 8, 128, 4096, 14336
LAYERS = 32
BLOCK = 16
BF16 = torch.bfloat16
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "kernels-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--quick", action="store_true", help="checks only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/kernels.py needs a CUDA device")
    with torch.inference_mode():
        rows = [check() for check in checks()]
        wrong = [row for row in rows if not row.error < limit_of(row)]
        ceilings = measure_ceilings()
        if not args.quick:
            rows += time_decode(ceilings)
            rows += time_prefill(ceilings)
            rows += time_rowwise(ceilings)
            rows += time_lora(ceilings)
    report(rows, ceilings, args.out)
    if wrong:
        raise SystemExit(f"{len(wrong)} kernels are wrong: {[row.what for row in wrong]}")


def limit_of(row: Row) -> float:
    return next(limit for kind, limit in TOLERANCE.items() if str(kind) in row.what)


# --- inputs ---------------------------------------------------------------------------------
def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def layout_of(spans: list[tuple[int, int]], *, block_size: int = BLOCK) -> tuple[PagedLayout, int]:
    """Layout of (rows, kv length) spans in shuffled blocks, and the number of blocks."""
    needed = [-(-length // block_size) for _, length in spans]
    order = (torch.randperm(sum(needed)) + 1).to(torch.int32)
    table = torch.zeros(len(spans), max(needed), dtype=torch.int32)
    starts, slots, positions, at = [0], [], [], 0
    for i, ((rows, length), n) in enumerate(zip(spans, needed, strict=True)):
        table[i, :n] = order[at : at + n]
        at += n
        index = torch.arange(length - rows, length)
        positions.append(index)
        slots.append(table[i, index // block_size].long() * block_size + index % block_size)
        starts.append(starts[-1] + rows)
    n_decode = next((i for i, (rows, _) in enumerate(spans) if rows > 1), len(spans))
    layout = PagedLayout(
        positions=torch.cat(positions).cuda(),
        slots=torch.cat(slots).cuda(),
        span_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        kv_len=torch.tensor([n for _, n in spans], dtype=torch.int32, device="cuda"),
        block_table=table.cuda(),
        block_size=block_size,
        n_decode=n_decode,
        max_query=max(rows for rows, _ in spans),
        max_kv=max(length for _, length in spans),
        span_start_host=starts,
        kv_len_host=[n for _, n in spans],
    )
    return layout, sum(needed) + 1


# --- correctness ----------------------------------------------------------------------------
def checks() -> list[Callable[[], Row]]:
    """One call a check, so that they can be spread over processes to compile side by side."""
    mixed = [(1, 577), (1, 1), (1, 64), (1, 3000), (130, 130), (7, 900), (300, 700)]
    calls: list[Callable[[], Row]] = []
    for head_dim, heads, groups in ((64, 9, 3), (80, 8, 8), (96, 32, 8), (128, 32, 8), (256, 4, 1)):
        dtypes = TOLERANCE if head_dim in (64, 128) else (BF16,)
        for dtype in dtypes:
            calls.append(partial(check_attention, mixed, heads, groups, head_dim, dtype))
    many = [(1, 300 + i) for i in range(200)]
    calls += [
        partial(check_attention, mixed, 8, 4, 256, BF16, window=100, softcap=20.0),
        partial(check_attention, mixed, 8, 4, 128, BF16, window=512),
        partial(check_attention, mixed, 8, 2, 128, BF16, block_size=32),
        partial(check_attention, many, 32, 8, 128, BF16),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        calls += [partial(check_norm, dtype), partial(check_rotary, dtype)]
        calls += [partial(check_gated, dtype, kind) for kind in ("silu", "gelu_tanh", "gelu")]
        calls += [partial(check_lora, n_rows, dtype) for n_rows in (40, 700)]
    return calls


def check_norm(dtype: torch.dtype) -> Row:
    x, residual, weight = (randn(*s, dtype=dtype) for s in ((70, WIDTH), (70, WIDTH), (WIDTH,)))
    got = norm.add_rms_norm(x, residual, weight, 1e-5)
    want = norm.rms_norm_reference(x.double() + residual.double(), weight.double(), 1e-5)
    return Row(f"check add+norm {dtype}", 0, 0, relative_error(got[0], want))


def check_gated(dtype: torch.dtype, kind: str) -> Row:
    gate_up = randn(50, 2 * HIDDEN, dtype=dtype)
    got = activation.gated_activation(gate_up, kind)
    want = activation.gated_activation_reference(gate_up.double(), kind)
    return Row(f"check gated {kind} {dtype}", 0, 0, relative_error(got, want))


def check_attention(
    spans: list[tuple[int, int]],
    heads: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    block_size: int = BLOCK,
    window: int | None = None,
    softcap: float | None = None,
) -> Row:
    layout, n_blocks = layout_of(spans, block_size=block_size)
    q = randn(layout.n_rows, heads, head_dim, dtype=dtype)
    k, v = (randn(n_blocks, block_size, groups, head_dim, dtype=dtype) for _ in range(2))
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    got = attention.paged_attention(q, k, v, layout, **options)
    want = attention.paged_attention_reference(
        q.double(), k.double(), v.double(), layout, **options
    )
    what = f"check attention D{head_dim} {heads}/{groups} {dtype}"
    return Row(what, 0, 0, relative_error(got, want), note=f"window {window}, cap {softcap}")


def check_rotary(dtype: torch.dtype) -> Row:
    n_rows = 33
    qkv = randn(n_rows, HEADS + 2 * GROUPS, HEAD_DIM, dtype=dtype)
    q, k, v = qkv.split((HEADS, GROUPS, GROUPS), dim=1)
    angles = torch.rand(1000, HEAD_DIM // 2, device="cuda") * 6
    positions = torch.randint(0, 1000, (n_rows,), device="cuda")
    slots = torch.randperm(20 * BLOCK, device="cuda")[:n_rows]
    caches = [randn(20, BLOCK, GROUPS, HEAD_DIM, dtype=dtype) for _ in range(2)]
    want_q, want_k = rotary.apply_rotary_reference(
        q.double(), k.double(), angles.double().cos(), angles.double().sin(), positions
    )
    want_v = v.double()
    got_q = rotary.rotate_and_store(q, k, v, angles.cos(), angles.sin(), positions, *caches, slots)
    stored = [cache.view(-1, GROUPS, HEAD_DIM)[slots] for cache in caches]
    errors = map(relative_error, (got_q, *stored), (want_q, want_k, want_v))
    return Row(f"check rotary+store {dtype}", 0, 0, max(errors))


def check_lora(n_rows: int, dtype: torch.dtype) -> Row:
    a, b, index = lora_tables(n_rows, 5, dtype)
    x, y = randn(n_rows, WIDTH, dtype=dtype), randn(n_rows, 6144, dtype=dtype)
    want = lora.lora_add_reference(y.double(), x.double(), a.double(), b.double(), index)
    got = lora.lora_add(y.clone(), x, a, b, index)
    assert torch.equal(got[index == 0], y[index == 0])
    return Row(f"check lora {n_rows} rows {dtype}", 0, 0, relative_error(got, want))


def lora_tables(
    n_rows: int, slots: int, dtype: torch.dtype, d_in: int = WIDTH, d_out: int = 6144
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = randn(slots, 16, d_in, dtype=dtype, scale=d_in**-0.5)
    b = randn(slots, d_out, 16, dtype=dtype)
    a[0], b[0] = 0, 0
    index = torch.randint(0, slots, (n_rows,), device="cuda", dtype=torch.int32)
    return a, b, index


# --- speed ----------------------------------------------------------------------------------
def time_decode(ceilings: Ceilings) -> list[Row]:
    rows = []
    cases = [(1, 576), (1, 8192), (8, 2048), (32, 576), (128, 576), (256, 1024)]
    loads = {f"B={batch} context {context}": [context] * batch for batch, context in cases}
    loads |= {
        f"B={batch} lengths of conversations": conversations(batch) for batch in (24, 115, 205)
    }
    for name, lengths in loads.items():
        layout, n_blocks = layout_of([(1, length) for length in lengths])
        # Layers enough that none finds its pages in the card's L2, as in a model.
        layers = min(128, max(4, int(4e8 / (n_blocks * BLOCK * GROUPS * HEAD_DIM * 4))))
        caches = [
            tuple(randn(n_blocks, BLOCK, GROUPS, HEAD_DIM) for _ in range(2)) for _ in range(layers)
        ]
        q = randn(len(lengths), HEADS, HEAD_DIM)
        calls = [
            partial(attention.paged_attention, q, k, v, layout, scale=0.088) for k, v in caches
        ]
        floor = ceilings.floor_ms(sum(lengths) * GROUPS * HEAD_DIM * 4)
        rows.append(Row(f"decode attention {name}", graph_ms(calls), floor))
        del caches, calls
    return rows


def conversations(n: int) -> list[int]:
    """Keys of so many answers under way: log-normal prompts and answers like ShareGPT's."""
    rng = random.Random(n)
    prompts = [min(3840, max(4, rng.lognormvariate(4.0, 1.7))) for _ in range(n)]
    answers = [min(768, max(4, rng.lognormvariate(5.2, 1.05))) for _ in range(n)]
    return [int(p + rng.random() * a) for p, a in zip(prompts, answers, strict=True)]


def time_prefill(ceilings: Ceilings) -> list[Row]:
    rows = []
    cases = [
        ("8192", [(8192, 8192)], {}),
        ("2048", [(2048, 2048)], {}),
        ("4 x 2048", [(2048, 2048)] * 4, {}),
        ("2048 after 6144", [(2048, 8192)], {}),
        ("8192 window 1024", [(8192, 8192)], {"window": 1024}),
    ]
    for name, spans, options in cases:
        layout, n_blocks = layout_of(spans)
        q = randn(layout.n_rows, HEADS, HEAD_DIM)
        k, v = (randn(n_blocks, BLOCK, GROUPS, HEAD_DIM) for _ in range(2))
        window = options.get("window")
        ms = event_ms(
            partial(attention.paged_attention, q, k, v, layout, scale=0.088, window=window)
        )
        pairs = sum(visible_pairs(rows_, length, window) for rows_, length in spans)
        floor = ceilings.floor_ms(0, 4 * HEADS * HEAD_DIM * pairs)
        rival = None
        if window is None and all(r == n for r, n in spans):
            rival = sdpa_ms(len(spans), spans[0][0])
        rows.append(Row(f"prefill attention {name}", ms, floor, other_ms=rival))
    return rows


def visible_pairs(rows: int, length: int, window: int | None) -> int:
    most = length if window is None else window
    return sum(min(most, index + 1) for index in range(length - rows, length))


def sdpa_ms(batch: int, length: int) -> float:
    q = randn(batch, HEADS, length, HEAD_DIM)
    k, v = (randn(batch, GROUPS, length, HEAD_DIM) for _ in range(2))
    return event_ms(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )


def time_rowwise(ceilings: Ceilings) -> list[Row]:
    rows = []
    weight = randn(WIDTH)
    angles = torch.rand(10_000, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    for n in (1, 128, 8192):
        copies = LAYERS if n < 1000 else 4
        xs = [randn(n, WIDTH) for _ in range(copies)]
        residual = randn(n, WIDTH)
        calls = [partial(norm.add_rms_norm, x, residual, weight, 1e-5) for x in xs]
        rows.append(Row(f"add+norm {n} rows", graph_ms(calls), ceilings.floor_ms(8 * n * WIDTH)))
        gates = [randn(n, 2 * HIDDEN) for _ in range(copies)]
        calls = [partial(activation.gated_activation, g, "silu") for g in gates]
        rows.append(Row(f"silu-mul {n} rows", graph_ms(calls), ceilings.floor_ms(6 * n * HIDDEN)))
        del gates
        layout, n_blocks = layout_of([(n, n)] if n > 1 else [(1, 9)])
        caches = [randn(n_blocks, BLOCK, GROUPS, HEAD_DIM) for _ in range(2)]
        heads = HEADS + 2 * GROUPS
        projections = [randn(n, heads, HEAD_DIM) for _ in range(copies)]
        calls = [
            partial(
                rotary.rotate_and_store,
                *t.split((HEADS, GROUPS, GROUPS), dim=1),
                cos, sin, layout.positions, *caches, layout.slots,
            )
            for t in projections
        ]  # fmt: skip
        floor = ceilings.floor_ms(4 * n * heads * HEAD_DIM)
        rows.append(Row(f"rotary+store {n} rows", graph_ms(calls), floor))
    return rows


def time_lora(ceilings: Ceilings) -> list[Row]:
    """Rank 16 on the query-key-value map, eight adapters; the rival is the map itself."""
    rows = []
    weight = randn(6144, WIDTH)
    for n in (1, 32, 128, 2048):
        tables = [lora_tables(n, 9, BF16) for _ in range(8)]
        x, y = randn(n, WIDTH), randn(n, 6144)
        if n == 2048:
            for _, _, index in tables:
                index.copy_(torch.arange(n, device="cuda") // 256 + 1)
        calls = [partial(lora.lora_add, y, x, *t) for t in tables]
        used = min(8, n)
        floor = ceilings.floor_ms(2 * (used * 16 * (WIDTH + 6144) + n * (WIDTH + 2 * 6144)))
        base = graph_ms([partial(F.linear, x, weight)] * 8)
        rows.append(Row(f"lora {n} rows, 8 adapters", graph_ms(calls), floor, other_ms=base))
        nobody = torch.zeros(n, dtype=torch.int32, device="cuda")
        calls = [partial(lora.lora_add, y, x, a, b, nobody) for a, b, _ in tables]
        rows.append(Row(f"lora {n} rows, no adapter", graph_ms(calls), 0.0))
    return rows


if __name__ == "__main__":
    main()
