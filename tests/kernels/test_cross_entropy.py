"""The chunked loss against the plain one, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.kernels.cross_entropy import IGNORED, cross_entropy, cross_entropy_reference
from invivo.kernels.linear import pack


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_rows=st.integers(0, 17),
    vocabulary=st.integers(2, 30),
    rows=st.integers(1, 20),
    softcap=st.sampled_from([None, 2.0]),
    weighted=st.booleans(),
    every_row=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_pieces_give_what_all_logits_give(
    n_rows: int,
    vocabulary: int,
    rows: int,
    softcap: float | None,
    weighted: bool,
    every_row: bool,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_rows, 6, generator=rng, dtype=torch.float64)
    head = torch.randn(vocabulary, 6, generator=rng, dtype=torch.float64)
    labels = torch.randint(vocabulary, (n_rows,), generator=rng)
    labels[torch.rand(n_rows, generator=rng) < 0.4] = IGNORED
    weights = torch.rand(n_rows, generator=rng, dtype=torch.float64) if weighted else None
    asked: dict[str, Any] = {"softcap": softcap, "want_logprobs": True, "want_head_grad": True}
    wanted = cross_entropy_reference(hidden, head, labels, weights, **asked)
    got = cross_entropy(hidden, head, labels, weights, every_row=every_row, rows=rows, **asked)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.d_hidden, wanted.d_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.d_head, wanted.d_head, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.logprobs, wanted.logprobs, rtol=1e-11, atol=1e-12)
    assert int(got.n_labels) == int(wanted.n_labels) == int((labels != IGNORED).sum())


def test_gradient_agrees_with_finite_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    head = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    labels = torch.tensor([1, IGNORED, 4])
    gradient = cross_entropy(hidden, head, labels, softcap=1.5).d_hidden
    assert gradient is not None
    step = 1e-6
    for row in range(3):
        for column in range(4):
            values = []
            for sign in (1, -1):
                moved = hidden.clone()
                moved[row, column] += sign * step
                values.append(float(cross_entropy(moved, head, labels, softcap=1.5).loss))
            slope = (values[0] - values[1]) / (2 * step)
            assert abs(slope - float(gradient[row, column])) < 1e-8


def test_no_more_than_a_piece_of_logits_exists() -> None:
    vocabulary, rows = 5_000, 8
    hidden, head = torch.randn(256, 4), torch.randn(vocabulary, 4)
    labels = torch.zeros(256, dtype=torch.int64)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Sizes():
        cross_entropy(hidden, head, labels, rows=rows)
    assert largest <= rows * vocabulary


def test_half_precision_and_packed_heads_stay_close() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 32, generator=rng), torch.randn(200, 32, generator=rng)
    labels = torch.randint(200, (40,), generator=rng)
    wanted = cross_entropy_reference(hidden, head, labels)
    packed = cross_entropy(hidden, head, labels, packed=pack(head), rows=16)
    torch.testing.assert_close(packed.loss, wanted.loss)
    torch.testing.assert_close(packed.d_hidden, wanted.d_hidden, rtol=1e-4, atol=1e-5)
    half = cross_entropy(hidden.bfloat16(), head.bfloat16(), labels)
    assert half.loss.dtype == torch.float32
    assert half.d_hidden is not None
    assert half.d_hidden.dtype == torch.bfloat16
    torch.testing.assert_close(half.loss, wanted.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("want_grad", [True, False])
def test_nothing_is_returned_that_was_not_asked_for(want_grad: bool) -> None:
    labels = torch.tensor([IGNORED, IGNORED])
    for function in (cross_entropy, cross_entropy_reference):
        found = function(torch.randn(2, 3), torch.randn(4, 3), labels, want_grad=want_grad)
        assert float(found.loss) == 0.0
        assert int(found.n_labels) == 0
        assert found.logprobs is None
        assert (found.d_hidden is not None) == want_grad
