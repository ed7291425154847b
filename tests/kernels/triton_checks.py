"""Triton kernels against their references; on the CPU run with TRITON_INTERPRET=1.

Not collected by name: tests/kernels/test_triton.py runs this file, in a process of its own under
the interpreter, or here on a GPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.cases import AttentionShape, make_attention_case, relative_error

from invivo.kernels import (
    activation,
    attention,
    lora,
    norm,
    rotary,
    triton_activation,
    triton_attention,
    triton_lora,
    triton_norm,
    triton_rotary,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def on_device(case):
    layout = case.layout
    for name in ("positions", "slots", "span_start", "kv_len", "block_table"):
        setattr(layout, name, getattr(layout, name).to(DEVICE))
    return case.q.to(DEVICE), case.k_cache.to(DEVICE), case.v_cache.to(DEVICE), layout


def check_attention(spans, shape, *, dtype=torch.float32, seed=0, **options):
    case = make_attention_case(spans, shape, dtype=dtype, seed=seed)
    arguments = on_device(case)
    wide = [t.double() for t in arguments[:3]]
    expected = attention.paged_attention_reference(*wide, arguments[3], scale=0.2, **options)
    got = triton_attention.paged_attention_triton(*arguments, scale=0.2, **options)
    assert relative_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (80, 32), (96, 16), (128, 32), (256, 16)]
)
def test_attention_of_every_head_size(head_dim, block_size):
    shape = AttentionShape(n_heads=6, n_groups=2, head_dim=head_dim, block_size=block_size)
    check_attention([(1, 37), (1, 1), (5, 5), (3, 40)], shape)


@pytest.mark.parametrize(("window", "softcap"), [(None, 3.0), (9, None), (40, 2.0), (1, None)])
def test_attention_with_window_and_cap(window, softcap):
    shape = AttentionShape(n_heads=4, n_groups=4, head_dim=64)
    spans = [(1, 3), (1, 70), (9, 60), (1, 50), (2, 2)]
    check_attention(spans, shape, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype):
    check_attention([(1, 70), (12, 50)], AttentionShape(n_heads=4, n_groups=1), dtype=dtype)


def test_attention_of_decodes_alone_and_spans_alone():
    shape = AttentionShape(n_heads=14, n_groups=2, head_dim=64)
    check_attention([(1, 200), (1, 16), (1, 17)], shape)
    check_attention([(40, 40), (2, 90)], shape)


@pytest.mark.parametrize("n_splits", [1, 3, 16])
def test_decode_is_the_same_for_any_number_of_splits(n_splits, monkeypatch):
    monkeypatch.setattr(triton_attention, "n_splits_for", lambda rows, groups: n_splits)
    check_attention([(1, 200), (1, 5), (1, 64)], AttentionShape(), window=None)
    check_attention([(1, 200), (1, 5), (1, 64)], AttentionShape(), window=70)


@pytest.mark.parametrize(("head_dim", "n_groups", "block_size"), [(80, 3, 16), (64, 1, 32)])
@pytest.mark.parametrize("window", [None, 50])
def test_attention_over_keys_gathered_for_bulk_reads(head_dim, n_groups, block_size, window):
    shape = AttentionShape(n_heads=6, n_groups=n_groups, head_dim=head_dim, block_size=block_size)
    spans = [(1, 40), (1, 3), (200, 200), (2, 129), (60, 300)]
    check_attention(spans, shape, dtype=torch.float16, window=window)


def test_attention_reads_queries_out_of_the_joint_projection():
    case = make_attention_case([(1, 20), (4, 9)], AttentionShape())
    q, k_cache, v_cache, layout = on_device(case)
    qkv = torch.randn(q.shape[0], 8, 16, device=DEVICE)
    qkv[:, :4] = q
    got = triton_attention.paged_attention_triton(qkv[:, :4], k_cache, v_cache, layout, scale=0.2)
    expected = attention.paged_attention_reference(q, k_cache, v_cache, layout, scale=0.2)
    assert relative_error(got, expected) < 2e-6


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("width", [96, 576, 1100])
def test_rms_norm(width, unit_offset):
    wide = random(5, 2 * width)
    x, residual, weight = wide[:, :width], random(5, width, seed=1), random(width, seed=2)
    got = triton_norm.rms_norm_triton(x, weight, 1e-5, unit_offset=unit_offset)[0]
    assert relative_error(
        got, norm.rms_norm_reference(x, weight, 1e-5, unit_offset=unit_offset)
    ) < (1e-6)
    got = triton_norm.rms_norm_triton(x, weight, 1e-5, unit_offset=unit_offset, residual=residual)
    expected = norm.add_rms_norm_reference(x, residual, weight, 1e-5, unit_offset=unit_offset)
    assert relative_error(got[0], expected[0]) < 1e-6
    assert torch.equal(got[1], expected[1])


def test_rms_norm_of_heads_inside_a_projection():
    qkv, weight = random(4, 6, 64), random(64, seed=1)
    got = triton_norm.rms_norm_triton(qkv[:, :3], weight, 1e-6)[0]
    assert relative_error(got, norm.rms_norm_reference(qkv[:, :3], weight, 1e-6)) < 1e-6


@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 40), (96, 48), (64, 8), (48, 20)])
def test_rotary_and_store(head_dim, half):
    n_rows, n_heads, n_groups = 5, 9, 3
    qkv = random(n_rows, n_heads + 2 * n_groups, head_dim)
    q, k, v = qkv.split((n_heads, n_groups, n_groups), dim=1)
    angles = random(40, half, seed=1)
    positions = torch.tensor([3, 39, 0, 7, 7], device=DEVICE)
    slots = torch.tensor([33, 2, 16, 47, 5], device=DEVICE)
    caches = [random(3, 16, n_groups, head_dim, seed=s) for s in (2, 3)]
    expected_caches = [c.clone() for c in caches]
    expected_q, expected_k = rotary.apply_rotary_reference(
        q, k, angles.cos(), angles.sin(), positions
    )
    attention.store_kv(expected_k, v, *expected_caches, slots)
    got = triton_rotary.rotate_and_store_triton(
        q, k, v, angles.cos(), angles.sin(), positions, *caches, slots
    )
    assert relative_error(got, expected_q) < 1e-6
    for cache, expected in zip(caches, expected_caches, strict=True):
        assert relative_error(cache, expected) < 1e-6


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_gated_activation(kind):
    gate_up = random(3, 2 * 1100)
    expected = activation.gated_activation_reference(gate_up, kind)
    assert relative_error(triton_activation.gated_activation_triton(gate_up, kind), expected) < 1e-6


@pytest.mark.parametrize("rank", [16, 8, 48])
@pytest.mark.parametrize("few", [True, False])
def test_lora_with_another_adapter_for_every_row(rank, few, monkeypatch):
    if not few:
        monkeypatch.setattr(triton_lora, "ROWS_EACH", 0)
    n_rows, d_in, d_out = 70, 300, 200
    index = torch.randint(0, 5, (n_rows,), generator=torch.Generator().manual_seed(0))
    index[20:60] = 2
    index = index.to(torch.int32).to(DEVICE)
    a, b = random(4, rank, d_in), random(4, d_out, rank, seed=1)  # slot 4 is beyond the table
    a[0], b[0] = 0, 0
    x, y = random(n_rows, d_in, seed=2), random(n_rows, d_out, seed=3)
    expected = lora.lora_add_reference(y.double(), x.double(), a.double(), b.double(), index)
    got = triton_lora.lora_add_triton(y.clone(), x, a, b, index)
    assert relative_error(got, expected) < 2e-6
    untouched = (index == 0) | (index == 4)
    assert torch.equal(got[untouched], y[untouched])
