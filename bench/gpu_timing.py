"""What the GPU benches share: ceilings of the card, timing by graph replay, tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(slots=True)
class Ceilings:
    """What this card does on large plain work: bytes (read and written) and bf16 operations."""

    name: str
    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, n_bytes: float, n_flops: float = 0.0) -> float:
        """Least time for so much work."""
        return 1e3 * max(n_bytes / self.bytes_per_s, n_flops / self.flops_per_s)


@dataclass(slots=True)
class Row:
    """One measurement; ``error`` is a relative Frobenius error, ``other`` a rival's time."""

    what: str
    ms: float
    floor_ms: float
    error: float | None = None
    other_ms: float | None = None
    note: str = ""


def measure_ceilings() -> Ceilings:
    """Copy 4 GiB and multiply 8192 x 8192 bf16 matrices of random numbers."""
    source = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_s = event_ms(partial(target.copy_, source), 10) / 1e3
    n_bytes = 2 * source.numel() * 2
    del source, target
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    b = torch.randn(8192, 8192, device="cuda").bfloat16()
    multiply_s = event_ms(partial(torch.mm, a, b), 10) / 1e3
    return Ceilings(torch.cuda.get_device_name(), n_bytes / copy_s, 2 * 8192**3 / multiply_s)


def event_ms(call: Callable[[], object], repeat: int = 10) -> float:
    """Median time of one call, by device events around each."""
    for _ in range(3):
        call()
    pairs = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def graph_ms(calls: Sequence[Callable[[], object]], repeat: int = 10) -> float:
    """Time of one call inside a graph of all of them, as in a model: no launch gaps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return event_ms(graph.replay, repeat) / len(calls)


def device_ms(call: Callable[[], object], repeat: int = 3) -> float:
    """Time of one call that the device works, the durations of its kernels added up: what a host
    that keeps up would see, whoever writes the host's part."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeat):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA]
    return sum(e.self_device_time_total for e in kernels) / repeat / 1e3


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``, in float64."""
    wide = expected.double()
    return float((value.double() - wide).norm() / wide.norm())


def report(rows: list[Row], ceilings: Ceilings, path: Path) -> None:
    """Write all as JSON, then print a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "device": ceilings.name,
        "torch": torch.__version__,
        "copy_gb_per_s": ceilings.bytes_per_s / 1e9,
        "matmul_tflops": ceilings.flops_per_s / 1e12,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{ceilings.name}, torch {torch.__version__}")
    print(
        f"ceilings: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"matmul {ceilings.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    print(f"{'what':<46}{'ms':>9}{'floor':>9}{'of floor':>9}{'error':>10}{'rival':>9}  note")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        other = "" if row.other_ms is None else f"{row.other_ms:.4f}"
        share = f"{row.floor_ms / row.ms:.0%}" if row.ms else ""
        print(
            f"{row.what:<46}{row.ms:>9.4f}{row.floor_ms:>9.4f}{share:>9}{error:>10}{other:>9}"
            f"  {row.note}"
        )
