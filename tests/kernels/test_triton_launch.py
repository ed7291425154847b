"""Quick launches beside Triton's own: the same compiled kernel, started with the same arguments.

Nothing is compiled and there is no card: what stands in for a compiled kernel keeps the key under
which Triton compiles, and writes down how it was started.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime._allocation import NullAllocator
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels import triton_launch
from invivo.kernels.triton_launch import Launch, Starter

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(triton_launch.VERSION),
    reason="this Triton launches in its own way",
)


def _body(x, y, tile, n, stride, factor, wide, WIDTH: tl.constexpr, ADD: tl.constexpr):
    tl.store(x + tl.arange(0, WIDTH), tl.load(y + n * stride))


OPTIONS = {"do_not_specialize": ["n"], "do_not_specialize_on_alignment": ["y", "wide"]}
STARTS: list[tuple[object, ...]] = []


class Compiled:
    """Stands for the kernel that Triton compiles under ``key``."""

    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self, key):
        self.key = key

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        assert (function, packed) == (self.function, self.packed_metadata)
        STARTS.append(((x, y, z), stream, self.key, args))


class Card:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7


@pytest.fixture(autouse=True)
def _no_card(monkeypatch):
    def compiled(self, key, signature, device, constexprs, options, attrs, warmup):
        return self.device_caches[device][0].setdefault(key, Compiled(key))

    monkeypatch.setattr(driver, "_active", Card())
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    STARTS.clear()


@pytest.fixture
def looks(monkeypatch):
    """How often Triton looked at all arguments of a kernel."""
    seen = []
    plain = JITFunction.run

    def counted(self, *args, **kwargs):
        seen.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return seen


KINDS = (torch.float32, torch.bfloat16, torch.int64)
MEMORY = {kind: torch.zeros(64, dtype=kind) for kind in KINDS}
NUMBERS = (0, 1, -1, 8, 15, 16, -16, 48, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63)

tensors = st.builds(
    lambda kind, at: MEMORY[kind][at:], st.sampled_from(KINDS), st.integers(0, 9)
) | st.just(torch.nn.Parameter(torch.zeros(4)))
tiles = st.builds(
    lambda kind, rows: TensorDescriptor.from_tensor(MEMORY[kind].view(4, 16), [rows, 8]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([2, 4]),
)
numbers = st.sampled_from(NUMBERS)
# Ones and sixteens come as numbers and as truth, and as what takes a pointer's place.
loose = numbers | st.booleans() | st.floats(-2, 2, width=16) | st.none() | tensors
PLACES = (tensors, tensors | st.none(), tiles | tensors, numbers, numbers, loose, loose)
grids = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def launches(draw):
    """Some arguments, and again with one of them another: what tells forms apart."""
    first = draw(st.tuples(*PLACES))
    found = [first]
    for place, other in enumerate(PLACES):
        for value in draw(st.lists(other, min_size=3, max_size=6)):
            found.append((*first[:place], value, *first[place + 1 :]))
    return found


constants = st.fixed_dictionaries(
    {
        "WIDTH": st.sampled_from([1, 16, 32]),
        "ADD": st.booleans(),
        "num_warps": st.sampled_from([2, 4]),
    },
    optional={"num_stages": st.sampled_from([2, 3])},
)


def at_addresses(args):
    """Arguments as they reach the card."""
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]


@settings(max_examples=40, deadline=None)
@given(launches(), constants, grids)
def test_kernel_and_arguments_are_those_of_tritons_own_launch(asked, sizes, grid):
    kernel = triton.jit(**OPTIONS)(_body)
    launch = Launch(kernel, **sizes)
    for args in asked + asked:
        del STARTS[:]
        kernel[grid](*args, **sizes)
        launch(grid, *args)
        expected, got = STARTS
        assert got[:3] == expected[:3]
        values = at_addresses(expected[3])
        assert at_addresses(got[3]) == values
        assert list(map(type, at_addresses(got[3]))) == list(map(type, values))


def ready():
    return Launch(triton.jit(**OPTIONS)(_body), WIDTH=16, ADD=True)


def ask(launch, x, number=5):
    launch((3,), x, x, x, 3, number, 0.5, 1)


def test_triton_looks_once_at_arguments_of_a_form(looks):
    launch, memory = ready(), MEMORY[torch.float32]
    for at in (0, 4, 8, 12):  # 16 bytes apart
        ask(launch, memory[at:], number=5 + at)
    assert len(looks) == 1
    ask(launch, memory[1:])
    ask(launch, memory[3:])
    assert len(looks) == 2
    ask(launch, memory, number=16)
    ask(launch, memory, number=32)
    assert len(looks) == 3
    assert len(STARTS) == 8


def test_a_profilers_hooks_see_every_launch(looks):
    launch, seen = ready(), []
    ask(launch, MEMORY[torch.float32])
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        ask(launch, MEMORY[torch.float32])
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(looks) == 2


def test_constants_that_keep_their_default_are_left_to_triton(looks):
    def body(x, n, WIDTH: tl.constexpr = 16):
        tl.store(x + tl.arange(0, WIDTH), n)

    launch = Launch(triton.jit(body))
    for _ in range(2):
        launch((1,), MEMORY[torch.float32], 3)
    assert len(looks) == 2
    assert len(STARTS) == 2


@pytest.mark.parametrize("scratch", [0, 64])
def test_the_drivers_launcher_is_spared_where_it_only_hands_on(scratch):
    got, constants = [], (16, True)
    launcher = object.__new__(CudaLauncher)
    launcher.launch = lambda *args: got.append(args)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, True
    launcher.global_scratch_size, launcher.profile_scratch_size = scratch, 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 16
    compiled = SimpleNamespace(run=launcher, function=17, packed_metadata=(4, 1, 0))
    starter = Starter.of(compiled, constants)
    triton.set_allocator(lambda size, alignment, stream: (size, alignment, stream))
    try:
        starter.call(3, 2, 1, 7, *starter.first, 99, 1.5, *starter.last)
        launcher(3, 2, 1, 7, 17, (4, 1, 0), None, None, None, 99, 1.5, *constants)
    finally:
        triton.set_allocator(NullAllocator())
    assert got[0] == got[1]
    assert (starter.call is launcher) == bool(scratch)


def test_another_triton_launches_in_its_own_way(monkeypatch, looks):
    monkeypatch.setattr(triton, "__version__", "99.0")
    launch = ready()
    for _ in range(2):
        ask(launch, MEMORY[torch.float32])
    assert len(looks) == 2
