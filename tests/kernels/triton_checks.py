"""Triton kernels against their references; on the CPU run with TRITON_INTERPRET=1.

Not collected by name: tests/kernels/test_triton.py runs this file, in a process of its own under
the interpreter, or here on a GPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.cases import AttentionShape, make_attention_case, relative_error

from invivo.engine.bypasses import BypassSpec, init_parameters
from invivo.engine.layer_backward import window_in_pages
from invivo.engine.recording import Recording
from invivo.engine.train_sequence import TrainSequence, next_token_labels
from invivo.engine.training_rows import Rows, TrainingRows
from invivo.engine.window import WindowTrainer
from invivo.kernels import (
    activation,
    activation_backward,
    affine,
    attention,
    attention_backward,
    cross_entropy,
    gated_norm,
    lora,
    norm,
    norm_backward,
    rotary,
    triton_activation,
    triton_affine,
    triton_attention,
    triton_attention_backward,
    triton_cross_entropy,
    triton_gated_norm,
    triton_lora,
    triton_norm,
    triton_pages,
    triton_rotary,
)
from invivo.models.cache import allocate_kv_cache
from invivo.models.config import LayerConfig, ModelConfig, RopeConfig
from invivo.models.load import random_model

# Those that choose between a kernel and plain torch.
MODULES = (
    activation, activation_backward, attention, attention_backward, cross_entropy, lora, norm,
    norm_backward, rotary,
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    if DEVICE == "cpu":
        from tests.kernels.interpreting import prepare_once_a_launch

        prepare_once_a_launch(monkeypatch)
        monkeypatch.setattr(triton_attention, "PROGRAMS", 16)  # few splits; more cost time alone


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
    shape = AttentionShape(n_heads=2, n_groups=2, head_dim=64)
    spans = [(1, 3), (1, 70), (9, 60), (1, 50), (2, 2)]
    check_attention(spans, shape, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype):
    check_attention([(1, 70), (12, 50)], AttentionShape(n_heads=4, n_groups=1), dtype=dtype)


def test_attention_of_decodes_alone_and_spans_alone():
    shape = AttentionShape(n_heads=14, n_groups=2, head_dim=64)
    check_attention([(1, 200), (1, 16), (1, 17)], shape)
    check_attention([(40, 40), (2, 90)], shape)


@pytest.mark.parametrize("many_heads", [1, 10**9])
@pytest.mark.parametrize("programs", [1, 6, 40])
@pytest.mark.parametrize("window", [None, 70])
def test_decodes_are_the_same_however_their_keys_are_cut(programs, many_heads, window, monkeypatch):
    monkeypatch.setattr(triton_attention, "PROGRAMS", programs)
    shape = AttentionShape(n_heads=4, n_groups=2)
    check_attention([(1, 200), (1, 5), (1, 64), (1, 65)], shape, window=window)


@pytest.mark.parametrize(
    "lengths", [[1], [9, 5000, 1, 70], [64] * 40, [3000, *[20] * 30], [1] * 70]
)
@pytest.mark.parametrize("n_groups", [1, 8])
@pytest.mark.parametrize("window", [0, 100])
def test_pieces_of_keys_are_of_one_length_and_as_many_as_the_device_wants(
    lengths, n_groups, window, monkeypatch
):
    monkeypatch.setattr(triton_attention, "CUT_ROWS", 32)
    tile, most = 32, triton_attention.MAX_PIECES
    layout = make_attention_case([(1, n) for n in lengths], AttentionShape()).layout
    layout.kv_len = layout.kv_len.to(DEVICE)
    cuts = triton_attention.decode_cuts(layout, n_groups, tile, window)
    rows, starts, ends, which = cuts.pieces.tolist()
    n_pieces = next((i for i, row in enumerate(rows) if row < 0), len(rows))
    assert set(rows[n_pieces:]) <= {-1}
    pieces = list(zip(rows, starts, ends, which, strict=True))[:n_pieces]
    first = [max(n - window, 0) // tile * tile if window else 0 for n in lengths]
    visible = [n - f for n, f in zip(lengths, first, strict=True)]
    per_group = triton_attention.PROGRAMS // n_groups
    least = max(sum(visible) / per_group, max(visible) / most)
    share = -(-least // tile) * tile
    wanted = []
    for row, (start, stop) in enumerate(zip(first, lengths, strict=True)):
        begins = list(range(start, stop, int(share)))
        for number, begin in enumerate(begins):
            end = min(begin + share, stop)
            wanted.append((row, begin, end, len(begins) * 2 * most + number))
    assert pieces == wanted
    assert cuts.arrived.tolist() == [[0] * n_groups] * len(lengths)
    assert triton_attention.decode_cuts(layout, n_groups, tile, window) is cuts


@pytest.mark.parametrize(("head_dim", "n_groups", "block_size"), [(80, 3, 16), (64, 1, 32)])
@pytest.mark.parametrize("window", [None, 50])
def test_attention_over_keys_gathered_for_bulk_reads(
    head_dim, n_groups, block_size, window, monkeypatch
):
    monkeypatch.setattr(triton_attention, "BULK_PAIRS", 1)
    shape = AttentionShape(n_heads=6, n_groups=n_groups, head_dim=head_dim, block_size=block_size)
    spans = [(1, 40), (1, 3), (200, 200), (2, 129), (60, 300)]
    check_attention(spans, shape, dtype=torch.float16, window=window)


@pytest.mark.parametrize("kept", [0, 2**25])
def test_rooms_for_gathered_keys_serve_one_layer_after_the_other(kept, monkeypatch):
    monkeypatch.setattr(triton_pages, "KEPT_BYTES", kept)
    monkeypatch.setattr(triton_attention, "BULK_PAIRS", 1)
    shape = AttentionShape(n_heads=2, n_groups=1, head_dim=64)
    case = make_attention_case([(1, 9), (257, 300)], shape, dtype=torch.float16)
    q, k_cache, _, layout = on_device(case)
    for seed in range(2):
        caches = [random(*k_cache.shape, dtype=k_cache.dtype, seed=seed + i) for i in (0, 7)]
        wide = [t.double() for t in (q, *caches)]
        expected = attention.paged_attention_reference(*wide, layout, scale=0.2)
        got = triton_attention.paged_attention_triton(q, *caches, layout, scale=0.2)
        assert relative_error(got, expected) < TOLERANCE[torch.float16]
    spans = triton_pages.spans_from(layout, 1)
    assert len(spans.rooms) == bool(kept)


@pytest.mark.parametrize(("block_size", "n_rows"), [(16, 1), (16, 48), (32, 70), (128, 200)])
def test_keys_and_values_of_a_text_out_of_their_pages(block_size, n_rows):
    caches = [random(9, block_size, 3, 24, dtype=torch.bfloat16, seed=s) for s in range(2)]
    blocks = torch.tensor([7, 0, 3, 8, 1, 2], device=DEVICE)[1:]
    got = triton_pages.gather_text_triton(*caches, blocks, n_rows)
    for rows, cache in zip(got, caches, strict=True):
        assert torch.equal(rows, attention_backward.gather_rows(cache, blocks, 0, n_rows))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3, 64), (4, 1100)])
def test_rows_kept_multiplied_and_shifted_keep_every_bit_where_nothing_changes(shape, dtype):
    # Small whole numbers: nothing is rounded, which the interpreter does in its own way.
    wide = random(shape[0], 2 * shape[1], *shape[2:]).mul(4).round().to(dtype)
    x = wide[:, : shape[1]]  # rows at a stride of their own
    x[0, 0], x[1, 0], x[2, 0] = -0.0, torch.inf, torch.nan
    kept = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    factor, shift = torch.ones_like(kept, dtype=dtype), torch.full_like(kept, -0.0, dtype=dtype)
    kept[2], shift[2] = False, random(*shape[1:], dtype=dtype, seed=1)  # set
    kept[3, 0] = False  # zero
    factor[1] = -1.5
    shift[0, -1] = 0.25
    got = triton_affine.affine_triton(x, kept, factor, shift)
    expected = affine.affine_reference(x, kept, factor, shift)
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit(), expected.signbit())
    assert torch.equal(got[0, 0].signbit(), x[0, 0].signbit())


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


@pytest.mark.parametrize("window", [None, 40])
def test_log_sum_exps_of_spans(window):
    case = make_attention_case([(1, 9), (3, 40), (70, 130)], AttentionShape(head_dim=64))
    q, k_cache, v_cache, layout = on_device(case)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=DEVICE)
    triton_attention.paged_attention_triton(
        q, k_cache, v_cache, layout, scale=0.2, window=window, lse=lse
    )
    for span, row in ((1, 1), (2, 4)):
        rows = slice(row, layout.span_start_host[span + 1])
        start = layout.kv_len_host[span] - (rows.stop - rows.start)
        expected = attention_backward.attention_lse(
            q[rows].double(), k_cache.double(), layout.block_table[span], start,
            scale=0.2, window=window,
        )  # fmt: skip
        assert relative_error(lse[rows], expected) < 2e-6


def backward_case(n_rows, length, n_heads, n_groups, head_dim, dtype, **options):
    """Arguments of an attention backward in float64 and in ``dtype``, each with own sums."""
    shape = AttentionShape(n_heads=n_heads, n_groups=n_groups, head_dim=head_dim)
    q, k_cache, v_cache, layout = on_device(
        make_attention_case([(n_rows, length)], shape, dtype=dtype)
    )
    wide = [t.double() for t in (q, k_cache, v_cache)]
    z = attention.paged_attention_reference(*wide, layout, scale=0.2, **options)
    blocks, start = layout.block_table[0], length - n_rows
    lse = attention_backward.attention_lse(wide[0], wide[1], blocks, start, scale=0.2, **options)
    dz = random(n_rows, n_heads, head_dim, dtype=dtype, seed=3)
    sums = [random(length, n_groups, head_dim, seed=4 + i) for i in range(2)]
    narrow = (dz, q, k_cache, v_cache, blocks, start, z.to(dtype), lse.float())
    exact = (dz.double(), *wide, blocks, start, z, lse)
    return narrow, exact, sums


@pytest.mark.parametrize(
    ("n_rows", "length", "n_heads", "n_groups", "head_dim", "dtype", "window", "softcap"),
    [
        (70, 70, 4, 2, 16, torch.float32, None, None),
        (37, 150, 6, 2, 64, torch.float32, None, 3.0),
        (37, 150, 6, 2, 64, torch.float32, 9, 3.0),
        (60, 150, 6, 2, 80, torch.bfloat16, 40, None),
        (130, 130, 4, 4, 128, torch.float16, None, None),
        (1, 77, 2, 1, 256, torch.bfloat16, None, None),
    ],
)
@pytest.mark.parametrize("programs", [1, 10_000])  # heads of a group together, or each alone
def test_attention_backward(
    n_rows, length, n_heads, n_groups, head_dim, dtype, window, softcap, programs, monkeypatch
):
    monkeypatch.setattr(triton_attention_backward, "PROGRAMS", programs)
    options = {"window": window, "softcap": softcap}
    narrow, exact, sums = backward_case(
        n_rows, length, n_heads, n_groups, head_dim, dtype, **options
    )
    before = [total.double() for total in sums]
    after = [total.clone() for total in before]
    expected = attention_backward.attention_backward_reference(
        *exact, scale=0.2, dk=after[0], dv=after[1], **options
    )
    got = triton_attention_backward.attention_backward_triton(
        *narrow, scale=0.2, dk=sums[0], dv=sums[1], **options
    )
    assert relative_error(got, expected) < TOLERANCE[dtype]
    for total, old, new in zip(sums, before, after, strict=True):
        assert relative_error(total.double() - old, new - old) < TOLERANCE[dtype]


@pytest.mark.parametrize("programs", [1, 10_000])
def test_sums_that_hold_nothing_yet_are_written(programs, monkeypatch):
    monkeypatch.setattr(triton_attention_backward, "PROGRAMS", programs)
    narrow, exact, sums = backward_case(37, 37, 4, 2, 16, torch.float32)
    wanted = [torch.zeros_like(total, dtype=torch.float64) for total in sums]
    attention_backward.attention_backward_reference(
        *exact, scale=0.2, dk=wanted[0], dv=wanted[1], fresh=True
    )
    sums = [torch.full_like(total, torch.nan) for total in sums]
    triton_attention_backward.attention_backward_triton(
        *narrow, scale=0.2, dk=sums[0], dv=sums[1], fresh=True
    )
    for total, new in zip(sums, wanted, strict=True):
        assert relative_error(total, new) < TOLERANCE[torch.float32]


def test_attention_backward_of_values_alone():
    narrow, exact, (_, dv) = backward_case(40, 60, 4, 2, 32, torch.float32)
    expected = dv.double()
    arguments = [*exact[:6], None, exact[7]]
    attention_backward.attention_backward_reference(*arguments, scale=0.2, dv=expected)
    arguments = [*narrow[:6], None, narrow[7]]
    assert triton_attention_backward.attention_backward_triton(*arguments, scale=0.2, dv=dv) is None
    assert relative_error(dv, expected) < 2e-6


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("width", [96, 1100])
def test_rms_norm_backward(width, unit_offset):
    dy, x, beside = random(5, width), random(5, 2 * width, seed=1)[:, :width], random(5, width)
    weight = random(width, seed=2)
    for added in (None, beside):
        options = {"unit_offset": unit_offset, "beside": added}
        got = triton_norm.rms_norm_backward_triton(dy, x, weight, 1e-5, **options)
        expected = norm_backward.rms_norm_backward_reference(dy, x, weight, 1e-5, **options)
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("kind", activation.ACTIVATIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_gated_activation_backward(kind, in_place):
    gate_up, dy = random(3, 2 * 1100), random(3, 1100, seed=1)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.empty(3, 2200, dtype=torch.float64, device=DEVICE)
    y = activation_backward.gated_activation_backward_reference(
        dy.double(), gate, up, kind, expected
    )
    gate, up = gate_up.chunk(2, dim=-1)
    out, kept = torch.empty_like(gate_up), dy.clone()
    triton_activation.gated_activation_gradient_triton(dy, gate, up, kind, out)
    assert relative_error(out, expected) < 1e-6
    assert torch.equal(dy, kept)
    out = gate_up if in_place else torch.empty_like(gate_up)
    got = triton_activation.gated_activation_backward_triton(dy, gate, up, kind, out)
    assert relative_error(got, y) < 1e-6
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("width", [24, 128])
def test_gated_norm_and_its_gradients(width, monkeypatch):
    monkeypatch.setattr(triton_gated_norm, "TILE", 256)
    monkeypatch.setattr(triton_gated_norm, "PROGRAMS", 2)
    z, weight = random(7, 3 * width).view(7, 3, width), random(width, seed=1)
    r, dy = random(7, 3 * width, seed=2), random(7, 3 * width, seed=3)
    wide = [x.double() for x in (z, r, weight)]
    got = triton_gated_norm.gated_norm_triton(z, r, weight, 1e-5)
    assert relative_error(got, gated_norm.gated_norm_reference(*wide, 1e-5)) < 1e-6
    grads = triton_gated_norm.gated_norm_backward_triton(dy, z, r, weight, 1e-5)
    expected = gated_norm.gated_norm_backward_reference(dy.double(), *wide, 1e-5)
    for value, wanted in zip(grads, expected, strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_norm_in_half_precision(dtype):
    for seed in range(4):  # on a GPU, the last two by their launch alone
        z, weight = random(6, 64, seed=seed).view(6, 2, 32).to(dtype), random(32).to(dtype)
        r = random(6, 64, seed=9 + seed).to(dtype)
        got = triton_gated_norm.gated_norm_triton(z, r, weight, 1e-5)
        wide = [x.double() for x in (z, r, weight)]
        expected = gated_norm.gated_norm_reference(*wide, 1e-5)
        assert relative_error(got, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 20)])
def test_heads_turned_and_turned_back(head_dim, half):
    wide = random(5, 9, head_dim)
    angles = random(40, half, seed=1)
    positions = torch.tensor([3, 39, 0, 7, 7], device=DEVICE)
    tables = (angles.cos(), angles.sin(), positions)
    expected, _ = rotary.apply_rotary_reference(wide, wide[:, :0], *tables)
    room = torch.zeros(5, 12, head_dim, device=DEVICE)
    triton_rotary.turn_heads_triton(wide, *tables, room[:, 2:11], backward=False)
    assert relative_error(room[:, 2:11], expected) < 1e-6
    assert not room[:, :2].any()
    back = room[:, 2:11]
    triton_rotary.turn_heads_triton(back, *tables, back, backward=True)
    assert relative_error(back, wide) < 1e-6


@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 20), (48, 24)])
def test_gradients_before_the_rotary_embedding(head_dim, half):
    n_heads, n_groups = 5, 2
    dq = random(7, n_heads, head_dim, dtype=torch.float16)
    dk, dv = (random(9, n_groups, head_dim, seed=s)[1:8] for s in (1, 2))
    angles = random(40, half, seed=3)
    positions = torch.tensor([3, 39, 0, 7, 7, 8, 9], device=DEVICE)
    tables = (angles.cos(), angles.sin(), positions)
    wanted = torch.empty(7, n_heads + 2 * n_groups, head_dim, dtype=torch.float64, device=DEVICE)
    rotary.turn_back(dq.double(), dk.double(), dv.double(), *tables, wanted)
    got = torch.full_like(wanted, torch.nan, dtype=torch.float32)
    triton_rotary.turn_back_triton(dq, dk, dv, *tables, got)
    assert relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(softcap, weighted, monkeypatch):
    monkeypatch.setattr(triton_cross_entropy, "BLOCK", 64)
    hidden, head = random(7, 16), random(200, 16, seed=1)
    labels = torch.tensor([3, 199, -100, 0, 64, 63, 5], device=DEVICE)
    weights = torch.rand(7, device=DEVICE) if weighted else None
    expected = cross_entropy.cross_entropy_reference(
        hidden.double(), head.double(), labels, weights, softcap=softcap, want_logprobs=True
    )
    kept = labels != -100
    logits = hidden[kept] @ head.T
    weight = None if weights is None else weights[kept]
    logprobs = triton_cross_entropy.label_logprobs_triton(
        logits.clone(), labels[kept], weight, softcap=softcap, gradient=False
    )
    again = triton_cross_entropy.label_logprobs_triton(
        logits, labels[kept], weight, softcap=softcap, gradient=True
    )
    assert torch.equal(logprobs, again)
    assert relative_error(logprobs, expected.logprobs[kept]) < 1e-6
    assert relative_error(logits @ head, expected.d_hidden[kept]) < 5e-6


def test_training_through_the_kernels_equals_training_without(monkeypatch):
    """A LoRA beside every map, whole and small tapes, three windows, one of a row."""
    config = ModelConfig(
        family="llama", vocab_size=48, d_model=32, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48,
        max_positions=64, layers=(LayerConfig(), LayerConfig(window=5)),
        ropes=(RopeConfig(10_000.0, 16),),
    )  # fmt: skip
    specs = [BypassSpec("lora", ("q", "v", "o", "gate", "down"), 2)]
    decoder = random_model(config, device=DEVICE, seed=3)
    tokens = torch.randint(48, (40,), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(tape_bytes):
        parameters = {
            name: (value + 0.1 * random(*value.shape, seed=7)).requires_grad_()
            for name, value in init_parameters(specs[0], config, seed=1, device=DEVICE).items()
        }
        cache = allocate_kv_cache(
            config, n_blocks=4, block_size=16, device=DEVICE, dtype=torch.float32
        )
        trainer = WindowTrainer(
            decoder, cache, specs, parameters, order="layer", tape_bytes=tape_bytes
        )
        sequence = TrainSequence(tokens, next_token_labels(tokens), [2, 0, 3])
        trainer.begin(sequence)
        for start, stop in ((0, 17), (17, 18), (18, 40)):
            layout = window_in_pages(sequence, start, stop, 16)
            layout.positions = sequence.positions(start, stop)
            at = layout.positions
            layout.slots = sequence.table[at // 16] * 16 + at % 16
            piece = trainer.piece(sequence, start, stop, 0)
            rows = TrainingRows(None, [Rows(0, stop - start, trainer.bypass.window(start, stop))])
            recording = Recording(decoder, cache, rows, [piece])
            with torch.no_grad():
                hidden = decoder(
                    tokens[start:stop], layout, cache, bypass=recording.bypass, taps=recording
                )
                trainer.forward_done(sequence, start, stop, hidden)
        while (unit := trainer.next_unit(sequence, 23)) is not None:
            trainer.run(sequence, unit)
        return sequence.loss, {name: p.grad for name, p in parameters.items()}

    # As on a GPU: whole tables of angles.
    monkeypatch.setattr(type(decoder), "_ropes_at", lambda self, _: self._rope_tables())
    budgets = (None, 16_000)
    with monkeypatch.context() as plain:
        for module in MODULES:
            plain.setattr(module, "runs_triton", lambda *_: False)
        loss, expected = gradients(None)
    for module in MODULES:
        monkeypatch.setattr(module, "runs_triton", lambda *_: True)
        if hasattr(module, "runs_on_cpu"):
            monkeypatch.setattr(module, "runs_on_cpu", lambda *_: False)
    for budget in budgets:
        got_loss, got = gradients(budget)
        assert abs(float(got_loss - loss)) < 1e-3
        for name, wanted in expected.items():
            assert relative_error(got[name], wanted) < 2e-5, (budget, name)
