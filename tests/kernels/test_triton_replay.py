"""Passes written down and launched again, on a card that is not there.

The driver here compiles for Hopper as the real one does, and in the place of a launch does in
plain Python, at the addresses it is given, what the kernel would have done.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from tests.kernels.hopper_compiler import replaced
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels import triton_replay
from invivo.kernels.triton_replay import Room, run, run_plainly

ROWS = 32


@triton.jit
def _add_kernel(x, y, out, stride, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * stride) + factor * tl.load(y + at))


@triton.jit
def _read_tile_kernel(tiles, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.sum(tiles.load([0, 0]), 1))


def floats(place, n):
    """Numbers of a tensor, or at an address."""
    address = place if isinstance(place, int) else place.data_ptr()
    return (ctypes.c_float * n).from_address(address)


class Launcher:
    """What a kernel does, in Python; ``how`` holds the kinds of first arguments that came."""

    how: ClassVar[list[str]] = []

    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *args):
        assert (x, y, z, stream) == (1, 1, 1, 7)
        if self.name == "_add_kernel":
            first, second, out, stride, factor, n = args
            Launcher.how.append(type(first).__name__)
            first, second = floats(first, n * stride), floats(second, n)
            floats(out, n)[:] = [first[i * stride] + factor * second[i] for i in range(n)]
        else:
            tiles, out, n = args
            Launcher.how.append(type(tiles.base).__name__)
            assert tiles.shape[0] == n
            assert tiles.padding == "zero"
            row, numbers = tiles.shape[1], floats(tiles.base, n * tiles.shape[1])
            floats(out, n)[:] = [sum(numbers[i * row : (i + 1) * row]) for i in range(n)]


class Card:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, code, shared, device: (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(Launcher, "how", [])
    triton_replay._known.cache_clear()
    with replaced(driver, "_active", Card()):
        yield
    triton_replay._known.cache_clear()


def body(room: Room, key, x, y, more):
    """``2 (x + f y)``, sums of its half by eights, and sums of ``more`` [4, 8] by rows."""
    (factor,) = key
    options = {"warps": 1, "stages": 1}
    half = room.scratch(ROWS, dtype=torch.float32)
    whole = room.result((ROWS,), torch.float32)
    by_eights = room.result((4,), torch.float32)
    room.launch(_add_kernel, (1,), x, y, half, x.stride(0), factor, BLOCK=ROWS, **options)
    room.launch(_add_kernel, (1,), half, half, whole, 1, 1.0, BLOCK=ROWS, **options)
    tiles = TensorDescriptor.from_tensor(half.view(4, 8), [4, 8])
    room.launch(_read_tile_kernel, (1,), tiles, by_eights, BLOCK=4, **options)
    by_rows = None
    if more is not None:
        between = room.scratch(4, dtype=torch.float32)
        by_rows = room.result((4,), torch.float32)
        tiles = TensorDescriptor.from_tensor(more, [4, 8])
        room.launch(_read_tile_kernel, (1,), tiles, between, BLOCK=4, **options)
        room.launch(_add_kernel, (1,), between, between, by_rows, 1, 0.0, BLOCK=4, **options)
    return by_rows, whole, by_eights


def check(x, y, more=None, factor=0.5, by=run):
    by_rows, whole, by_eights = by(body, (factor,), x, y, more)
    half = x + factor * y
    assert torch.equal(whole, 2 * half)
    assert torch.allclose(by_eights, half.view(4, 8).sum(1), atol=1e-5)
    if more is None:
        assert by_rows is None
    else:
        assert torch.allclose(by_rows, more.sum(1), atol=1e-5)


def numbers(*shape):
    return torch.randn(*shape)


def took_the_short_way():
    """Of the launches since the last look: whether addresses alone came."""
    kinds, Launcher.how = set(Launcher.how), []
    assert kinds in ({"int", "_Address"}, {"Tensor"})
    return kinds != {"Tensor"}


@pytest.mark.parametrize("with_more", [False, True])
def test_from_the_third_time_on_launches_alone_are_repeated(with_more):
    torch.manual_seed(0)
    short = []
    for _ in range(4):
        check(numbers(ROWS), numbers(ROWS), numbers(4, 8) if with_more else None)
        short.append(took_the_short_way())
    assert short == [False, False, True, True]


def test_the_pass_itself_can_still_be_asked():
    torch.manual_seed(0)
    for _ in range(3):
        check(numbers(ROWS), numbers(ROWS))
    Launcher.how = []
    check(numbers(ROWS), numbers(ROWS), by=run_plainly)
    assert not took_the_short_way()


def test_other_forms_and_other_numbers_are_other_passes():
    torch.manual_seed(0)
    for _ in range(3):
        check(numbers(ROWS), numbers(ROWS))
    Launcher.how = []
    check(numbers(2 * ROWS)[::2], numbers(ROWS))
    assert not took_the_short_way()
    check(numbers(ROWS), numbers(ROWS), factor=2.0)
    assert not took_the_short_way()
    check(numbers(ROWS), numbers(ROWS))
    assert took_the_short_way()


def test_what_triton_looks_at_is_looked_at():
    x = numbers(ROWS + 4)
    form = triton_replay._form(x[:ROWS])
    assert triton_replay._form(x[4:]) == form, "16 bytes on"
    for other in (
        x[1 : ROWS + 1],  # not at a multiple of 16 bytes
        x[:ROWS].to("meta"),  # elsewhere: a launcher refuses a pointer to the host's memory
        x[:ROWS].half(),
        x[: ROWS - 1],
        numbers(2 * ROWS)[::2],
        None,
    ):
        assert triton_replay._form(other) != form


def test_one_tensor_as_two_inputs_is_not_taken_for_one():
    torch.manual_seed(0)
    x = numbers(ROWS)
    check(x, x)
    check(x, x)
    check(numbers(ROWS), numbers(ROWS))
    assert Launcher.how[-1] == "_Address"


def test_inputs_beside_each_other_in_one_tensor():
    torch.manual_seed(0)
    for _ in range(3):
        both = numbers(2 * ROWS)
        check(both[:ROWS], both[ROWS:])
    assert Launcher.how[-1] == "_Address"


def test_what_is_written_down_holds_no_tensor():
    torch.manual_seed(0)
    for _ in range(3):
        check(numbers(ROWS), numbers(ROWS), numbers(4, 8))
    forms = tuple(map(triton_replay._form, (numbers(ROWS), numbers(ROWS), numbers(4, 8))))
    known = triton_replay._known(body, (0.5,), forms, torch.device("cpu"))
    assert len(known.written.launches) == 5
    for launch in known.written.launches:
        assert not any(isinstance(value, torch.Tensor) for value in launch.arguments)


def test_a_launch_that_is_refused_goes_the_long_way_from_then_on(monkeypatch, caplog):
    torch.manual_seed(0)
    plain = Launcher.__call__

    def only_tensors(self, *args):
        if isinstance(args[9], int):
            raise TypeError("an address is no tensor")
        return plain(self, *args)

    monkeypatch.setattr(Launcher, "__call__", only_tensors)
    for _ in range(4):
        check(numbers(ROWS), numbers(ROWS))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert set(Launcher.how) == {"Tensor"}


def test_a_pass_with_memory_of_its_own_runs_plainly():
    def stray(room, key, x):
        own, out = torch.ones(ROWS), room.result((ROWS,), torch.float32)
        room.launch(_add_kernel, (1,), x, own, out, 1, 1.0, BLOCK=ROWS, warps=1, stages=1)
        return (out,)

    torch.manual_seed(0)
    for _ in range(4):
        x = numbers(ROWS)
        assert torch.equal(run(stray, (), x)[0], x + 1.0)
    assert set(Launcher.how) == {"Tensor"}


def test_out_of_memory_is_not_taken_for_a_launch_that_fails(monkeypatch):
    torch.manual_seed(0)
    for _ in range(3):
        check(numbers(ROWS), numbers(ROWS))
    empty = torch.empty

    def refused(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(torch.OutOfMemoryError):
        run(body, (0.5,), numbers(ROWS), numbers(ROWS), None)
    monkeypatch.setattr(torch, "empty", empty)
    Launcher.how = []
    check(numbers(ROWS), numbers(ROWS))
    assert took_the_short_way()
