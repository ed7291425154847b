"""Where the swings of the gradients' norm come from in gated linear attention.

    PYTHONPATH=src python bench/gla_gradients.py --text BOOK.txt --out DIR [--batches 24]

The shipped model (`gla-small`) reads batches of text as in training, and its weights stay as they
are. In a text's first row a head reads ``(q_1 k_1) v_1``, and the norm behind it divides by that
number's size: its gradient goes as 1 / |q_1 k_1|, so the sum over many texts, layers and heads has
a tail that falls as 1 / x. For each batch, with float32 and with bfloat16 products:

- ``first``: the norm of that part of all gradients which comes through the heads' first rows;
- ``rest``: the norm of the other part;
- where the largest gradient at a head lies, and how large its read is against the median one.

Rows are short, so that many begin; in a row of N tokens ``first`` weighs 1 / N of a token's loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from invivo.models.load import LoadedModel, load_model
from invivo.training import forward
from invivo.training.loss_model import LossModel

HERE = Path(__file__).parent


class Heads:
    """Watches what comes back to the heads' reads, and may hold the first rows' back."""

    def __init__(self, n_rows: int, length: int) -> None:
        self._shape = (n_rows, length)
        self.holds_first = False
        self.peaks: list[dict[str, float]] = []

    def watch(self, z: torch.Tensor) -> None:
        """z [B T, H, V] of the next layer."""
        rms = z.detach().float().pow(2).mean(-1).sqrt()

        def back(d: torch.Tensor) -> torch.Tensor:
            size = d.float().norm(dim=-1)
            at = int(size.argmax())
            head, row = at % size.shape[1], at // size.shape[1] % self._shape[1]
            read = float(rms.flatten()[at] / rms[:, head].median())
            self.peaks.append({"gradient": float(size.max()), "row": row, "read": read})
            if not self.holds_first:
                return d
            held = d.clone()
            held.unflatten(0, self._shape)[:, 0] = 0.0
            return held

        z.register_hook(back)


@contextmanager
def watched(heads: Heads) -> Iterator[None]:
    plain = forward.normed_and_gated

    def norm(z: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        heads.watch(z)
        return plain(z, r, weight, eps)

    forward.normed_and_gated = norm
    try:
        yield
    finally:
        forward.normed_and_gated = plain


def measured(model: LossModel, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """One batch: norms of both parts, of the gates' parameters, and the largest gradient."""
    heads = Heads(*tokens.shape)
    parameters = dict(model.decoder.named_parameters())
    with watched(heads):
        total, n = model(tokens, labels)
    whole = torch.autograd.grad(total / n, list(parameters.values()), retain_graph=True)
    peak = max(heads.peaks, key=lambda one: one["gradient"])
    heads.holds_first = True
    rest = torch.autograd.grad(total / n, list(parameters.values()))
    gates = [g for name, g in zip(parameters, whole, strict=True) if "mixer.gate_" in name]
    return {
        "norm": norm_of(whole),
        "first": norm_of([a - b for a, b in zip(whole, rest, strict=True)]),
        "rest": norm_of(rest),
        "gates": norm_of(gates),
        "peak_row": peak["row"],
        "peak_read": peak["read"],
    }


def norm_of(tensors: Any) -> float:
    return float(torch.stack(torch._foreach_norm(list(tensors))).norm())


def batches(
    model: LoadedModel, text: str, seed: int, n: int, rows: int, length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that begin anywhere in the text, as in training."""
    ids = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n):
        starts = torch.randint(0, len(ids) - length, (rows,), generator=rng)
        cut = torch.stack([ids[start : start + length + 1] for start in starts.tolist()])
        yield cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


def quantiles(values: list[float]) -> dict[str, float]:
    x = torch.tensor(values)
    at = {"min": 0.0, "median": 0.5, "90 %": 0.9, "max": 1.0}
    return {name: round(float(x.quantile(q)), 4) for name, q in at.items()}


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Quantiles over batches, and how far the precisions agree batch by batch."""
    told: dict[str, Any] = {}
    for precision, lines in found.items():
        told[precision] = {
            part: quantiles([line[part] for line in lines])
            for part in ("norm", "first", "rest", "gates")
        }
        top = sorted(lines, key=lambda line: -line["first"])[: max(1, len(lines) // 4)]
        told[precision]["of the quarter with the largest first part"] = {
            "largest gradient at a head in a first row": sum(x["peak_row"] == 0 for x in top),
            "batches": len(top),
            "that read against the median one": quantiles([x["peak_read"] for x in top]),
        }
    pairs = list(zip(found["bfloat16"], found["float32"], strict=True))
    for part in ("first", "rest"):
        apart = [abs(narrow[part] / wide[part] - 1) for narrow, wide in pairs]
        told[f"bfloat16 against float32, {part}, relative"] = quantiles(apart)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a plain text, 1 MB or more")
    parser.add_argument("--out", type=Path, help="folder for gla-gradients-cpu.json")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--length", type=int, default=32, help="of a row")
    parser.add_argument("--seed", type=int, default=0, help="of where rows begin")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.remove(str(HERE.resolve()))  # transformers would take kernels.py for a library
    shipped = load_model("gla-small", dtype="float32")
    models = {
        "float32": LossModel(shipped.decoder),
        "bfloat16": LossModel(shipped.decoder, dtype=torch.bfloat16),
    }
    text = args.text.read_text(encoding="utf-8")
    found: dict[str, list[dict[str, float]]] = {precision: [] for precision in models}
    for rows in batches(shipped, text, args.seed, args.batches, args.rows, args.length):
        for precision, model in models.items():
            found[precision].append(measured(model, *rows))
            line = ", ".join(f"{name} {value:.4g}" for name, value in found[precision][-1].items())
            print(f"{len(found[precision]):3d} {precision:8s} {line}", flush=True)
    told = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(sys.argv),
        "sizes": {"batches": args.batches, "rows": args.rows, "length": args.length},
        "summary": summary(found),
        "batches": found,
    }
    print(json.dumps(told["summary"], indent=1))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gla-gradients-cpu.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
