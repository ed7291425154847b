"""Gated linear attention: three forms of one definition, in float64, and the gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.kernels.gla import (
    gla,
    gla_from_logits,
    gla_parallel,
    gla_reference,
    gla_step,
    log_gates,
)
from invivo.kernels.gla_chunked_op import gla_chunked_op

TAUS = [16.0, 1.0, 0.3, 0.1, 0.01]


def inputs(
    lengths: list[int],
    *,
    heads: int = 2,
    d_k: int = 4,
    d_v: int = 3,
    tau: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
    """q, k, v, g; states before the spans; where the spans start."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    q, k, v = random(n, heads, d_k), random(n, heads, d_k), random(n, heads, d_v)
    g = log_gates(random(n, heads, d_k), tau)
    start = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [q, k, v, g], random(len(lengths), heads, d_k, d_v), start


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((a - b).double().norm() / b.double().norm().clamp(min=1e-30))


def grads_of(form: object, xs: list[torch.Tensor], state: torch.Tensor, start: list[int]) -> list:
    """Outputs and gradients of q, k, v, g and the initial state, for fixed random cotangents."""
    leaves = [x.clone().requires_grad_() for x in (*xs, state)]
    o, final = form(*leaves[:4], span_start=start, initial_state=leaves[4], want_state=True)
    rng = torch.Generator().manual_seed(99)
    do, dfinal = (torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in (o, final))
    back = torch.autograd.grad((o, final), leaves, (do.to(o.dtype), dfinal.to(final.dtype)))
    return [o.detach(), final.detach(), *back]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 130]), max_size=4).filter(
        lambda ns: 0 < sum(ns) < 200
    ),
    heads=st.integers(1, 3),
    d_k=st.integers(1, 5),
    d_v=st.integers(1, 5),
    tau=st.sampled_from(TAUS),
    seed=st.integers(0, 1000),
)
def test_chunks_give_the_recurrences_outputs_states_and_gradients(
    lengths: list[int], heads: int, d_k: int, d_v: int, tau: float, seed: int
) -> None:
    xs, state, start = inputs(lengths, heads=heads, d_k=d_k, d_v=d_v, tau=tau, seed=seed)
    wanted = grads_of(gla_reference, xs, state, start)
    for got, want in zip(grads_of(gla, xs, state, start), wanted, strict=True):
        assert got.shape == want.shape
        assert distance(got, want) < 1e-10


@pytest.mark.parametrize("tau", TAUS[:4])
@pytest.mark.parametrize("n", [1, 16, 70])
def test_the_parallel_form_is_the_recurrence(tau: float, n: int) -> None:
    xs, _, start = inputs([n], tau=tau)
    o, _ = gla_reference(*xs, span_start=start)
    assert distance(gla_parallel(*xs), o) < 1e-10
    assert distance(gla(*xs, span_start=start)[0], o) < 1e-10


@pytest.mark.parametrize("tau", TAUS[:4])
def test_float32_is_right_to_a_hundred_thousandth(tau: float) -> None:
    xs, state, start = inputs([200, 33], d_k=32, d_v=24, tau=tau, dtype=torch.float32)
    exact = grads_of(gla_reference, [x.double() for x in xs], state.double(), start)
    for got, want in zip(grads_of(gla, xs, state, start), exact, strict=True):
        assert got.dtype == torch.float32
        assert distance(got, want) < 1e-5


