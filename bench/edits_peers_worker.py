"""What another library says is inside SmolLM2: one process of bench/edits_peers.py.

    python -P edits_peers_worker.py transformer_lens|nnsight JOB.json OUT.safetensors

The job: {"model": folder, "prompts": [P prompts of T token ids], "heads": [[layer, head]],
"tokens": [a, b]}. Out, float32: ``resid`` [P, L + 1, T, d] (before the first layer, behind each),
``z`` and ``out`` [P, L, T, H, D or d] (a head's mixed values, and what it writes), ``scale``
[P, T] (the final norm's reciprocal root mean square), ``logits`` [P, T, V], ``shares`` [P, L, H]
(each head's direct share of the difference of the logits of a and b at the last token), and
``patched`` [heads, P, V]: logits of the last token with that head's z there from the next prompt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


def main() -> None:
    name, job_file, out = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    seen: dict[str, Callable[[dict[str, Any]], Tensors]] = {
        "transformer_lens": through_transformer_lens,
        "nnsight": through_nnsight,
    }
    with torch.no_grad():
        tensors = seen[name](job)
    versions = {p: metadata.version(p) for p in (name, "torch", "transformers")}
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, out, metadata=versions)


def through_transformer_lens(job: dict[str, Any]) -> Tensors:
    from transformer_lens import TransformerBridge

    bridge = TransformerBridge.boot_transformers(job["model"], device="cpu", dtype=torch.float32)
    bridge.eval()
    cfg = bridge.cfg
    ids = torch.tensor(job["prompts"])
    logits, cache = bridge.run_with_cache(ids)
    layers = range(cfg.n_layers)
    resid = [cache["blocks.0.hook_resid_pre"]]
    resid += [cache[f"blocks.{i}.hook_resid_post"] for i in layers]
    z = torch.stack([cache[f"blocks.{i}.attn.hook_z"] for i in layers], 1)
    z = z.unflatten(-1, (cfg.n_heads, -1)) if z.dim() == 4 else z
    w_o = torch.stack([bridge.blocks[i].attn.W_O for i in layers])  # [L, H, D, d]
    out = torch.einsum("plthe,lhed->plthd", z, w_o)
    scale = 1.0 / cache["ln_final.hook_scale"].squeeze(-1)
    final_norm, head = weights_of(job["model"])
    patched = []
    others = torch.roll(z, -1, 0)
    for layer, index in job["heads"]:

        def replace(value: torch.Tensor, hook: object, at: int = layer, h: int = index) -> Any:
            value = value.clone()
            by_head = value if value.dim() == 4 else value.unflatten(-1, (cfg.n_heads, -1))
            by_head[:, -1, h] = others[:, at, -1, h]
            return by_head.view_as(value)

        hook = (f"blocks.{layer}.attn.hook_z", replace)
        patched.append(bridge.run_with_hooks(ids, fwd_hooks=[hook])[:, -1])
    return {
        "resid": torch.stack(resid, 1),
        "z": z,
        "out": out,
        "scale": scale,
        "logits": logits,
        "shares": shares_of(out, scale, final_norm, head, job["tokens"]),
        "patched": torch.stack(patched),
    }


def through_nnsight(job: dict[str, Any]) -> Tensors:
    from nnsight import LanguageModel
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    lm = LanguageModel(model, tokenizer=AutoTokenizer.from_pretrained(job["model"]))
    config = model.config
    ids = torch.tensor(job["prompts"])
    resid: list[torch.Tensor] = []
    z: list[torch.Tensor] = []
    with lm.trace(ids):
        resid.append(lm.model.embed_tokens.output.save())
        for layer in lm.model.layers:
            z.append(layer.self_attn.o_proj.input.save())
            resid.append(layer.output.save())
        normed = lm.model.norm.output.save()
        logits = lm.lm_head.output.save()
    heads = config.num_attention_heads
    mixed = torch.stack(list(z), 1).unflatten(-1, (heads, -1))
    w_o = torch.stack([layer.self_attn.o_proj.weight for layer in model.model.layers])
    out = torch.einsum("plthe,ldhe->plthd", mixed, w_o.unflatten(-1, (heads, -1)))
    final_norm, head = weights_of(job["model"])
    last = resid[-1]
    # The scale from what the norm gave, at the number where its input is largest.
    largest = last.abs().argmax(-1, keepdim=True)
    scale = (normed / final_norm / last).gather(-1, largest).squeeze(-1)
    patched = []
    size = mixed.shape[-1]
    for layer, index in job["heads"]:
        source = torch.roll(mixed[:, layer, -1, index], -1, 0)
        with lm.trace(ids):
            where = slice(index * size, (index + 1) * size)
            lm.model.layers[layer].self_attn.o_proj.input[:, -1, where] = source
            changed = lm.lm_head.output[:, -1].save()
        patched.append(changed)
    return {
        "resid": torch.stack(list(resid), 1),
        "z": mixed,
        "out": out,
        "scale": scale,
        "logits": logits,
        "shares": shares_of(out, scale, final_norm, head, job["tokens"]),
        "patched": torch.stack(patched),
    }


def weights_of(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The final norm's weight and the unembedding, as they are in the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.model.norm.weight, model.lm_head.weight


def shares_of(
    out: torch.Tensor,
    scale: torch.Tensor,
    final_norm: torch.Tensor,
    head: torch.Tensor,
    tokens: list[int],
) -> torch.Tensor:
    """Direct attribution: what each head writes, through the norm held fixed, to two logits."""
    a, b = tokens
    return out[:, :, -1] @ (final_norm * (head[a] - head[b])) * scale[:, None, -1:]


if __name__ == "__main__":
    main()
