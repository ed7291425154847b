"""One engine as a worker process of bench/edits.py: a JSON line in, a JSON line out.

    python -P edits_worker.py invivo|transformer_lens

A process each, because OpenMP workers of two engines in one process put each other to sleep, and
because TransformerLens needs an environment of its own. First line in: {"model": folder,
"threads": n}; answered by versions. Then jobs, each answered by {"seconds": s, "cpu_seconds": s,
"numbers": [...]}; the CPU's seconds are of the whole process, threads that spin included:

- {"job": "capture", "prompts": [[ids]], "unembed": "none" | "all" | "default"}: every residual
  stream (after each layer, and before the first) of all tokens. "all": the logits of all tokens are
  given out too. "none": no logits; TransformerLens cannot leave them out (it takes no notice of
  ``stop_at_layer`` here), and computes those of one token a prompt. "default": what a user gets who
  asks for the streams and says nothing of logits; TransformerLens computes those of all tokens,
  invivo none.
- {"job": "patch", "pairs": [[ids, ids]], "heads": [[layer, head]], "positions": "last"|"all",
  "tokens": [a, b], "salt": text}: the head's z of the first prompt is replaced by that of the
  second; numbers are the difference of two logits at the last token, by head and pair.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Work = Callable[[dict[str, Any]], list[float]]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print to standard output: keep that for answers
    start = json.loads(sys.stdin.readline())
    build = {"invivo": build_invivo, "transformer_lens": build_transformer_lens}[sys.argv[1]]
    version, jobs = build(start)
    import torch
    import transformers

    about = {
        "version": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        numbers = jobs[job["job"]](job)
        answer = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu_begin,
            "numbers": numbers,
        }
        print(json.dumps(answer), file=answers)


def build_invivo(start: dict[str, Any]) -> tuple[str, dict[str, Work]]:
    import numpy as np
    import torch

    import invivo

    torch.set_num_threads(start["threads"])
    lm = invivo.load(start["model"])
    streams = [{"capture": "layers.0.resid.pre"}, {"capture": "layers.*.resid.post"}]
    last_stream = start["layers"]  # among the captures of a prompt

    def capture(job: dict[str, Any]) -> list[float]:
        logits = [{"capture": "logits"}] if job["unembed"] == "all" else []
        results = lm.run({"out": streams + logits}, job["prompts"])
        assert all(len(r.captures) == last_stream + 1 + len(logits) for r in results)
        return [float(np.abs(r.captures[last_stream].values).mean()) for r in results]

    async def patch_all(job: dict[str, Any]) -> list[list[float]]:
        a, b = job["tokens"]
        heads = job["heads"]
        layers, indices = (sorted({h[i] for h in heads}) for i in (0, 1))
        assert len(layers) * len(indices) == len(heads)

        async def one(clean: list[int], other: list[int]) -> list[float]:
            program = {
                "runs": {"cf": {"prompt": other}},
                "steps": [
                    {
                        "at": "layers.$L.attn.head.$H.z",
                        "pos": f"@{job['positions']}",
                        "do": "replace",
                        "from": "cf",
                    }
                ],
                "sweep": {"L": layers, "H": indices},
                "out": [{"measure": "logit_diff", "a": a, "b": b}],
            }
            # A salt of its own: nothing is taken from what an earlier round has left in the cache.
            result = await lm.arun(program, clean, salt=job["salt"])
            return [float(x) for x in result.array("logit_diff").reshape(-1)]

        return await asyncio.gather(*(one(*pair) for pair in job["pairs"]))

    def patch(job: dict[str, Any]) -> list[float]:
        by_pair = asyncio.run(patch_all(job))
        return [numbers[i] for i in range(len(job["heads"])) for numbers in by_pair]

    return invivo.__version__, {"capture": capture, "patch": patch}


def build_transformer_lens(start: dict[str, Any]) -> tuple[str, dict[str, Work]]:
    from importlib import metadata

    import torch
    from transformer_lens import TransformerBridge

    torch.set_num_threads(start["threads"])
    bridge = TransformerBridge.boot_transformers(
        start["model"], device="cpu", dtype=torch.float32
    ).eval()
    last = bridge.cfg.n_layers - 1
    streams = {"blocks.0.hook_resid_pre"} | {
        f"blocks.{i}.hook_resid_post" for i in range(bridge.cfg.n_layers)
    }

    @torch.inference_mode()
    def capture(job: dict[str, Any]) -> list[float]:
        options = {"logits_to_keep": 1} if job["unembed"] == "none" else {}
        tokens = torch.tensor(job["prompts"])
        logits, cache = bridge.run_with_cache(
            tokens, names_filter=lambda name: name in streams, **options
        )
        assert len(cache) == len(streams)
        assert logits.shape[1] == (1 if options else tokens.shape[1])
        return [float(x) for x in cache[f"blocks.{last}.hook_resid_post"].abs().mean((1, 2))]

    @torch.inference_mode()
    def patch(job: dict[str, Any]) -> list[float]:
        clean, other = (torch.tensor([pair[i] for pair in job["pairs"]]) for i in (0, 1))
        wanted = {f"blocks.{layer}.attn.hook_z" for layer, _ in job["heads"]}
        _, cache = bridge.run_with_cache(other, names_filter=lambda name: name in wanted)
        a, b = job["tokens"]
        at = slice(-1, None) if job["positions"] == "last" else slice(None)
        numbers: list[float] = []
        for layer, head in job["heads"]:
            name = f"blocks.{layer}.attn.hook_z"

            def replace(z: torch.Tensor, hook: object, name: str = name, head: int = head) -> Any:
                z = z.clone()
                z[:, at, head] = cache[name][:, at, head]
                return z

            logits = bridge.run_with_hooks(clean, fwd_hooks=[(name, replace)])[:, -1]
            numbers += (logits[:, a] - logits[:, b]).tolist()
        return numbers

    return metadata.version("transformer_lens"), {"capture": capture, "patch": patch}


if __name__ == "__main__":
    main()
