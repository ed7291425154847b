"""Every kernel of gated linear attention compiles for Hopper, without spills; needs no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.hopper_compiler import REGISTERS, SHARED, Resources, compiled

from invivo.kernels.triton_gated_norm import gated_norm_backward_triton, gated_norm_triton
from invivo.kernels.triton_gla.passes import backward_pass, forward_pass
from invivo.kernels.triton_gla.step import step

HEADS = 4
# Heads of the 1.3B model, the largest, and of the 340M one; one long span is cut into segments.
SHAPES = [(256, 512, 8), (256, 512, 1), (128, 256, 8)]
PRODUCTS = {"_pairs_kernel", "_walk_kernel", "_values_kernel", "_stream_kernel", "_gradient_kernel"}


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels(keys: int, values: int, spans: int) -> list[Resources]:
    rows = 16_384
    q, k = on_meta(rows, HEADS, keys), on_meta(rows, HEADS, keys)
    g, v = on_meta(rows, HEADS, keys, dtype=torch.float32), on_meta(rows, HEADS, values)
    span_start = on_meta(spans + 1, dtype=torch.int32)
    state = on_meta(spans, HEADS, keys, values, dtype=torch.float32)
    slots = on_meta(8, dtype=torch.int32)
    inputs = (q, k, v, g, span_start, state, 0.1, None)
    few = [x[:8] for x in (q, k, v, g)]
    return [
        *compiled(lambda: forward_pass(*inputs, True)),
        *compiled(lambda: backward_pass(v, state, *inputs)),
        *compiled(lambda: step(*few, state, slots, scale=0.1)),
    ]


@pytest.mark.parametrize(("keys", "values", "spans"), SHAPES)
def test_kernels_fit_a_multiprocessor_and_spill_nothing(keys, values, spans, monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("compiled and run by test_triton_gla.py")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = kernels(keys, values, spans)
    names = {kernel.name for kernel in found}
    assert names >= PRODUCTS
    assert ("_scan_kernel" in names) == (spans == 1)
    for kernel in found:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED, kernel
        assert kernel.registers * kernel.warps * 32 <= REGISTERS, kernel
    for kernel in found:
        if kernel.name in PRODUCTS:
            assert kernel.wgmma > 0, kernel


@pytest.mark.parametrize("width", [256, 512])
def test_gated_norms_spill_nothing(width, monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("compiled and run by test_triton.py")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    z, weight = on_meta(16_384, HEADS, width), on_meta(width)
    r, dy = on_meta(16_384, HEADS * width), on_meta(16_384, HEADS * width)
    found = [
        *compiled(lambda: gated_norm_triton(z, r, weight, 1e-6)),
        *compiled(lambda: gated_norm_backward_triton(dy, z, r, weight, 1e-6)),
    ]
    assert len(found) == 2
    for kernel in found:
        assert kernel.spilled == 0, kernel
        assert kernel.registers * kernel.warps * 32 <= REGISTERS // 2, kernel
