"""The operations of ``native.c``: built once with the machine's C compiler, called through ctypes.

A CPU without a compiler runs the torch operations instead: the same numbers to rounding, slower.
``INVIVO_NATIVE=0`` in the environment does the same. The built library lies in the user's cache,
one for each source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_LOG = logging.getLogger(__name__)
_FLAGS = (
    *("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-fopenmp", "-fPIC"),
)
# Keys of one piece of work: small enough that two threads end together.
_PIECE = 128


class Native:
    """Float32 rows on a CPU. All tensors are contiguous but for the strides that are passed."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, integer, long, real = (
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_float,
        )
        self._paged_decode = library.paged_decode
        self._paged_decode.restype = integer
        self._paged_decode.argtypes = [
            *(pointer, long, pointer, pointer, pointer, long, pointer, long, pointer),
            *([integer] * 5),
            *(real, real, integer, integer, integer),
        ]
        self._add_rms_norm = library.add_rms_norm
        self._add_rms_norm.restype = None
        self._add_rms_norm.argtypes = [*([pointer] * 5), long, long, real, real, integer]
        self._rotate_and_store = library.rotate_and_store
        self._rotate_and_store.restype = None
        self._rotate_and_store.argtypes = [
            *(pointer, pointer, pointer, long, pointer, pointer, pointer, pointer, pointer, long),
            *([integer] * 5),
        ]
        self._silu_mul = library.silu_mul
        self._silu_mul.restype = None
        self._silu_mul.argtypes = [pointer, pointer, long, long, integer]

    def paged_decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of n spans of one row each: q [n, H, D], rows at any stride, -> [n, H, D].

        Args:
            k_cache, v_cache: [n_blocks, block_size, G, D].
            table: [n, >= max blocks] int32, rows at any stride.
            lengths: [n] int32, visible keys.
        """
        n, n_heads, width = q.shape
        out = torch.empty((n, n_heads, width), dtype=q.dtype)
        failed = self._paged_decode(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            n_heads * width,
            table.data_ptr(),
            table.stride(0),
            lengths.data_ptr(),
            n,
            k_cache.shape[1],
            n_heads,
            k_cache.shape[2],
            width,
            scale,
            softcap or 0.0,
            window or 0,
            _PIECE,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the pieces of attention")
        return out

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        unit_offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual); x, residual [..., d] contiguous, weight [d]."""
        width = x.shape[-1]
        out = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        self._add_rms_norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            total.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            eps,
            1.0 if unit_offset else 0.0,
            torch.get_num_threads(),
        )
        return out, total

    def rotate_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        """Turn q [T, H, D] and k [T, G, D] in place and write k and v to ``slots`` [T] int64.

        q, k and v have one stride between their rows; cos, sin [T, 1, D' / 2] contiguous.
        """
        n, n_heads, width = q.shape
        self._rotate_and_store(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            q.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            n,
            n_heads,
            k.shape[1],
            width,
            cos.shape[-1],
            torch.get_num_threads(),
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` for [T, 2 f] = (gate, up) side by side -> [T, f]."""
        n, width = gate_up.shape
        out = torch.empty((n, width // 2), dtype=gate_up.dtype)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), n, width // 2, torch.get_num_threads())
        return out


def native_for(*tensors: torch.Tensor) -> Native | None:
    """The library if it serves these: float32 on a CPU, no gradient asked for."""
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype != torch.float32 or (grad and tensor.requires_grad):
            return None
    return load_native()


@functools.cache
def load_native() -> Native | None:
    """The built library, built now if there is none yet; None where it cannot be had."""
    if os.environ.get("INVIVO_NATIVE") == "0" or sys.platform != "linux":
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _LOG.info("no C compiler: small operations on the CPU run through torch")
        return None
    try:
        return Native(_built(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _LOG.warning("native.c cannot be used, torch's operations run instead: %s", error)
        return None


def _built(compiler: str) -> Path:
    source = Path(__file__).with_name("native.c")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256()
    for part in (source.read_bytes(), version, _processor().encode(), repr(_FLAGS).encode()):
        key.update(hashlib.sha256(part).digest())
    folder = _cache_folder()
    library = folder / f"native-{key.hexdigest()[:20]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        compiled, linked = f"{work}/native.o", f"{work}/native.so"
        _run([compiler, *_FLAGS, "-c", str(source), "-o", compiled])
        # Without -fopenmp here: its symbols are found in the library that torch has loaded.
        _run([compiler, "-shared", "-o", linked, compiled, "-lm"])
        os.replace(linked, library)
    return library


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def _cache_folder() -> Path:
    home = os.environ.get("INVIVO_HOME")
    base = Path(home).expanduser() if home else Path.home() / ".cache" / "invivo"
    return base / "native"


def _processor() -> str:
    """What tells processors apart that need different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
