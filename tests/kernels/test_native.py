"""native.c and the torch operations that run without it give what the references give."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cases import AttentionShape, make_attention_case

from invivo.kernels import native
from invivo.kernels.activation import gated_activation, gated_activation_reference
from invivo.kernels.attention import paged_attention, paged_attention_reference, store_kv
from invivo.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from invivo.kernels.rotary import apply_rotary_reference, rotate_and_store

HAS_COMPILER = shutil.which("cc") is not None and os.name == "posix"


@pytest.fixture(scope="module", params=["native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which of the two runs."""
    if request.param == "native" and not HAS_COMPILER:
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVIVO_NATIVE", "1" if request.param == "native" else "0")
        native.load_native.cache_clear()
        assert (native.load_native() is None) == (request.param == "torch")
        yield request.param
    native.load_native.cache_clear()


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    chunk=st.integers(0, 5),
    window=st.sampled_from([None, 1, 8, 33, 200]),
    softcap=st.sampled_from([None, 3.0]),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2), (4, 4)]),
    width=st.sampled_from([4, 20, 64, 128]),
    block_size=st.sampled_from([4, 16, 32]),
    seed=st.integers(0, 1000),
)
def test_attention_of_decodes(
    way, lengths, chunk, window, softcap, heads, width, block_size, seed
) -> None:
    spans = [(1, n) for n in lengths] + ([(chunk, chunk + 7)] if chunk else [])
    shape = AttentionShape(
        n_heads=heads[0], n_groups=heads[1], head_dim=width, block_size=block_size
    )
    case = make_attention_case(spans, shape, dtype=torch.float32, seed=seed)
    options = {"scale": width**-0.5, "window": window, "softcap": softcap}
    out = paged_attention(case.q, case.k_cache, case.v_cache, case.layout, **options)
    expected = paged_attention_reference(case.q, case.k_cache, case.v_cache, case.layout, **options)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    n_decode=st.integers(0, 3),
    spans=st.lists(st.tuples(st.integers(2, 60), st.integers(0, 40)), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 8, 33]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 1000),
)
def test_attention_of_short_prefills_beside_decodes_and_long_ones(
    way, n_decode, spans, window, softcap, seed
) -> None:
    shape = AttentionShape(n_heads=6, n_groups=2, head_dim=20, block_size=16)
    spans = [(1, 9 + i) for i in range(n_decode)] + [(n, n + past) for n, past in spans]
    case = make_attention_case(spans, shape, dtype=torch.float32, seed=seed)
    options = {"scale": 0.2, "window": window, "softcap": softcap}
    expected = paged_attention_reference(case.q, case.k_cache, case.v_cache, case.layout, **options)
    for _ in range(2):  # the second call finds what the first has prepared
        out = paged_attention(case.q, case.k_cache, case.v_cache, case.layout, **options)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (3, 576)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms(way, shape, unit_offset) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    out = rms_norm(x, weight, 1e-5, unit_offset=unit_offset)
    torch.testing.assert_close(out, rms_norm_reference(x, weight, 1e-5, unit_offset=unit_offset))
    kept = (x.clone(), residual.clone())
    both = add_rms_norm(x, residual, weight, 1e-5, unit_offset=unit_offset)
    expected = add_rms_norm_reference(x, residual, weight, 1e-5, unit_offset=unit_offset)
    torch.testing.assert_close(both, expected)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize(("n_heads", "n_groups", "width", "turned"), [(3, 1, 8, 8), (4, 4, 12, 6)])
@pytest.mark.parametrize("n", [1, 7])
def test_rotary_and_store(way, n_heads, n_groups, width, turned, n) -> None:
    torch.manual_seed(n)
    qkv = torch.randn(n, (n_heads + 2 * n_groups) * width)
    angles = torch.randn(50, turned // 2)
    cos, sin = angles.cos(), angles.sin()
    positions, slots = torch.randint(50, (n,)), torch.randperm(3 * 16)[:n]

    def parts(source: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return source.view(n, -1, width).split((n_heads, n_groups, n_groups), dim=1)

    q, k, v = parts(qkv.clone())
    expected_q, expected_k = apply_rotary_reference(q, k, cos, sin, positions)
    expected = [torch.full((3, 16, n_groups, width), torch.nan) for _ in range(2)]
    store_kv(expected_k, v, *expected, slots)
    caches = [torch.full((3, 16, n_groups, width), torch.nan) for _ in range(2)]
    out = rotate_and_store(*parts(qkv.clone()), cos, sin, positions, *caches, slots)
    torch.testing.assert_close(out, expected_q)
    torch.testing.assert_close(caches, expected, equal_nan=True)


def test_gated_activation_over_its_whole_range(way) -> None:
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([0.0, torch.nan, -1e30, 1e30])))
    gate_up = torch.cat((gate, torch.linspace(-2, 2, gate.numel()))).repeat(9, 1)
    torch.testing.assert_close(
        gated_activation(gate_up, "silu"),
        gated_activation_reference(gate_up, "silu"),
        equal_nan=True,
        rtol=1e-6,
        atol=1e-30,
    )


def test_nan_of_a_row_stays_in_its_row(way) -> None:
    case = make_attention_case([(1, 40), (1, 30)], AttentionShape(), dtype=torch.float32)
    case.q[1] = torch.nan
    out = paged_attention(case.q, case.k_cache, case.v_cache, case.layout, scale=0.1)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_gradients_go_through_torch(way) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_working_compiler_torch_runs(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path))
    monkeypatch.delenv("INVIVO_NATIVE", raising=False)
    if compiler == "broken":
        (tmp_path / "cc").write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
    native.load_native.cache_clear()
    try:
        assert native.load_native() is None
        assert ("cannot be used" in caplog.text) == (compiler == "broken" and HAS_COMPILER)
        out = gated_activation(torch.ones(1, 4), "silu")
        torch.testing.assert_close(out, gated_activation_reference(torch.ones(1, 4), "silu"))
    finally:
        native.load_native.cache_clear()


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path))
    monkeypatch.delenv("INVIVO_NATIVE", raising=False)
    native.load_native.cache_clear()
    try:
        assert native.load_native() is not None
        built = list((tmp_path / "native").iterdir())
        assert len(built) == 1
        stamp = built[0].stat().st_mtime_ns
        native.load_native.cache_clear()
        assert native.load_native() is not None
        assert [path.stat().st_mtime_ns for path in (tmp_path / "native").iterdir()] == [stamp]
    finally:
        native.load_native.cache_clear()
