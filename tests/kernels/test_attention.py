"""The reference against an independent formula, and the CPU path against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cases import AttentionShape, make_attention_case, relative_error

from invivo.kernels.attention import paged_attention, paged_attention_reference, store_kv
from invivo.kernels.paging import contiguous_layout

SMALL = AttentionShape()


def by_hand(case, row, head, scale, window, softcap):
    """One row and one head, in Python floats."""
    layout, shape = case.layout, case.k_cache.shape
    span = max(i for i, start in enumerate(layout.span_start_host[:-1]) if start <= row)
    index = layout.kv_len_host[span] - (layout.span_start_host[span + 1] - row)
    group = head // (case.q.shape[1] // shape[2])
    seen = range(0 if window is None else max(0, index - window + 1), index + 1)
    weights, values = [], []
    for key in seen:
        block = int(layout.block_table[span, key // shape[1]])
        k = case.k_cache[block, key % shape[1], group].tolist()
        values.append(case.v_cache[block, key % shape[1], group])
        score = scale * sum(a * b for a, b in zip(case.q[row, head].tolist(), k, strict=True))
        weights.append(score if softcap is None else softcap * math.tanh(score / softcap))
    exponentials = [math.exp(w - max(weights)) for w in weights]
    total = sum(exponentials)
    return sum(e / total * v for e, v in zip(exponentials, values, strict=True))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (7, 2.0)])
def test_reference_is_softmax_attention_over_visible_keys(window, softcap):
    case = make_attention_case([(1, 9), (1, 1), (4, 20), (3, 3)], SMALL, dtype=torch.float64)
    out = paged_attention_reference(
        case.q, case.k_cache, case.v_cache, case.layout, scale=0.3, window=window, softcap=softcap
    )
    for row in range(case.q.shape[0]):
        for head in range(case.q.shape[1]):
            expected = by_hand(case, row, head, 0.3, window, softcap)
            torch.testing.assert_close(out[row, head], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    decodes=st.lists(st.integers(1, 90), max_size=6),
    chunks=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), max_size=3),
    window=st.sampled_from([None, 1, 8, 33]),
    softcap=st.sampled_from([None, 3.0]),
    groups=st.sampled_from([1, 2, 4]),
    shuffled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cpu_path_equals_the_reference(decodes, chunks, window, softcap, groups, shuffled, seed):
    spans = [(1, n) for n in decodes] + [(rows + 1, rows + 1 + past) for rows, past in chunks]
    if not spans:
        return
    shape = AttentionShape(n_groups=groups)
    case = make_attention_case(spans, shape, dtype=torch.float64, seed=seed, shuffled=shuffled)
    arguments = (case.q, case.k_cache, case.v_cache, case.layout)
    options = {"scale": 0.25, "window": window, "softcap": softcap}
    expected = paged_attention_reference(*arguments, **options)
    for _ in range(2):  # the second call uses what the first prepared
        assert relative_error(paged_attention(*arguments, **options), expected) < 1e-12


def test_cpu_path_groups_many_decodes_and_cuts_long_chunks():
    lengths = [3, 700, 12, 650, 90, 88, 400, 1]
    spans = [(1, n) for n in lengths] + [(600, 900), (530, 530)]
    case = make_attention_case(spans, AttentionShape(n_heads=6, n_groups=2, head_dim=32))
    for window in (None, 200):
        arguments = (case.q, case.k_cache, case.v_cache, case.layout)
        expected = paged_attention_reference(*arguments, scale=0.2, window=window)
        got = paged_attention(*arguments, scale=0.2, window=window)
        assert relative_error(got, expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_path_in_half_precision(dtype):
    case = make_attention_case([(1, 50), (1, 33), (20, 60)], SMALL, dtype=dtype)
    arguments = (case.q, case.k_cache, case.v_cache, case.layout)
    expected = paged_attention_reference(*arguments, scale=0.25)
    got = paged_attention(*arguments, scale=0.25)
    assert got.dtype == dtype
    assert relative_error(got, expected) < 1e-2


def test_a_row_does_not_depend_on_its_neighbours():
    case = make_attention_case([(1, 60), (1, 61), (1, 20), (5, 30)], SMALL)
    arguments = (case.k_cache, case.v_cache)
    together = paged_attention(case.q, *arguments, case.layout, scale=0.25)
    case.k_cache[case.layout.block_table[2, :2].long()] += 5.0
    apart = paged_attention(case.q, *arguments, case.layout, scale=0.25)
    torch.testing.assert_close(together[:2], apart[:2], rtol=0, atol=0)
    torch.testing.assert_close(together[3:], apart[3:], rtol=0, atol=0)


def test_gradients_flow_through_queries_and_caches():
    case = make_attention_case([(1, 6), (3, 5)], SMALL, dtype=torch.float64)

    def attend(q, k_cache, v_cache):
        return paged_attention(q, k_cache, v_cache, case.layout, scale=0.25, softcap=4.0)

    k_cache, v_cache = case.k_cache.clamp(-3, 3), case.v_cache.clamp(-3, 3)
    inputs = [t[..., :4].clone().requires_grad_() for t in (case.q, k_cache, v_cache)]
    assert torch.autograd.gradcheck(attend, inputs)


def test_store_kv_writes_the_rows_of_the_layout():
    layout = contiguous_layout([3, 17], block_size=16)
    qkv = torch.randn(20, 6, 8)
    k, v = qkv[:, 2:4], qkv[:, 4:]
    k_cache, v_cache = torch.zeros(3, 16, 2, 8), torch.zeros(3, 16, 2, 8)
    store_kv(k, v, k_cache, v_cache, layout.slots)
    torch.testing.assert_close(k_cache[0, :3], k[:3])
    torch.testing.assert_close(v_cache[1:].flatten(0, 1)[:17], v[3:])
    assert k_cache[0, 3:].abs().max() == 0


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_a_block_held_before_never_reaches_a_row(window, softcap):
    spans = [(1, 3), (1, 18), (1, 30), (1, 17), (5, 21), (40, 40)]
    case = make_attention_case(spans, SMALL, dtype=torch.float32)
    layout, block_size = case.layout, case.layout.block_size
    options = {"scale": 0.25, "window": window, "softcap": softcap}
    expected = paged_attention(case.q, case.k_cache, case.v_cache, layout, **options)
    own = torch.zeros(case.k_cache.shape[0] * block_size, dtype=torch.bool)
    for span, length in enumerate(layout.kv_len_host):
        index = torch.arange(length)
        own[layout.block_table[span, index // block_size] * block_size + index % block_size] = True
    for cache in (case.k_cache, case.v_cache):
        cache.view(-1, *cache.shape[2:])[~own] = torch.nan
    layout.prepared.clear()
    got = paged_attention(case.q, case.k_cache, case.v_cache, layout, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