@pytest.mark.parametrize("tau", [16.0, 0.1])
@pytest.mark.parametrize(
    ("lengths", "d_k", "d_v"), [([8192], 32, 64), ([1, 15, 64, 0, 1000], 128, 64), ([90], 256, 512)]
)
def test_long_and_wide_spans_in_float32(lengths: list[int], d_k: int, d_v: int, tau: float) -> None:
    """Beside float64 chunks, which equal the recurrence (above)."""
    sizes = {"heads": 1, "d_k": d_k, "d_v": d_v, "tau": tau}
    xs, state, start = inputs(lengths, **sizes, dtype=torch.float32)
    exact = grads_of(gla, [x.double() for x in xs], state.double(), start)
    for got, want in zip(grads_of(gla, xs, state, start), exact, strict=True):
        assert distance(got, want) < 1e-5


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    xs, state, start = inputs([90], d_k=16, dtype=torch.bfloat16)
    exact, final = gla_reference(
        *(x.double() for x in xs),
        span_start=start,
        initial_state=state.double(),
        want_state=True,
    )
    o, ours = gla(*xs, span_start=start, initial_state=state.float(), want_state=True)
    assert (o.dtype, ours.dtype) == (torch.bfloat16, torch.float32)
    assert distance(o, exact) < 3e-3
    assert distance(ours, final) < 1e-5


def test_a_gate_of_exactly_zero_forgets_and_gives_no_gradient_through() -> None:
    xs, state, start = inputs([80], tau=0.5)
    xs[3][40] = -torch.inf
    xs[3][41, 0, 1] = -1e30
    got = grads_of(gla, xs, state, start)
    want = grads_of(gla_reference, xs, state, start)
    assert all(torch.isfinite(x).all() for x in got)
    for i in (0, 1, 2, 3, 4, 6):
        assert distance(got[i], want[i]) < 1e-10
    # Autograd makes 0 * exp'(-inf) of the gates themselves; the closed form says what is meant.
    others = torch.ones(80, dtype=torch.bool)
    others[40:42] = False
    assert distance(got[5][others], want[5][others]) < 1e-10
    cut, _ = gla(*(x[41:] for x in xs), span_start=[0, 39])
    no_write = gla(*(x[40:41] for x in xs), span_start=[0, 1], want_state=True)[1]
    after, _ = gla(*(x[41:] for x in xs), span_start=[0, 39], initial_state=no_write)
    assert distance(got[0][41:], after) < 1e-10
    assert distance(cut, after) > 1e-3


@pytest.mark.parametrize("tau", [16.0, 0.1])
def test_a_span_cut_anywhere_goes_on_from_its_state(tau: float) -> None:
    xs, state, start = inputs([150], tau=tau)
    whole = grads_of(gla, xs, state, start)

    def in_two(
        *leaves: torch.Tensor, span_start: list[int], initial_state: torch.Tensor, **_: bool
    ):
        first = [x[:67] for x in leaves]
        rest = [x[67:] for x in leaves]
        a, carried = gla(*first, span_start=[0, 67], initial_state=initial_state, want_state=True)
        b, final = gla(*rest, span_start=[0, 83], initial_state=carried, want_state=True)
        return torch.cat((a, b)), final

    for got, want in zip(grads_of(in_two, xs, state, start), whole, strict=True):
        assert distance(got, want) < 1e-10


def test_packed_spans_do_not_see_each_other() -> None:
    """One request's broken numbers stay its own."""
    xs, state, start = inputs([1, 15, 63, 64, 65])
    alone, _ = gla(*(x[79:143] for x in xs), span_start=[0, 64], initial_state=state[3:4])
    poisoned = [x.clone() for x in xs]
    for x in poisoned:
        x[:79] = torch.nan
        x[143:] = torch.nan
    state[:3] = torch.nan
    together, _ = gla(*poisoned, span_start=start, initial_state=state)
    assert torch.equal(together[79:143], alone)


@pytest.mark.parametrize("tau", [16.0, 0.1])
def test_steps_are_the_recurrence(tau: float) -> None:
    xs, state, _ = inputs([7, 7, 7], tau=tau)
    want, final = gla_reference(
        *xs, span_start=[0, 7, 14, 21], initial_state=state, want_state=True
    )
    pool = torch.full((9, *state.shape[1:]), torch.nan, dtype=torch.float64)
    slots = torch.tensor([5, 2, 8])
    pool[slots] = state
    for t in range(7):
        rows = torch.tensor([t, 7 + t, 14 + t])
        o = gla_step(*(x[rows] for x in xs), pool, slots)
        assert distance(o, want[rows]) < 1e-12
    assert distance(pool[slots], final) < 1e-12
    assert torch.isnan(pool[[0, 1, 3, 4, 6, 7]]).all()


