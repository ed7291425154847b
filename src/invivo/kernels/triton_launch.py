"""Triton kernels launched again without Triton's whole look at every argument.

For every launch Triton asks each argument, through names and strings, what it would compile for,
and calls its (empty) chains of hooks: longer than the launch itself takes the host of an H200.
A :class:`Launch` is a kernel with its constants. Once it was launched by Triton with arguments of
a form, it finds the compiled kernel by a short key and starts it at once. The form is all that
Triton compiles for: types and dtypes, which numbers are 1, which numbers and addresses are
multiples of 16 (as far as the kernel lets Triton look at them).

Tensors must lie where the kernel runs; only the first launch of a form checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Compiled kernels are started as this Triton starts them; any other launches in its own way.
VERSION = "3.6."
TENSORS = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts a compiled kernel: ``call(x, y, z, stream, *first, *values, *last)``.

    Attributes:
        first: what is said of the kernel.
        last: its constants, as its last arguments.
    """

    call: Callable[..., None]
    first: tuple[Any, ...]
    last: tuple[Any, ...]

    @classmethod
    def of(cls, compiled: Any, constants: tuple[Any, ...]) -> Starter:
        """``compiled``: what Triton's launch gave back."""
        run, kernel = compiled.run, (compiled.packed_metadata, None, None, None)
        if getattr(run, "global_scratch_size", 1) or run.profile_scratch_size:
            return cls(run, (compiled.function, *kernel), constants)
        # No memory to allocate for a launch: what the driver's launcher would hand on at once.
        first = compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None
        return cls(run.launch, (*first, *kernel), constants)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What is asked of arguments of some types, by their places.

    Attributes:
        pointers: with the bits of an address that Triton asks for.
        integers: with the number that Triton compiles in (None: it asks for none), and the bits.
        tiles: descriptors.
        starters: by the answers.
    """

    pointers: list[tuple[int, int]]
    integers: list[tuple[int, int | None, int]]
    tiles: list[int]
    starters: dict[tuple[Any, ...], Starter]

    @classmethod
    def of(cls, kernel: JITFunction, types: tuple[type, ...]) -> _Pattern | None:
        """None for arguments that are not known here, or that Triton must complete."""
        pattern = cls([], [], [], {})
        if any(not param.is_constexpr for param in kernel.params[len(types) :]):
            return None
        for i, (kind, param) in enumerate(zip(types, kernel.params, strict=False)):
            if param.is_constexpr or param.annotation_type:
                return None
            looks = not param.do_not_specialize
            bits = 15 if looks and not param.do_not_specialize_on_alignment else 0
            if kind in TENSORS:
                pattern.pointers.append((i, bits))
            elif kind is int:
                pattern.integers.append((i, 1 if looks else None, bits))
            elif kind is TensorDescriptor:
                pattern.tiles.append(i)
            elif kind not in (float, bool, type(None)):
                return None
        return pattern

    def form(self, values: list[Any]) -> tuple[Any, ...] | None:
        """The answers for ``values``, in which addresses take the tensors' places; None where a
        number is too large for 32 bits."""
        key: list[Any] = []
        for i, bits in self.pointers:
            tensor = values[i]
            values[i] = address = tensor.data_ptr()
            key.append(tensor.dtype)
            if address & bits:
                key.append(i)
        for i, one, bits in self.integers:
            value = values[i]
            if not -(2**31) <= value < 2**31:
                return None
            key.append(1 if value == one else 16 if bits and not value & bits else 0)
        for i in self.tiles:
            tile = values[i]
            key += (tile.base.dtype, *tile.block_shape, tile.padding)
        return tuple(key)


class Launch:
    """``kernel[grid](*args, **sizes)`` as a call ``(grid, *args)``.

    In Triton's interpreter, and under a Triton that starts its kernels in another way, every
    launch is Triton's own.
    """

    def __init__(self, kernel: Any, **sizes: Any):
        """sizes: the kernel's constants, which all come last, and Triton's options."""
        self._kernel = kernel
        self._sizes = sizes
        self._patterns: dict[tuple[int, tuple[type, ...]], _Pattern | None] = {}
        known = isinstance(kernel, JITFunction) and triton.__version__.startswith(VERSION)
        constants = [param.name for param in kernel.params if param.is_constexpr] if known else []
        self._is_plain = not known or any(name not in sizes for name in constants)
        self._constants = () if self._is_plain else tuple(sizes[name] for name in constants)

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """
        Args:
            grid: one to three numbers.
            args: tensors, descriptors of them, numbers, or None.
        """
        if self._is_plain or hooks_are_set():
            self._plainly(grid, args)
            return
        device = driver.active.get_current_device()
        types = device, tuple(map(type, args))
        pattern = self._patterns.get(types)
        if pattern is None:
            pattern = self._patterns[types] = _Pattern.of(self._kernel, types[1])
        values = list(args)
        form = None if pattern is None else pattern.form(values)
        if pattern is None or form is None:
            self._plainly(grid, args)
            return
        starter = pattern.starters.get(form)
        if starter is None:
            compiled = self._plainly(grid, args)
            if compiled is not None:  # a hook may keep Triton from compiling
                pattern.starters[form] = Starter.of(compiled, self._constants)
            return
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        starter.call(x, y, z, stream, *starter.first, *values, *starter.last)

    def _plainly(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        return self._kernel[grid](*args, **self._sizes)


def start_at(
    compiled: Any, grid: tuple[int, int, int]
) -> Callable[[Sequence[Any], int], object] | None:
    """A call (arguments, stream) that starts what Triton's launch gave back.

    Args:
        compiled: the call takes the place of ``compiled[grid]``.

    Returns:
        None for what was not compiled.
    """
    if not hasattr(compiled, "packed_metadata"):
        return None
    if not triton.__version__.startswith(VERSION):
        runner = compiled[grid]
        return lambda arguments, stream: runner(*arguments, stream=stream)
    starter = Starter.of(compiled, ())
    return lambda arguments, stream: starter.call(*grid, stream, *starter.first, *arguments)


def hooks_are_set() -> bool:
    """Whether someone (a profiler) wants to see Triton's launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", None) or getattr(leave, "calls", None))
