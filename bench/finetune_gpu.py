"""LoRA fine-tuning at the size of Llama-3-8B (random bf16 weights) beside the peft library.

    PYTHONPATH=src python bench/finetune_gpu.py [--layers 32] [--out FILE] [--smoke]

Rank 16 on down_proj, one text of 2,048 tokens a step, AdamW: forward, loss, backward, optimizer.
The rival is transformers' LlamaForCausalLM with peft's LoRA (scaled_dot_product_attention), with
and without gradient checkpointing; where peft is missing a plain LoRA module stands in and the
row says so. Ours runs layer by layer, once keeping whatever spares a large product and then with
the tape cut until the whole step takes an eighth (a quarter) of what peft takes beside the weights;
in rows with "host" a part of the tape waits in page-locked host memory, whose bytes are told.
The attention backward is the engine's own choice (cuDNN's for such texts), unless a row says
otherwise; other kernels for it and for the forward are candidates.

Memory is the allocator's peak less what stood there once the frozen weights were loaded: keys and
values, adapter, optimizer and the libraries' work spaces count on both sides. Times are medians of
steps after two warm-ups. The floor is the arithmetic of a step that runs nothing again, at the
rate of a large matrix product on the same card. Every part that fails is reported and left out;
results are written after each.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_timing import event_ms, measure_ceilings, relative_error
from invivo.engine import layer_backward
from invivo.engine.bypasses import BypassSpec, init_parameters
from invivo.engine.host_placement import HostRoom
from invivo.engine.host_shelf import HostShelf
from invivo.engine.job_spec import JobSpec
from invivo.engine.optimizer import Optimizer, total_norm
from invivo.engine.recording import Recording
from invivo.engine.train_sequence import TrainSequence, next_token_labels
from invivo.engine.training_rows import Rows, TrainingRows
from invivo.engine.window import WindowTrainer
from invivo.kernels import attention, attention_backward
from invivo.kernels.attention_backward import gather_rows
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.config import LayerConfig, ModelConfig, RopeConfig
from invivo.models.decoder import Decoder
from invivo.models.load import random_model

LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    d_model=4096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_positions=8192,
    layers=(LayerConfig(),) * 32,
    ropes=(RopeConfig(500_000.0, 128),),
)
RANK, ALPHA = 16, 32
LENGTH, LONG = 2048, 8192
HOST_BYTES = 4 << 30  # page-locked, where a row says "host"
EARLIER_PEFT_GIB = 14.8  # where peft cannot be measured
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Where the bench runs; on a CPU (smoke test) memory is not measured."""

    name: str

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def watch(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0

    def clean(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


class Results:
    """Rows and remarks, written after every change."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.body: dict[str, Any] = head | {"rows": [], "kernels": [], "failed": []}
        self.started = time.perf_counter()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.body, indent=1) + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that may fail alone."""
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.body["failed"].append({"part": name, "error": repr(error)[:2000]})
            print(f"FAILED {name}: {error!r}"[:1500], file=sys.stderr)
            print("".join(traceback.format_tb(error.__traceback__)[-4:]), file=sys.stderr)
        now = time.perf_counter()
        print(f"[{now - self.started:5.1f} s] {name}: {now - begun:.1f} s", flush=True)
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "finetune-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--only", nargs="+", default=[], help="parts, by their names; all")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on any device")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("bench/finetune_gpu.py needs a CUDA device (or --smoke)")
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(LLAMA_8B, layers=(LayerConfig(),) * args.layers)
    length, long = LENGTH, LONG
    if args.smoke:
        config = replace(
            config, vocab_size=320, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96,
            max_positions=256, ropes=(RopeConfig(500_000.0, 16),),
        )  # fmt: skip
        length, long = 40, 96
    results = Results(args.out, description(device))
    wanted = set(args.only)
    rate = 0.0
    if device.is_cuda:
        with results.part("ceilings"):
            ceilings = measure_ceilings()
            rate = ceilings.flops_per_s
            results.body["matmul_tflops"] = rate / 1e12
        device.clean()
    if not wanted or "kernels" in wanted:
        with results.part("kernels"):
            results.body["kernels"] = time_kernels(config, device, length)
        device.clean()
    floor = floor_of(config, length, rate)
    if not wanted or "peft" in wanted:
        with results.part("peft"):
            results.body["rows"] += time_rivals(config, device, length, args.steps, floor)
        device.clean()
    plain = next((row for row in results.body["rows"] if row["what"].startswith("peft")), None)
    limit = int(EARLIER_PEFT_GIB * GIB / 8) if plain is None else plain["peak_bytes"] // 8
    results.body["limit_bytes"] = limit
    with results.part("our weights"):
        dtype = torch.bfloat16 if device.is_cuda else torch.float32
        decoder = random_model(config, device=device.name, dtype=dtype)
        ours = Ours(decoder, device)
        for what, options in (
            ("ours, everything kept", {}),
            ("ours, an eighth of peft's memory", {"limit": limit}),
            ("the same, backward in halves", {"limit": limit, "rows": length // 2}),
            ("the same, torch's flash backward", {"limit": limit, "by": torch_flash_backward}),
            ("the same, our own backward", {"limit": limit, "by": our_own_backward}),
            ("ours, an eighth, a part on the host", {"limit": limit, "host": HOST_BYTES}),
            ("ours, a quarter of peft's memory", {"limit": 2 * limit}),
            ("ours, a quarter, a part on the host", {"limit": 2 * limit, "host": HOST_BYTES}),
            ("ours, everything kept, our own backward", {"by": our_own_backward}),
        ):
            if ("by" in options and not device.is_cuda) or (wanted and what not in wanted):
                continue
            with results.part(what):
                row = ours.measure(what, length, args.steps, floor, **options)
                results.body["rows"].append(row)
            device.clean()
        for what, options in (
            (f"ours, {long} tokens", {}),
            (f"ours, {long} tokens, a part on the host", {"host": 3 * HOST_BYTES}),
        ):
            if wanted and what not in wanted:
                continue
            with results.part(what):
                far = floor_of(config, long, rate)
                options |= {"limit": 4 * limit, "rows": length}
                results.body["rows"].append(ours.measure(what, long, 2, far, **options))
            device.clean()
        if device.is_cuda and (not wanted or "profile" in wanted):
            with results.part("profile"):
                results.body["profile"] = ours.profile(length, limit)
    show(results.body)
    results.save()


def description(device: Device) -> dict[str, Any]:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("peft", "triton"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = "missing"
    return {
        "device": torch.cuda.get_device_name() if device.is_cuda else "cpu",
        "versions": versions,
        "command": " ".join(sys.argv),
    }


def floor_of(config: ModelConfig, length: int, rate: float) -> float | None:
    """Milliseconds of the arithmetic of one step that runs nothing again.

    Forward and gradients by inputs are two operations a weight and token each; below the lowest
    adapter no gradient goes. Attention: half the pairs are seen, two products forward and five
    back.
    """
    if not rate:
        return None
    c = config
    qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    layer = c.d_model * (qkv + c.n_heads * c.head_dim + 3 * c.d_ff)
    back = c.n_layers - 1
    weights = 2 * (layer * (c.n_layers + back) + 2 * c.vocab_size * c.d_model) * length
    product = length * length * c.n_heads * c.head_dim  # causal: half of 2 L^2 H D
    return 1e3 * (weights + product * (2 * c.n_layers + 5 * back)) / rate


# --- attention's backward alone -------------------------------------------------------------------
def our_own_backward(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """The function of ``attention_backward`` by our own kernels, also where cuDNN serves."""
    from invivo.kernels.triton_attention_backward import attention_backward_triton

    return attention_backward_triton(*arguments, **options)


def torch_flash_backward(
    dz: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    z: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    fresh: bool = False,
) -> torch.Tensor | None:
    """The function of ``attention_backward`` by the kernel inside torch, without soft cap; a
    candidate, its sums change from run to run."""
    assert z is not None
    assert softcap is None
    stop = start + q.shape[0]
    k, v = (gather_rows(cache, blocks, 0, stop)[None] for cache in (k_cache, v_cache))
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    dq, d_keys, d_values = torch.ops.aten._flash_attention_backward(
        dz.contiguous()[None], q.contiguous()[None], k, v, z.contiguous()[None],
        lse.T.contiguous()[None], None, None, q.shape[0], stop, 0.0, True, seed, seed,
        scale=scale, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    for total, grad in ((dk, d_keys), (dv, d_values)):
        if total is not None:
            total[:stop] = grad[0] if fresh else total[:stop] + grad[0]
    return dq[0]


def forward_by_cudnn(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """A whole text's attention [s, H, D] with its log-sum-exps by cuDNN; a candidate."""
    k, v = (gather_rows(pages, blocks, 0, q.shape[0]) for pages in (k_cache, v_cache))
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, True, scale=scale
    )
    return found[0][0].transpose(0, 1)


def forward_by_flash(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same by the flash kernel inside torch."""
    n = q.shape[0]
    k, v = (gather_rows(pages, blocks, 0, n)[None] for pages in (k_cache, v_cache))
    found = torch.ops.aten._flash_attention_forward(
        q[None], k, v, None, None, n, n, 0.0, True, False, scale=scale
    )
    return found[0][0]


def time_kernels(config: ModelConfig, device: Device, length: int) -> list[dict[str, Any]]:
    """Attention forward with log-sum-exps and backward: error against float64, milliseconds."""
    found = []
    shape = (config.n_heads, config.n_kv_heads, config.head_dim)
    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    ways: list[tuple[str, Callable[..., Any]]] = [
        ("backward", attention_backward.attention_backward)
    ]
    if device.is_cuda:
        ways.append(("torch's flash backward", torch_flash_backward))
        ways.append(("our own backward", our_own_backward))
    # From the start, after a past, under a sliding window.
    cases = [(length // 4, 0, None), (length // 8, length // 8, None), (length // 4, 0, 100)]
    for name, call in ways:
        row: dict[str, Any] = {"what": name}
        try:
            row["errors"] = [backward_error(call, *shape, *case, dtype, device) for case in cases]
            if device.is_cuda:
                case = attention_case(*shape, length, 0, None, dtype, device)
                row["ms"] = event_ms(lambda call=call, case=case: call(*case[0], **case[1]), 20)
        except Exception as error:
            row["failed"] = repr(error)[:500]
        found.append(row)
        print(row, flush=True)
    if device.is_cuda:
        layout = contiguous_layout([length], device=device.name)
        (_, q, k, v, *_), _ = attention_case(*shape, length, 0, None, dtype, device)
        options = {"scale": config.head_dim**-0.5}
        ms = event_ms(lambda: attention.attention_with_lse(q, k, v, layout, **options), 20)
        found.append({"what": "forward with log-sum-exps", "ms": ms})
        found += time_other_forwards(shape, length, device, options["scale"])
    return found


def time_other_forwards(
    shape: tuple[int, int, int], length: int, device: Device, scale: float
) -> list[dict[str, Any]]:
    """A whole text's forward by the kernels inside torch, their gathering of keys included."""
    found = []
    for name, call in (("cuDNN", forward_by_cudnn), ("torch's flash", forward_by_flash)):
        row: dict[str, Any] = {"what": f"forward with log-sum-exps, {name}"}
        try:
            given, _ = attention_case(*shape, length, 0, None, torch.bfloat16, device)
            ask = partial(call, *given[1:5], scale)
            row["error"] = relative_error(ask(), given[6])
            row["ms"] = event_ms(ask, 20)
        except Exception as error:
            row["failed"] = repr(error)[:500]
        found.append(row)
        print(row, flush=True)
    return found


def attention_case(
    heads: int, groups: int, dim: int, rows: int, past: int, window: int | None,
    dtype: torch.dtype, device: Device,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of an attention backward over fresh random numbers."""
    total = rows + past

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device.name).to(dtype)

    n_blocks = -(-total // 16)
    q, dz = random(rows, heads, dim), random(rows, heads, dim)
    k, v = (random(n_blocks, 16, groups, dim) for _ in range(2))
    blocks = torch.arange(n_blocks, device=device.name)
    options = {"scale": dim**-0.5, "window": window}
    layout = contiguous_layout([total], device=device.name)
    if past:  # the same keys, only the last rows
        layout = replace(
            layout,
            span_start=torch.tensor([0, rows], dtype=torch.int32, device=device.name),
            span_start_host=[0, rows],
            prepared={},
        )
    z, lse = attention.attention_with_lse(q, k, v, layout, **options)
    if lse is None:
        lse = attention_backward.attention_lse(q, k, blocks, past, **options)
    sums = {name: torch.zeros(total, groups, dim, device=device.name) for name in ("dk", "dv")}
    return (dz, q, k, v, blocks, past, z, lse), options | sums


def backward_error(
    call: Callable[..., Any], heads: int, groups: int, dim: int, rows: int, past: int,
    window: int | None, dtype: torch.dtype, device: Device,
) -> list[float]:  # fmt: skip
    """Relative Frobenius errors of dq, dk and dv against float64."""
    arguments, options = attention_case(heads, groups, dim, rows, past, window, dtype, device)
    dz, q, k, v, blocks, start, _, _ = arguments
    wide = [t.double() for t in (dz, q, k, v)]
    plain = {name: options[name] for name in ("scale", "window")}
    layout = contiguous_layout([rows + past], device=device.name)
    layout = replace(layout, span_start_host=[0, rows])
    z = attention.paged_attention_reference(*wide[1:], layout, **plain)
    lse = attention_backward.attention_lse(wide[1], wide[2], blocks, start, **plain)
    sums = {name: torch.zeros_like(options[name], dtype=torch.float64) for name in ("dk", "dv")}
    wanted = attention_backward.attention_backward_reference(
        *wide, blocks, start, z, lse, **plain, **sums
    )
    got = call(*arguments, **options)
    pairs = [(got, wanted), (options["dk"], sums["dk"]), (options["dv"], sums["dv"])]
    return [relative_error(a, b) for a, b in pairs]


# --- invivo ---------------------------------------------------------------------------------------
class Ours:
    """Steps of one LoRA over the frozen decoder, as the engine's jobs do them."""

    def __init__(self, decoder: Decoder, device: Device) -> None:
        self.decoder = decoder
        self.device = device
        self.base = device.held()

    def measure(
        self,
        what: str,
        length: int,
        steps: int,
        floor: float | None,
        *,
        limit: int | None = None,
        rows: int | None = None,
        by: Callable[..., Any] | None = None,
        host: int = 0,
    ) -> dict[str, Any]:
        """Median time of a step and peak memory.

        Args:
            limit: bytes beside the weights; the tape is cut until the peak stays below.
            rows: of a backward unit; None = all.
            by: in place of the engine's attention backward.
            host: bytes of host memory that the tape may use.
        """
        shelf = HostShelf(HostRoom(host), self.decoder.embed.device) if host else None
        before = layer_backward.attention_backward
        if by is not None:
            layer_backward.attention_backward = by
        try:
            budget = None if limit is None else self.budget_within(limit, length, rows, shelf)
            job = Job(self.decoder, length, budget, rows, self.device, shelf)
            job.step()
            job.step()
            self.device.watch()
            times, parts, losses = [], [], []
            for _ in range(steps):
                self.device.wait()
                begun = time.perf_counter()
                loss, split = job.step()
                self.device.wait()
                times.append(time.perf_counter() - begun)
                parts.append(split)
                losses.append(loss)
            row = figures(what, length, times, self.device.peak() - self.base, losses, floor)
            row["tape_bytes"] = job.tape_bytes
            row["host_bytes"] = job.host_bytes
            row["run_again"] = job.run_again()
            row["parts_ms"] = {
                name: statistics.median(part[name] for part in parts) for name in parts[0]
            }
            row["within_limit"] = None if limit is None else row["peak_bytes"] <= limit
        finally:
            layer_backward.attention_backward = before
        print(brief(row), flush=True)
        return row

    def budget_within(
        self, limit: int, length: int, rows: int | None, shelf: HostShelf | None = None
    ) -> int:
        """The largest tape with which a step stays below ``limit`` bytes beside the weights."""
        least = Job.least_tape(self.decoder, length)
        budget = least
        if not self.device.is_cuda:
            return budget
        for _ in range(4):
            job = Job(self.decoder, length, budget, rows, self.device, shelf)
            self.device.watch()
            job.step()
            job.step()
            spare = limit - (self.device.peak() - self.base)
            # Beside copies under way the tape never fills its budget.
            held = budget if job.host_bytes else job.tape_bytes
            del job
            self.device.clean()
            if 0 <= spare < limit // 50:
                break
            budget = max(least, held + spare - limit // 100)
        return budget

    def profile(self, length: int, limit: int) -> list[dict[str, Any]]:
        """Where one step spends its time on the device."""
        from torch.profiler import ProfilerActivity, profile

        job = Job(self.decoder, length, self.budget_within(limit, length, None), None, self.device)
        job.step()
        job.step()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            job.step()
            self.device.wait()
        events = [e for e in recorded.key_averages() if e.self_device_time_total > 0]
        events.sort(key=lambda e: -e.self_device_time_total)
        return [
            {"kernel": e.key[:120], "ms": e.self_device_time_total / 1e3, "calls": e.count}
            for e in events[:40]
        ]


class Job:
    """Everything that training adds to the weights."""

    def __init__(
        self,
        decoder: Decoder,
        length: int,
        budget: int | None,
        rows: int | None,
        device: Device,
        shelf: HostShelf | None = None,
    ) -> None:
        config = decoder.config
        spec = BypassSpec("lora", ("down",), RANK, alpha=float(ALPHA))
        self.decoder = decoder
        self.device = device
        self.length = length
        self.rows = rows or length
        self.cache = allocate_kv_cache(
            config, n_blocks=blocks_needed([length]), block_size=16,
            device=device.name, dtype=decoder.embed.dtype,
        )  # fmt: skip
        self.parameters = {
            name: value.requires_grad_()
            for name, value in init_parameters(
                spec, config, seed=0, dtype=torch.float32, device=decoder.embed.device
            ).items()
        }
        self.trainer = WindowTrainer(
            decoder, self.cache, [spec], self.parameters,
            order="layer", tape_bytes=budget, shelf=shelf,
        )  # fmt: skip
        self.optimizer = Optimizer(JobSpec("bench", (spec,), steps=100), self.parameters)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (length,), generator=generator).to(device.name)
        blocks = list(range(blocks_needed([length])))
        self.sequence = TrainSequence(tokens, next_token_labels(tokens), blocks)
        self.layout = contiguous_layout([length], device=device.name)
        self.tape_bytes = self.host_bytes = 0

    @staticmethod
    def least_tape(decoder: Decoder, length: int) -> int:
        """Bytes of the smallest tape: with what a refusal names."""
        from invivo.engine.graph_pruning import differentiate
        from invivo.engine.tape_budget import Budgets
        from invivo.engine.trainable import Trainable
        from invivo.engine.training_graph import build_graph

        dtype = str(decoder.embed.dtype).removeprefix("torch.")
        graph = build_graph(
            decoder.config, [Trainable("lora", ("down",), RANK)], length=1, dtype=dtype
        )
        return -(-Budgets(decoder.config, graph, differentiate(graph)).least_bits * length // 8)

    def run_again(self) -> dict[str, int]:
        """How many layers' backward runs each map again."""
        plan = self.trainer.planned(self.length)
        counts: dict[str, int] = {}
        for layer in range(self.decoder.config.n_layers):
            for place in plan.rerun.get(layer, ()):
                counts[place] = counts.get(place, 0) + 1
        return counts

    @torch.no_grad()
    def step(self) -> tuple[float, dict[str, float]]:
        """Forward, loss, backward, optimizer: the loss per token, and milliseconds of each."""
        marks = Marks(self.device)
        trainer, sequence = self.trainer, self.sequence
        trainer.begin(sequence)
        assert sequence.tape is not None
        rows = TrainingRows(None, [Rows(0, self.length, trainer.bypass.window(0, self.length))])
        piece = trainer.piece(sequence, 0, self.length, 0)
        recording = Recording(self.decoder, self.cache, rows, [piece])
        self.layout.prepared.clear()
        marks.mark("forward")
        hidden = self.decoder(
            sequence.tokens, self.layout, self.cache, bypass=recording.bypass, taps=recording
        )
        self.tape_bytes = sequence.tape.n_bytes
        hosted = sequence.tape.hosted
        self.host_bytes = 0 if hosted is None else hosted.n_bytes
        marks.mark("loss")
        trainer.forward_done(sequence, 0, self.length, hidden)
        del hidden
        marks.mark("backward")
        while (unit := trainer.next_unit(sequence, self.rows)) is not None:
            trainer.run(sequence, unit)
        marks.mark("optimizer")
        gradients = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad
            parameter.grad = None
        assert sequence.loss is not None
        torch._foreach_div_(list(gradients.values()), float(sequence.n_labels))
        float(total_norm(gradients))
        self.optimizer.step(gradients, 1e-4)
        loss = float(sequence.loss) / sequence.n_labels
        return loss, marks.split()


class Marks:
    """Device events between the parts of a step."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """The part ``name`` begins."""
        if self._device.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def split(self) -> dict[str, float]:
        """Milliseconds of each part."""
        self.mark("end")
        self._device.wait()
        found = {}
        for (name, first), (_, second) in zip(self._marks, self._marks[1:], strict=False):
            apart = first.elapsed_time(second) if self._device.is_cuda else 1e3 * (second - first)
            found[name] = apart
        return found


# --- peft -----------------------------------------------------------------------------------------
class PlainLora(torch.nn.Module):
    """What stands in for peft: float32 matrices beside a frozen map, as peft has them."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        options = {"device": base.weight.device, "dtype": torch.float32}
        self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features, **options) * 0.01)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + (ALPHA / RANK * (x.float() @ self.a.T) @ self.b.T).to(y.dtype)


def time_rivals(
    config: ModelConfig, device: Device, length: int, steps: int, floor: float | None
) -> list[dict[str, Any]]:
    """transformers with a LoRA on every down_proj, without and with gradient checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if device.is_cuda else torch.float32
    hub = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device.name):
            model = LlamaForCausalLM(hub)
    finally:
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    device.clean()
    base = device.held()
    name = "peft"
    try:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["down_proj"])
        model = get_peft_model(model, lora)
    except ImportError:
        name = "peft's place taken by a plain LoRA module"
        for layer in model.model.layers:
            layer.mlp.down_proj = PlainLora(layer.mlp.down_proj)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.randint(config.vocab_size, (1, length), device=device.name)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    rows = []
    for suffix in ("", ", gradient checkpointing"):
        if suffix:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        step()
        step()
        device.watch()
        times, losses = [], []
        for _ in range(steps):
            device.wait()
            begun = time.perf_counter()
            losses.append(step())
            device.wait()
            times.append(time.perf_counter() - begun)
        rows.append(figures(name + suffix, length, times, device.peak() - base, losses, floor))
        print(brief(rows[-1]), flush=True)
    return rows


# --- figures --------------------------------------------------------------------------------------
def figures(
    what: str, length: int, times: list[float], peak: int, losses: list[float], floor: float | None
) -> dict[str, Any]:
    seconds = statistics.median(times)
    return {
        "what": what,
        "tokens": length,
        "ms": 1e3 * seconds,
        "floor_ms": floor,
        "tokens_per_s": length / seconds,
        "peak_bytes": peak,
        "losses": losses,
        "times_ms": [1e3 * t for t in times],
    }


def brief(row: dict[str, Any]) -> str:
    floor = "" if row["floor_ms"] is None else f"{row['floor_ms'] / row['ms']:.0%}"
    return (
        f"{row['what']:<44}{row['tokens']:>6}{row['ms']:>9.1f} ms{floor:>6}"
        f"{row['tokens_per_s']:>9.0f} tok/s{row['peak_bytes'] / GIB:>8.3f} GiB"
        f"  loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
    )


def show(body: dict[str, Any]) -> None:
    """The table, and the two ratios."""
    print(f"{body['device']}, {body['versions']}")
    for entry in body.get("profile", [])[:25]:
        print(f"  {entry['ms']:>8.2f} ms {entry['calls']:>5}  {entry['kernel'][:90]}")
    for row in body["kernels"]:
        print(row)
    rows = body["rows"]
    for row in rows:
        print(brief(row), row.get("run_again", ""), row.get("parts_ms", ""))
    rival = next((row for row in rows if row["what"].startswith("peft")), None)
    if rival is not None:
        for row in rows:
            if row["what"].startswith(("ours", "the same")) and row["tokens"] == rival["tokens"]:
                memory = row["peak_bytes"] / max(1, rival["peak_bytes"])
                speed = row["tokens_per_s"] / rival["tokens_per_s"]
                row["speed_of_peft"], row["memory_of_peft"] = speed, memory
                print(f"{row['what']:<44} {speed:.2f} x peft's speed, {memory:.3f} of its memory")
    for failure in body["failed"]:
        print("FAILED", failure["part"], failure["error"][:300])


if __name__ == "__main__":
    main()