def test_known_answers() -> None:
    (q, k, v, _), _, start = inputs([20])
    scores = torch.einsum("ihc,jhc->hij", q, k) * q.shape[-1] ** -0.5
    open_gates = torch.zeros_like(q)
    o, _ = gla(q, k, v, open_gates, span_start=start)
    assert distance(o, torch.einsum("hij,jhv->ihv", scores.tril(), v)) < 1e-12
    o, _ = gla(q, k, v, open_gates - torch.inf, span_start=start)
    assert distance(o, torch.einsum("hii,ihv->ihv", scores, v)) < 1e-12


def test_gates_from_logits_and_the_scale_given() -> None:
    (q, k, v, logits), _, start = inputs([20])
    g = torch.nn.functional.logsigmoid(logits) / 4
    want, _ = gla(q, k, v, g, span_start=start, scale=0.7)
    got, _ = gla_from_logits(q, k, v, logits, span_start=start, tau=4, scale=0.7)
    assert torch.equal(got, want)
    pools = [torch.zeros(3, 2, q.shape[-1], v.shape[-1], dtype=torch.float64) for _ in range(2)]
    row, slots = slice(3, 5), torch.tensor([2, 1])
    want = gla_step(q[row], k[row], v[row], g[row], pools[0], slots)
    got = gla_step(q[row], k[row], v[row], logits[row], pools[1], slots, tau=4)
    assert torch.equal(got, want)
    assert torch.equal(*pools)


def test_nothing_is_a_batch_too() -> None:
    xs, _, _ = inputs([1])
    none = [x[:0] for x in xs]
    for form in (gla, gla_reference):
        o, state = form(*none, span_start=[0, 0], want_state=True)
        assert o.shape == (0, 2, 3)
        assert state.shape == (1, 2, 4, 3)
        assert not state.any()


def compiled(form: object) -> object:
    """``form`` in one graph: every break is an error; the graph itself is run as it stands."""
    torch.compiler.reset()
    return torch.compile(form, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("tau", [16.0, 0.1])
def test_compiled_spans_are_one_graph_with_the_same_states_and_gradients(tau: float) -> None:
    xs, state, start = inputs([30, 0, 70], tau=tau)
    wanted = grads_of(gla, xs, state, start)
    for got, want in zip(grads_of(compiled(gla), xs, state, start), wanted, strict=True):
        assert torch.equal(got, want)


def test_compiled_gates_and_steps_are_one_graph() -> None:
    (q, k, v, logits), _, start = inputs([20])

    def from_logits(*xs: torch.Tensor) -> torch.Tensor:
        return gla_from_logits(*xs, span_start=start)[0]

    leaves = [x.requires_grad_() for x in (q, k, v, logits)]
    got, want = (form(*leaves) for form in (compiled(from_logits), from_logits))
    assert torch.equal(got, want)
    back = [torch.autograd.grad(x.sum(), leaves) for x in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*back, strict=True))

    row, slots = slice(3, 5), torch.tensor([2, 1])

    def step(pool: torch.Tensor) -> torch.Tensor:
        return gla_step(*(x[row].detach() for x in leaves), pool, slots, tau=16.0)

    pools = [torch.ones(3, 2, q.shape[-1], v.shape[-1], dtype=torch.float64) for _ in range(2)]
    assert torch.equal(compiled(step)(pools[0]), step(pools[1]))
    assert torch.equal(*pools)


@pytest.mark.parametrize("with_state", [False, True])
def test_the_operator_keeps_what_torch_asks_of_operators(with_state: bool) -> None:
    """Its schema, shapes without data, autograd, and tracing with sizes that vary."""
    xs, state, start = inputs([5, 3])
    leaves = [x.requires_grad_() for x in (*xs, state)]
    initial = leaves[4] if with_state else None
    torch.library.opcheck(gla_chunked_op, (*leaves[:4], torch.tensor(start), initial, 0.5))
