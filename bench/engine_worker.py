"""One engine as a worker process of bench/engine.py: a JSON line in, a JSON line out.

    python -P engine_worker.py invivo|transformers|vllm

A process each, because OpenMP workers of two engines in one process put each other to sleep, and
because vLLM needs an environment of its own. First line in: {"model": folder, "max_len": n,
"threads": n}; answered by versions. Then runs: {"prompts": [[ids]], "new": n}, greedy, without an
end token; answered by {"seconds": s, "tokens": [[ids]]}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print to standard output: keep that for answers
    start = json.loads(sys.stdin.readline())
    build = {"invivo": build_invivo, "transformers": build_transformers, "vllm": build_vllm}
    version, generate = build[sys.argv[1]](start)
    import torch

    threads = torch.get_num_threads()
    about = {"version": version, "torch": torch.__version__, "threads": threads}
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.perf_counter()
        tokens = generate(job["prompts"], job["new"])
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers)


def build_invivo(start: dict[str, Any]) -> tuple[str, Generate]:
    import torch

    import invivo

    torch.set_num_threads(start["threads"])
    # The prompts repeat from round to round: with the prefix cache there would be no prefill.
    lm = invivo.load(start["model"], prefix_cache=False)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        answers = lm.generate(prompts, max_tokens=new, temperature=0.0, ignore_eos=True)
        return [answer.choices[0].tokens for answer in answers]

    return invivo.__version__, generate


def build_transformers(start: dict[str, Any]) -> tuple[str, Generate]:
    import torch
    import transformers

    torch.set_num_threads(start["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(start["model"], dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
        )
        return [list(map(int, row)) for row in out[:, ids.shape[1] :]]

    return transformers.__version__, generate


def build_vllm(start: dict[str, Any]) -> tuple[str, Generate]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm

    llm = vllm.LLM(
        model=start["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=start["max_len"],
    )

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return [
            list(output.outputs[0].token_ids)
            for output in llm.generate(given, params, use_tqdm=False)
        ]

    return vllm.__version__, generate


if __name__ == "__main__":
    main()
