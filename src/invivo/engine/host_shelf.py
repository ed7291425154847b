"""Host memory, allocated once and page-locked, to which tensors go and from which they come back.

On a GPU each direction has a stream of its own, so that copies run beside the arithmetic. The rules
that keep them apart: a copy starts when the current stream has come so far that its source is there
(or its target free), and whoever lets go of a device tensor that a copy reads or writes, or uses
what it wrote, first makes the current stream wait for it (:meth:`Copy.wait`). On a CPU the same
calls are ordinary copies.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from invivo.engine.host_placement import HostRoom
from invivo.engine.memory import free_memory
from invivo.errors import InvalidRequest

ALIGNED = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy under way; ``done`` is None where it was over at once."""

    device: torch.device
    done: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Whatever the current stream does from here on comes after the copy."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)


class HostShelf:
    """Bytes of host memory, lent in pieces."""

    def __init__(self, room: HostRoom, device: torch.device) -> None:
        """
        Raises:
            InvalidRequest: more than half of the free memory.
        """
        n_bytes = room.n_bytes
        if n_bytes < 1:
            raise InvalidRequest("must be at least 1", field="host_bytes", given=n_bytes)
        if n_bytes > free_memory() // 2:
            raise InvalidRequest(
                f"is more than half of the {free_memory()} bytes that are free",
                field="host_bytes",
                given=n_bytes,
                remedy="Lock less memory",
            )
        self.room = room
        self.n_bytes = n_bytes
        self.device = device
        self._memory = torch.empty(n_bytes, dtype=torch.uint8)
        self._lent: list[tuple[int, int]] = []  # [start, stop), in order
        self._outward = self._homeward = None
        if device.type == "cuda":
            # Locked where it lies: the allocator of locked memory rounds up to powers of two.
            _check(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), n_bytes, 0))
            weakref.finalize(self, _unlock, self._memory, device)
            self._outward = torch.cuda.Stream(device)
            self._homeward = torch.cuda.Stream(device)

    @property
    def lent(self) -> int:
        """Bytes that are lent."""
        return sum(stop - start for start, stop in self._lent)

    def lend(self, n_bytes: int) -> int | None:
        """Where a free piece of so many bytes begins; None where there is none."""
        start = 0
        for at, (taken, stop) in enumerate([*self._lent, (self.n_bytes, self.n_bytes)]):
            if start + n_bytes <= taken:
                self._lent.insert(at, (start, start + n_bytes))
                return start
            start = -(-stop // ALIGNED) * ALIGNED
        return None

    def give_back(self, start: int) -> None:
        """The piece that begins at ``start`` is free. What is copied there from now on comes after
        all copies that read it."""
        self._lent = [piece for piece in self._lent if piece[0] != start]
        if self._outward is not None and self._homeward is not None:
            self._outward.wait_stream(self._homeward)

    def send(self, value: torch.Tensor, start: int) -> Copy:
        """Copy a contiguous tensor, which must neither change nor be freed before the copy is done,
        to the bytes from ``start`` on."""
        there = self._view(start, value.shape, value.dtype)
        if self._outward is None:
            there.copy_(value)
            return Copy(self.device)
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outward):
            there.copy_(value, non_blocking=True)
            return Copy(self.device, self._outward.record_event())

    def bring(
        self, start: int, shape: tuple[int, ...], dtype: torch.dtype, after: Copy
    ) -> tuple[torch.Tensor, Copy]:
        """A new tensor on the device with what ``after`` copied to the bytes from ``start`` on."""
        there = self._view(start, shape, dtype)
        value = torch.empty(shape, dtype=dtype, device=self.device)
        if self._homeward is None:
            return value.copy_(there), Copy(self.device)
        # Its memory may be that of a tensor which the current stream still reads.
        self._homeward.wait_stream(torch.cuda.current_stream(self.device))
        if after.done is not None:
            self._homeward.wait_event(after.done)
        with torch.cuda.stream(self._homeward):
            value.copy_(there, non_blocking=True)
            return value, Copy(self.device, self._homeward.record_event())

    def _view(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = 1
        for n in shape:
            count *= n
        return self._memory[start : start + count * dtype.itemsize].view(dtype).view(shape)


def _unlock(memory: torch.Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _check(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def _check(code: object) -> None:
    torch.cuda.check_error(int(code))  # type: ignore[call-overload]
