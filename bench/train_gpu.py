"""Training speed on a GPU: tokens a second and memory of whole optimizer steps.

    PYTHONPATH=src python bench/train_gpu.py [--out FILE] [--seconds 150] [--only WORD,WORD]

Models of 340M and 1.3B parameters with 16,384 tokens a step in rows of 2,048, 8,192 and 16,384:
gated linear attention here (``gla``), a Transformer++ of the same size here with torch's cuDNN
attention (``transformer``), both as they are and compiled, and flash-linear-attention's own model
(``fla``, where its package can be imported; its first step compiles for minutes). Weights,
gradients and AdamW (fused) are float32, products bfloat16; a step is forward, backward, clipping
and update, on random tokens. ``check`` compares loss and gradients of a small model in bfloat16
with float64. Rows are printed as they come and written after each; a second call goes on where the
first stopped. ``--only`` takes the rows whose names hold one of the words, in the words' order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import relative_error
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.gla_config import gla_1b3, gla_340m, gla_model
from invivo.models.hub_config import config_from_hf
from invivo.training.loss_model import LossModel

BF16 = torch.bfloat16
TOKENS = 16_384
LENGTHS = (2048, 8192, 16_384)
VOCABULARY = 32_000
# width, layers, feed-forward, attention heads, tied embeddings
SIZES = {"340m": (1024, 24, 2816, 16, True), "1.3b": (2048, 24, 5632, 16, False)}
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "train-h200.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=150.0, help="start no row after this")
    parser.add_argument("--only", default="", help="rows whose names hold one of these words")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/train_gpu.py needs a CUDA device")
    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found |= {"device": torch.cuda.get_device_name(), "versions": versions()}
    found.setdefault("commands", []).append(shlex.join(["python", *sys.argv]))
    rows = found.setdefault("rows", {})
    for name, measure in chosen(args.only):
        if name in rows and "failed" not in rows[name]:
            continue
        if time.monotonic() - began > args.seconds:
            print("out of time: call again for the rest")
            break
        start = time.monotonic()
        try:
            rows[name] = measure()
        except Exception as error:  # a model that fails must not take the others with it
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:400]}
        rows[name]["took_s"] = round(time.monotonic() - start, 1)
        print(f"{time.monotonic() - began:6.1f} s", name, json.dumps(rows[name]), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        torch.compiler.reset()
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    import transformers
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "transformers": transformers.__version__}
    with contextlib.suppress(ImportError):
        from fla import __version__

        found["fla"] = __version__
    return found


def chosen(words: str) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    every = list(work())
    wanted = [word for word in words.split(",") if word]
    if not wanted:
        return every
    return [row for word in wanted for row in every if word in row[0]]


def work() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Rows by name, those that tell most for their seconds first."""
    yield "check", check
    for size in SIZES:
        for kind in ("gla", "transformer"):
            for length in LENGTHS:
                yield f"{kind} {size} {length}", partial(ours, kind, size, length)
        for kind in ("gla", "transformer"):
            for length in LENGTHS:
                name = f"{kind} compiled {size} {length}"
                yield name, partial(ours, kind, size, length, compile=True)
        for length in LENGTHS:
            yield f"fla {size} {length}", partial(fla, size, length)
        yield f"gla recomputed {size} 16384", partial(ours, "gla", size, 16_384, recompute="layer")


def config_of(kind: str, size: str, length: int) -> ModelConfig:
    if kind == "gla":
        return gla_340m(VOCABULARY) if size == "340m" else gla_1b3(VOCABULARY)
    width, layers, hidden, heads, tied = SIZES[size]
    return config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": length,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )


def filled(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(config, device="cuda", dtype=dtype)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.02)
        else:
            parameter.data.fill_(1.0)
    return decoder


def ours(kind: str, size: str, length: int, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    decoder = filled(config_of(kind, size, length))
    model = LossModel(decoder, dtype=BF16, **settings)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(ATTENTION, set_priority=True):
            nats, count = model(tokens, labels)
        return nats / count

    return speed(loss, list(decoder.parameters()), length)


def fla(size: str, length: int) -> dict[str, Any]:
    from fla.models import GLAConfig, GLAForCausalLM

    torch.manual_seed(0)
    width, layers, hidden, _, tied = SIZES[size]
    config = GLAConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_heads=4,
        expand_k=0.5,
        expand_v=1.0,
        use_short_conv=False,
        vocab_size=VOCABULARY,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    with torch.device("cuda"):
        model = GLAForCausalLM(config)
    model.train()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", BF16):  # it shifts the labels itself
            return model(input_ids=tokens, labels=tokens).loss

    return speed(loss, list(model.parameters()), length)


def speed(loss: Loss, parameters: list[nn.Parameter], length: int) -> dict[str, Any]:
    """Whole steps: the median of a few, timed one by one by device events."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)
    rows = torch.randint(VOCABULARY, (TOKENS // length, length + 1), device="cuda")
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    losses = []

    def step() -> None:
        value = loss(tokens, labels)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.detach())

    began = time.monotonic()
    step()
    torch.cuda.synchronize()
    first_s = time.monotonic() - began
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    ms = statistics.median(start.elapsed_time(end) for start, end in times)
    state = sum(p.numel() for p in parameters) * 12
    return {
        "tokens_per_s": round(TOKENS / ms * 1e3),
        "step_ms": round(ms, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "above_state_gib": round((torch.cuda.max_memory_allocated() - state) / 2**30, 2),
        "parameters": sum(p.numel() for p in parameters),
        "first_step_s": round(first_s, 1),
        "losses": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
    }


def check() -> dict[str, Any]:
    """A hybrid of four layers in bfloat16 on the kernels against float64 without them."""
    torch.manual_seed(0)
    config = gla_model(
        vocab_size=512, d_model=256, n_layers=4, conv_size=4, attention_layers=(2,), window=96
    )
    exact = filled(config, torch.float64)
    decoder = Decoder(config, device="cuda")
    for name, parameter in decoder.named_parameters():
        parameter.data.copy_(exact.get_parameter(name))
    tokens = torch.randint(512, (2, 300), device="cuda")
    starts = torch.zeros(2, 300, dtype=torch.bool)
    starts[0, 130] = starts[1, [7, 250]] = True
    found = {}
    for name, settings in {"plain": {}, "recomputed": {"recompute": "layer"}}.items():
        grads = []
        for module, dtype in ((decoder, BF16), (exact, torch.float64)):
            nats, count = LossModel(module, dtype=dtype, **settings)(tokens, tokens, starts)
            named = dict(module.named_parameters())
            grads.append(torch.autograd.grad(nats / count, list(named.values())))
            found[f"{name} {dtype} loss"] = round(float(nats.detach() / count), 5)
        errors = {
            which: relative_error(mine, wanted)
            for which, mine, wanted in zip(named, *grads, strict=True)
        }
        worst = max(errors, key=lambda which: errors[which])
        found[f"{name} worst gradient"] = [worst, round(errors[worst], 5)]
    return found


if __name__ == "__main__":
    main()
