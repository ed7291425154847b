"""The Triton kernels of gated linear attention against its definition; on the CPU interpreted.

Not collected by name: test_triton_gla.py runs this file, in a process of its own under Triton's
interpreter, or here on a GPU. Every tensor that torch.empty makes is NaN until it is written.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.cases import relative_error

from invivo.kernels import triton_replay
from invivo.kernels.gla import gla_chunked, gla_reference, gla_step, log_gates
from invivo.kernels.triton_gla import ops, passes, tables
from invivo.kernels.triton_replay import Room, run_plainly

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
STEEP_TOLERANCE = 1e-4  # sums of strong gates keep fewer digits
NAMES = ("o", "final", "dq", "dk", "dv", "dg", "d_initial")


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    if DEVICE == "cpu":
        from tests.kernels.interpreting import prepare_once_a_launch

        prepare_once_a_launch(monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(lengths, *, heads=1, channels=16, width=16):
    """q, k, v, gate logits of packed spans; states before them; where they start."""
    rng = torch.Generator().manual_seed(0)
    n = sum(lengths)

    def random(*shape):
        return torch.randn(shape, generator=rng).to(DEVICE)

    rows = [random(n, heads, d) for d in (channels, channels, width, channels)]
    state = random(len(lengths), heads, channels, width)
    start = torch.tensor([0, *lengths]).cumsum(0)
    return rows, state, start


def results(form, rows, state, start):
    """Outputs, final states and gradients for fixed random cotangents."""
    leaves = [x.detach().clone().requires_grad_() for x in rows]
    before = None if state is None else state.detach().clone().requires_grad_()
    o, final = form(*leaves, span_start=start, initial_state=before, want_state=True)
    rng = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(x.shape, generator=rng).to(DEVICE, x.dtype) for x in (o, final)]
    wrt = leaves if before is None else [*leaves, before]
    return [o.detach(), final.detach(), *torch.autograd.grad((o, final), wrt, cotangents)]


def check(lengths, *, given=True, logits=False, tau=16.0, **sizes):
    rows, state, start = inputs(lengths, **sizes)
    if not logits:
        rows[3] = log_gates(rows[3], tau)
    before = state if given else None

    def triton_form(*tensors, span_start, **options):
        return ops.gla_triton(
            *tensors, span_start=span_start, tau=tau if logits else None, **options
        )

    def definition(q, k, v, g, *, span_start, **options):
        g = log_gates(g, tau) if logits else g
        return gla_reference(q, k, v, g, span_start=span_start.tolist(), **options)

    got = results(triton_form, rows, before, start.to(DEVICE, torch.int32))
    wide = [x.double() for x in rows]
    expected = results(definition, wide, None if before is None else before.double(), start)
    for name, value, wanted in zip(NAMES, got, expected, strict=False):
        assert value.shape == wanted.shape, name
        assert relative_error(value, wanted) < (STEEP_TOLERANCE if tau < 0.3 else TOLERANCE), name


@pytest.mark.parametrize("tau", [16.0, 0.3, 0.01])
def test_mild_and_steep_gates(tau):
    check([66, 3], tau=tau)


def test_packed_spans_of_every_kind():
    check([1, 15, 0, 16, 63, 64, 65], heads=2)


def test_without_a_state_before():
    check([5, 66], given=False)


def test_sizes_that_fill_no_tile():
    check([20], channels=24, width=40)


def test_several_tiles_of_channels_and_values():
    check([66], channels=72, width=136)


def test_gates_from_logits():
    check([3, 20], logits=True, tau=0.5)


def test_spans_cut_into_segments(monkeypatch):
    monkeypatch.setattr(passes, "segment_rows_for", lambda *_: 128)
    check([70, 0, 1, 300])


def test_couples_of_two_chunks_of_one_and_of_part_of_one():
    check([5, 200, 0, 128, 1])


def test_some_chunks_steep_and_some_mild():
    rows, state, start = inputs([80], heads=2)
    rows[3] = log_gates(rows[3])
    rows[3][66:71, 0] *= 4000
    rows[3][74, 0] = -torch.inf
    got = results(ops.gla_triton, rows, state, start.to(DEVICE, torch.int32))
    finite = [x.double() for x in rows]
    finite[3] = finite[3].clamp(min=-800.0)

    def definition(*tensors, span_start, **options):
        return gla_reference(*tensors, span_start=span_start.tolist(), **options)

    expected = results(definition, finite, state.double(), start)
    for name, value, wanted in zip(NAMES, got, expected, strict=True):
        assert relative_error(value, wanted) < STEEP_TOLERANCE, name


def test_queries_beside_keys_in_one_tensor():
    rows, _, start = inputs([30], heads=2)
    joined = torch.cat([x.flatten(1) for x in rows], dim=1)
    parts = [x.unflatten(1, (2, -1)) for x in joined.chunk(4, dim=1)]
    parts[3] = log_gates(parts[3])
    start = start.to(DEVICE, torch.int32)
    o, final = ops.gla_triton(*parts, span_start=start, want_state=True)
    again = ops.gla_triton(*[x.contiguous() for x in parts], span_start=start, want_state=True)
    assert torch.equal(o, again[0])
    assert torch.equal(final, again[1])


def test_not_a_number_stays_in_its_span():
    rows, _, start = inputs([30, 70, 40], heads=1)
    rows[3] = log_gates(rows[3])
    spoilt = [x.clone() for x in rows]
    for x in spoilt:
        x[30:100] = torch.nan
    start = start.to(DEVICE, torch.int32)
    o, _ = ops.gla_triton(*spoilt, span_start=start)
    clean, _ = ops.gla_triton(*rows, span_start=start)
    for rows_of in (slice(0, 30), slice(100, 140)):
        assert torch.equal(o[rows_of], clean[rows_of])
    assert o[30:100].isnan().all()


@pytest.mark.parametrize("logits", [False, True])
def test_one_token_in_place(logits):
    rows, _, _ = inputs([1, 1, 1], heads=2, channels=24, width=40)
    states = torch.randn(6, 2, 24, 40, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    slots = torch.tensor([4, 1, 5], device=DEVICE)
    if not logits:
        rows[3] = log_gates(rows[3])
    expected_states = states.double()
    wide = [x.double() for x in rows]
    if logits:
        wide[3] = log_gates(wide[3])
    expected = gla_step(*wide, expected_states, slots, scale=0.3)
    got = ops.gla_step_triton(*rows, states, slots, 0.3, 16.0 if logits else None)
    assert relative_error(got, expected) < 1e-6
    assert relative_error(states, expected_states) < 1e-6


def test_steps_follow_a_prompt():
    rows, _, _ = inputs([70], heads=2)
    rows[3] = log_gates(rows[3])
    ends = torch.tensor([0, 70], device=DEVICE, dtype=torch.int32)
    whole, final = ops.gla_triton(*rows, span_start=ends, want_state=True)
    ends = torch.tensor([0, 68], device=DEVICE, dtype=torch.int32)
    _, before = ops.gla_triton(*[x[:68] for x in rows], span_start=ends, want_state=True)
    states = torch.cat([torch.zeros_like(before), before])
    slots = torch.tensor([1], device=DEVICE)
    for t in (68, 69):
        o = ops.gla_step_triton(*[x[t : t + 1] for x in rows], states, slots, 0.25)
        assert relative_error(o, whole[t : t + 1]) < 1e-5
    assert relative_error(states[1:], final) < 1e-5


def test_operators_are_whole_for_the_compiler():
    rows, state, start = inputs([9, 3])
    rows[3] = log_gates(rows[3])
    leaves = [x.requires_grad_() for x in rows]
    start = start.to(DEVICE, torch.int32)
    arguments = (*leaves, start, state.requires_grad_(), 0.25, None, True)
    torch.library.opcheck(ops.gla_forward, arguments)
    plain = [x.detach() for x in rows]
    torch.library.opcheck(ops.gla_backward, (plain[2], None, *plain, start, None, 0.25, None))


def test_operators_give_what_the_call_gives():
    rows, state, start = inputs([9, 3])
    rows[3] = log_gates(rows[3])

    def operator(*tensors, span_start, initial_state, want_state):
        return ops.gla_forward(*tensors, span_start, initial_state, 0.25, None, want_state)

    start = start.to(DEVICE, torch.int32)
    for before in (None, state):
        called = results(ops.gla_triton, rows, before, start)
        for name, value, wanted in zip(
            NAMES, results(operator, rows, before, start), called, strict=False
        ):
            assert torch.equal(value, wanted), name


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cannot multiply bfloat16")
@pytest.mark.parametrize("tau", [16.0, 0.1])
@pytest.mark.parametrize(("channels", "width"), [(256, 512), (128, 256), (72, 136)])
def test_bfloat16_keeps_what_it_can(tau, channels, width):
    lengths = [70, 1, 0, 129, 64, 65, 127, 128, 300]
    rows, _, start = inputs(lengths, heads=2, channels=channels, width=width)
    rows = [*(x.to(torch.bfloat16) for x in rows[:3]), log_gates(rows[3], tau)]
    start = start.to(DEVICE, torch.int32)
    got = results(ops.gla_triton, rows, None, start)

    def definition(*tensors, span_start, **options):
        return gla_chunked(*tensors, span_start=span_start.tolist(), **options)

    wanted = results(definition, [x.double() for x in rows], None, start)
    for name, value, exact in zip(NAMES, got, wanted, strict=False):
        assert relative_error(value, exact) < (5e-3 if name == "dg" else 3e-3), name


# Lengths, heads, sizes, tau, dtype; few, for on a card each is compiled. The third is cut into
# segments there.
REPEATED = [([9, 3], 1, 16, 16, None, torch.float32)]
if DEVICE == "cuda":
    REPEATED += [
        ([70, 0, 130], 4, 256, 512, 16.0, torch.bfloat16),
        ([4096], 4, 128, 256, 16.0, torch.bfloat16),
        ([20, 300], 2, 72, 136, None, torch.bfloat16),
    ]


@pytest.mark.parametrize("case", REPEATED)
@pytest.mark.parametrize("joined", [False, True])
def test_passes_launched_again_give_the_same_bits(case, joined, caplog, monkeypatch):
    lengths, heads, channels, width, tau, kind = case
    caplog.set_level("DEBUG", "invivo.kernels.triton_replay")
    triton_replay._known.cache_clear()
    for turn in range(4 if DEVICE == "cuda" else 3):
        rows, state, start = inputs(lengths, heads=heads, channels=channels, width=width)
        rows = [x.roll(turn, 0).to(kind) for x in rows]
        rows[3] = rows[3].float() if tau else log_gates(rows[3])
        if joined:  # rows at the stride of their projection
            wide = torch.cat([x.flatten(1) for x in rows[:3]], dim=1)
            parts = wide.split([x[0].numel() for x in rows[:3]], dim=1)
            rows[:3] = [x.unflatten(1, (heads, -1)) for x in parts]
        start = start.to(DEVICE, torch.int32)
        tensors = (*rows, start, state if turn % 2 else state.roll(1, 1), 0.25, tau)
        dz, d_end = rows[2].flip(0), state.flip(0)

        def both(tensors=tensors, dz=dz, d_end=d_end):
            forward = passes.forward_pass(*tensors, True)
            return [*forward, *passes.backward_pass(dz, d_end, *tensors)]

        got = both()
        with monkeypatch.context() as plain:
            plain.setattr(passes, "run", run_plainly)
            wanted = both()
        for name, value, exact in zip(NAMES, got, wanted, strict=True):
            assert torch.equal(value, exact), (name, turn)
    # On a card, by launches alone; the interpreter has nothing that could be written down.
    assert bool(caplog.records) == (DEVICE == "cpu")


@pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs are a card's")
def test_passes_launched_again_on_another_stream_and_in_a_graph(monkeypatch):
    rows, state, start = inputs([70, 130], heads=2, channels=64, width=128)
    rows = [x.to(torch.bfloat16) for x in rows]
    start = start.to(DEVICE, torch.int32)
    dz, d_end = rows[2].flip(0), state.flip(0)

    def call():
        tensors = (*rows, start, state, 0.25, 16.0)
        return [
            *passes.forward_pass(*tensors, True),
            *passes.backward_pass(dz, d_end, *tensors),
        ]

    with monkeypatch.context() as plain:
        plain.setattr(passes, "run", run_plainly)
        wanted = call()
    triton_replay._known.cache_clear()
    for _ in range(2):
        call()
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        got = call()
    main.wait_stream(side)
    assert all(map(torch.equal, got, wanted))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    for x in rows:
        x.copy_(x.roll(1, 0))
    graph.replay()
    monkeypatch.setattr(passes, "run", run_plainly)
    assert all(map(torch.equal, held, call()))


@pytest.mark.parametrize("lengths", [[0], [63, 1], [0, 0, 200, 0, 64]])
@pytest.mark.parametrize("segment_rows", [0, 256])
def test_every_row_lies_in_one_chunk_and_one_segment(lengths, segment_rows):
    start = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    laid = tables.lay_out(Room(start.device), start, sum(lengths), segment_rows)
    units = {64: laid.chunks, 128: laid.couples, segment_rows or 10**6: laid.segments}
    for unit, table in units.items():
        found = [(a, a + n) for a, n, *_ in table.tolist() if n]
        wanted = [
            (at, min(at + unit, stop))
            for begin, stop in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)
            for at in range(begin, stop, unit)
        ]
        assert found == wanted
    chunk_rows = [a for a, *_ in laid.chunks.tolist()]
    for first, n, slot in [*laid.couples.tolist(), *laid.segments.tolist()]:
        assert n == 0 or chunk_rows[slot] == first
    for first, n, slot in laid.couples.tolist():
        for second in range(-(-n // 64)):
            rows = min(n - 64 * second, 64)
            assert laid.chunks[slot + second].tolist() == [first + 64 * second, rows, second]
