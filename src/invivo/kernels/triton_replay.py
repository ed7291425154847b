"""Several Triton launches as one pass, written down once and then launched again.

A pass is a function of a :class:`Room`, from which it takes all memory and through which it
launches all kernels, and of its input tensors. What it launches depends on the shapes, strides
and dtypes of the inputs and on numbers in its key alone: never on what they hold. The second time
that a pass comes with the same of these, its launches are written down: kernel, grid, arguments,
and for each pointer which input, output or piece of scratch memory it lies in. From then on the
pass is those launches at new addresses, with one allocation for all scratch memory. That leaves
out what takes the host's time: Triton's look at every argument, descriptors and small allocations.

A pass that cannot be written down runs plainly every time (in Triton's interpreter, or with a
Triton that hands out its kernels in another form).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from invivo.kernels.rounding import ceil_div
from invivo.kernels.triton_launch import hooks_are_set, start_at

ALIGN = 512  # bytes, as torch's allocator on GPUs
PASSES = 128  # kept at a time

Tensors = tuple[torch.Tensor | None, ...]
Start = Callable[[Sequence[Any], int], object]  # (arguments, stream)
Body = Callable[..., Tensors]  # (room, key, *inputs) -> outputs

_log = logging.getLogger(__name__)


class Room:
    """Memory and launches of one pass, taken as they come."""

    def __init__(self, device: torch.device):
        self.device = device

    def scratch(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the time of the pass, not initialised."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An output of the pass, not initialised."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **sizes: Any
    ) -> None:
        """``kernel[grid](*args, **sizes)``.

        Args:
            args: tensors (inputs, or what this room gave), descriptors of them, numbers.
            sizes: the kernel's constants.
        """
        kernel[grid](*args, num_warps=warps, num_stages=stages, **sizes)


class _Unrepeatable(Exception):
    """A pass cannot be written down."""


@dataclass(slots=True)
class _Launch:
    """One launch: ``arguments`` with nothing where addresses belong.

    Attributes:
        start: takes the arguments and a stream.
        pointers: (place among the arguments, memory, bytes from its start).
        tiles: the same for descriptors, with the descriptor's other fields.
    """

    start: Start
    arguments: list[Any]
    pointers: list[tuple[int, int, int]] = field(default_factory=list)
    tiles: list[tuple[int, int, int, dict[str, Any]]] = field(default_factory=list)

    def go(self, memories: list[int], stream: int) -> None:
        """memories: address of each input, output and the scratch memory."""
        arguments = self.arguments.copy()
        for place, memory, offset in self.pointers:
            arguments[place] = memories[memory] + offset
        for place, memory, offset, fields in self.tiles:
            described = object.__new__(TensorDescriptor)
            described.__dict__.update(fields)
            described.base = _Address(memories[memory] + offset)
            arguments[place] = described
        self.start(arguments, stream)


class _Address:
    """Stands for a tensor of which only the address is asked."""

    __slots__ = ("value",)

    def __init__(self, value: int):
        self.value = value

    def data_ptr(self) -> int:
        return self.value


class _Recorder(Room):
    """A room that writes down what is taken and launched."""

    def __init__(self, device: torch.device, inputs: Tensors):
        super().__init__(device)
        self._inputs = inputs
        self._results: list[torch.Tensor] = []
        self._pieces: list[tuple[torch.Tensor, int]] = []  # with their first bytes
        self._size = 0
        self._launches: list[tuple[Start, list[Any]]] = []

    def scratch(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        made = super().scratch(*shape, dtype=dtype)
        self._pieces.append((made, self._size))
        self._size += ceil_div(math.prod(shape) * dtype.itemsize, ALIGN) * ALIGN
        return made

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = super().result(shape, dtype)
        self._results.append(made)
        return made

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **sizes: Any
    ) -> None:
        compiled = kernel[grid](*args, num_warps=warps, num_stages=stages, **sizes)
        x, y, z = (*grid, 1, 1)[:3]
        start = start_at(compiled, (x, y, z))
        if start is None:
            raise _Unrepeatable(f"{kernel} is not compiled")
        values = [*args, *(sizes[name] for name in kernel.arg_names[len(args) :])]
        self._launches.append((start, values))

    def written(self, outputs: Tensors) -> _Written:
        """What was launched, with places instead of tensors."""
        # By object and not by address: inputs may overlap, and are other objects in any case.
        tensors = (*self._inputs, *self._results)
        memories = {id(t): i for i, t in enumerate(tensors) if t is not None}
        scratch = len(tensors)
        pieces = [(t.data_ptr(), t.nbytes, offset) for t, offset in self._pieces]

        def place(tensor: Any) -> tuple[int, int]:
            if id(tensor) in memories:
                return memories[id(tensor)], 0
            address = tensor.data_ptr()
            for begin, size, offset in pieces:  # or a part of one
                if begin <= address < begin + size:
                    return scratch, offset + address - begin
            raise _Unrepeatable("a tensor that is neither an input nor the room's")

        launches = []
        for start, values in self._launches:
            launch = _Launch(start, [None] * len(values))
            for i, value in enumerate(values):
                if isinstance(value, torch.Tensor):
                    launch.pointers.append((i, *place(value)))
                elif isinstance(value, TensorDescriptor):
                    fields = {k: v for k, v in vars(value).items() if k != "base"}
                    launch.tiles.append((i, *place(value.base), fields))
                else:
                    launch.arguments[i] = value
            launches.append(launch)
        order = [None if t is None else memories[id(t)] - len(self._inputs) for t in outputs]
        results = [(tuple(t.shape), t.dtype) for t in self._results]
        return _Written(self.device, launches, results, order, self._size)


@dataclass(slots=True)
class _Written:
    """A pass as launches.

    Attributes:
        results: shape and dtype of every output that is made.
        order: which of them are returned, None for what the pass does not give.
        size: bytes of scratch memory.
    """

    device: torch.device
    launches: list[_Launch]
    results: list[tuple[tuple[int, ...], torch.dtype]]
    order: list[int | None]
    size: int

    def again(self, inputs: Tensors) -> Tensors:
        made = [torch.empty(s, dtype=d, device=self.device) for s, d in self.results]
        scratch = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        memories = [0 if t is None else t.data_ptr() for t in (*inputs, *made, scratch)]
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        for launch in self.launches:
            launch.go(memories, stream)
        return tuple(None if i is None else made[i] for i in self.order)


@dataclass(slots=True)
class _Known:
    """What is known of a pass on inputs of one form."""

    is_seen: bool = False
    is_plain: bool = False  # cannot be written down
    written: _Written | None = None


@lru_cache(PASSES)
def _known(body: Body, key: Hashable, forms: tuple[Hashable, ...], device: torch.device) -> _Known:
    return _Known()


def run(body: Body, key: Hashable, *inputs: torch.Tensor | None) -> Tensors:
    """``body(room, key, *inputs)``, the launches alone where they are written down.

    Args:
        body: the pass, a function of a module; it changes no input, and returns what
            :meth:`Room.result` gave, or None.
        key: numbers on which the launches depend, beside the inputs' forms.
        inputs: the first is a tensor; all on its device.
    """
    first = inputs[0]
    assert first is not None
    known = _known(body, key, tuple(map(_form, inputs)), first.device)
    if known.written is not None and not hooks_are_set():
        try:
            return known.written.again(inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            known.written, known.is_plain = None, True
            _log.warning("%s is launched the long way from here on", body.__name__, exc_info=True)
    if known.is_seen and not known.is_plain:
        # Inputs of their own as objects, should two of them be one tensor.
        own = tuple(None if t is None else t.detach() for t in inputs)
        recorder = _Recorder(first.device, own)
        try:
            outputs = body(recorder, key, *own)
            known.written = recorder.written(outputs)
            return outputs
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what is wrong with the pass itself, the plain way says again
            known.is_plain = True
            _log.debug("%s cannot be written down", body.__name__, exc_info=True)
    known.is_seen = True
    return run_plainly(body, key, *inputs)


def run_plainly(body: Body, key: Hashable, *inputs: torch.Tensor | None) -> Tensors:
    """The same, every kernel launched by Triton: what :func:`run` is compared with."""
    first = inputs[0]
    assert first is not None
    return body(Room(first.device), key, *inputs)


def _form(x: torch.Tensor | None) -> Hashable:
    """All of a tensor that Triton compiles for, that a launch has among its numbers, or that
    makes it one the launcher would refuse."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0
