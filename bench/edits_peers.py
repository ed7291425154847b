"""Whether TransformerLens and nnsight see the same inside SmolLM2 as invivo does.

    python bench/edits_peers.py --peer-python PATH [--out FILE]

PATH is the interpreter of an environment with transformer-lens and nnsight, each of which runs in a
process of its own (``edits_peers_worker.py``) and leaves its tensors in a file. Compared are the
residual streams, the heads' z and what they write, the direct shares of heads in a difference of
two logits, the logits, and the logits with single heads patched from another prompt.

A difference is the largest one over the largest value of the vector that it is in: float32 rounds
by 6e-8 of a value, and some numbers of this model's residual stream are a thousand times the
others. Logits and shares are compared as they are. Where a difference exceeds 1e-4, the identities
that every model obeys say who is wrong (written as the largest violation of either side): what
heads write adds up to what the residual stream gains, and the last stream, normed and multiplied,
is the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine import HERE

PROMPTS, TOKENS, BAR = 4, 24, 1e-4
HEADS = [[0, 0], [5, 3], [14, 8], [22, 1], [29, 4]]
PAIR = [260, 905]
RELATIVE = ("resid", "z", "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "edits-peers.json")
    args = parser.parse_args()
    if str(HERE.resolve()) in sys.path:
        sys.path.remove(str(HERE.resolve()))  # transformers would take kernels.py for a library

    from safetensors import safe_open

    from invivo.models.resolve import resolve

    folder = resolve(args.model)
    job = {
        "model": str(folder),
        "prompts": read_prompts(folder),
        "heads": HEADS,
        "tokens": PAIR,
    }
    ours = through_invivo(job)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "model": args.model,
        "invivo": {name: metadata.version(name) for name in ("torch", "transformers")},
        "bar": BAR,
        "identities": {"invivo": identities(ours, folder)},
        "peers": {},
    }
    print(
        f"{'identities of':20}" + "".join(f"{name:>12}" for name in result["identities"]["invivo"])
    )
    with tempfile.TemporaryDirectory() as place:
        job_file = Path(place) / "job.json"
        job_file.write_text(json.dumps(job))
        for peer in ("transformer_lens", "nnsight"):
            out = Path(place) / f"{peer}.safetensors"
            worker = str(HERE / "edits_peers_worker.py")
            subprocess.run(
                [args.peer_python, "-P", worker, peer, str(job_file), str(out)],
                check=True,
                env=os.environ | {"PYTHONPATH": ""},
                stderr=subprocess.DEVNULL,
            )
            with safe_open(str(out), framework="pt") as file:
                theirs = {name: file.get_tensor(name) for name in ours}
                versions = file.metadata()
            differences = {name: differ(name, ours[name], theirs[name]) for name in ours}
            result["peers"][peer] = {"versions": versions, "differences": differences}
            result["identities"][peer] = identities(theirs, folder)
    for name, found in result["identities"].items():
        print(f"{name:20}" + "".join(f"{x:12.1e}" for x in found.values()))
    names = list(ours)
    print(f"\n{'difference from':20}" + "".join(f"{name:>10}" for name in names))
    for peer, entry in result["peers"].items():
        print(f"{peer:20}" + "".join(f"{entry['differences'][name]:10.1e}" for name in names))
    result["within_bar"] = all(
        x <= BAR for entry in result["peers"].values() for x in entry["differences"].values()
    )
    print(f"all within {BAR}: {result['within_bar']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def read_prompts(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (HERE / "prompts.txt").read_text(encoding="utf-8")
    passages = text.strip().split("\n\n")[:PROMPTS]
    return [tokenizer(passage)["input_ids"][:TOKENS] for passage in passages]


def through_invivo(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same tensors, through the engine."""
    import invivo

    lm = invivo.load(job["model"])
    a, b = job["tokens"]
    looked = {
        "out": [
            {"capture": "layers.0.resid.pre"},
            {"capture": "layers.*.resid.post"},
            {"capture": "layers.*.attn.head.*.z"},
            {"capture": "layers.*.attn.head.*.out"},
            {"capture": "final.norm.scale"},
            {"capture": "logits"},
            {
                "capture": "layers.*.attn.head.*.out",
                "pos": "@last",
                "reduce": "direct",
                "tokens": [a, b],
            },
        ]
    }
    n = lm.engine.model.config.n_layers
    found: dict[str, list[torch.Tensor]] = {}
    for result in lm.run(looked, job["prompts"]):
        values = [torch.as_tensor(capture.values) for capture in result.captures]
        before, after, z, out = values[:1], values[1 : n + 1], values[n + 1 :], values[2 * n + 1 :]
        scale, logits, direct = values[3 * n + 1], values[3 * n + 2], values[3 * n + 3 :]
        found.setdefault("resid", []).append(torch.stack(before + after))
        found.setdefault("z", []).append(torch.stack(z[:n]))
        found.setdefault("out", []).append(torch.stack(out[:n]))
        found.setdefault("scale", []).append(scale.squeeze(-1))
        found.setdefault("logits", []).append(logits)
        share = torch.stack(direct)[:, 0] * scale[-1]
        found.setdefault("shares", []).append(share[..., 0] - share[..., 1])
    tensors = {name: torch.stack(parts) for name, parts in found.items()}
    patched = []
    others = job["prompts"][1:] + job["prompts"][:1]
    for layer, head in job["heads"]:
        site = f"layers.{layer}.attn.head.{head}.z"
        rows = []
        for prompt, other in zip(job["prompts"], others, strict=True):
            program = {
                "runs": {"cf": {"prompt": other}},
                "steps": [{"at": site, "pos": "@last", "do": "replace", "from": "cf"}],
                "out": [{"capture": "logits", "pos": "@last"}],
            }
            rows.append(torch.as_tensor(lm.run(program, prompt).captures[0].values)[0])
        patched.append(torch.stack(rows))
    lm.close()
    return tensors | {"patched": torch.stack(patched)}


def differ(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, {tuple(theirs.shape)}"
    far = (ours.double() - theirs.double()).abs()
    if name in RELATIVE:
        far = far / theirs.double().abs().amax(-1, keepdim=True)
    return float(far.max())


def identities(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, float]:
    """Largest violations: heads' writing is z times its matrix, the last stream gives logits."""
    from invivo.models.load import load_model

    decoder = load_model(str(folder), dtype=torch.float32).decoder
    config = decoder.config
    w_o = torch.stack([layer.mixer.o for layer in decoder.layers]).double()  # type: ignore[union-attr]
    w_o = w_o.unflatten(-1, (config.n_heads, config.head_dim))
    written = torch.einsum("plthe,ldhe->plthd", tensors["z"].double(), w_o)
    last = tensors["resid"][:, -1].double()
    scale = torch.rsqrt(last.pow(2).mean(-1) + config.norm_eps)
    normed = last * scale[..., None] * decoder.final_norm.weight.double()
    head = decoder.embed if decoder.head is None else decoder.head
    return {
        "out": differ("out", tensors["out"], written),
        "scale": differ("scale", tensors["scale"], scale),
        "logits": differ("logits", tensors["logits"], normed @ head.double().T),
    }


if __name__ == "__main__":
    main()
