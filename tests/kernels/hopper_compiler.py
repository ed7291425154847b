"""Compiles Triton kernels for sm_90 without a GPU, exactly as their launchers would.

``compiled(call)`` runs a launcher on tensors of the "meta" device with a driver that only names
the target; kernels are compiled and not launched. The resources are those that ptxas gave them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from invivo.kernels import triton_launch

REGISTERS = 65_536  # of a multiprocessor
SHARED = 227 * 1024  # bytes of a program


class _Nowhere:
    """Stands for the driver of a Hopper GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one compiled kernel: per thread registers and bytes spilled, bytes shared, warps."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    wgmma: int  # matrix instructions of Hopper in its code


def compiled(call: Callable[[], object]) -> list[Resources]:
    """Every kernel that ``call`` would launch, once each, in order."""
    found: dict[int, object] = {}
    plain = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernel = plain(self, *args, grid=grid, warmup=True, **kwargs)
        found[id(kernel)] = kernel
        return kernel

    with (
        replaced(driver, "_active", _Nowhere()),
        replaced(JITFunction, "run", only_compile),
        replaced(triton_launch, "hooks_are_set", lambda: True),  # every launch is Triton's own
    ):
        call()
    return [resources(kernel) for kernel in found.values()]


def resources(kernel: object) -> Resources:
    usage = _usage(kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, _, local = map(int, found.groups())
    return Resources(
        name=kernel.metadata.name,
        registers=registers,
        spilled=stack + local,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
    )


def _usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
    return run.stdout


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
