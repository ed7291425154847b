"""Fine-tuning on short texts: side by side in one window, or one after the other.

    python bench/packed_texts.py                      # SmolLM2-135M on a CPU, texts of 64 tokens
    python bench/packed_texts.py --device cuda        # the same in bfloat16
    python bench/packed_texts.py --rounds 1 --steps 2 --batch 4   # to try the script

One engine without requests, one LoRA job a round (rank 16 on the down projections, AdamW), random
texts. Rounds alternate between the two, so that each pair meets the same machine; printed are
tokens a second (learned tokens of the timed steps over their time) and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from coserve_load import RandomTexts
from invivo.engine.bypasses import BypassSpec
from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.job_spec import JobSpec
from invivo.models.load import load_model

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--batch", type=int, default=8, help="texts of an optimizer step")
    parser.add_argument("--steps", type=int, default=4, help="timed, of each job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.remove(str(HERE.resolve()))  # transformers would take kernels.py for a library
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = load_model("smollm2-135m", device=args.device, dtype=dtype)
    engine = Engine(model, EngineConfig(tpot_ms=2000.0))
    rounds = []
    for number in range(args.rounds):
        ways = (True, False) if number % 2 == 0 else (False, True)
        rates = {pack: rate(engine, args, number, pack) for pack in ways}
        rounds.append({"packed": rates[True], "apart": rates[False]})
        ratio = rates[True] / rates[False]
        told = f"packed {rates[True]:8.1f} tok/s, apart {rates[False]:8.1f}: {ratio:.2f}x"
        print(f"round {number}: {told}", flush=True)
    ratios = [one["packed"] / one["apart"] for one in rounds]
    print(f"median ratio {statistics.median(ratios):.2f}x")
    engine.close()
    if args.out is not None:
        whole = {"command": " ".join(sys.argv), "rounds": rounds, "ratios": ratios}
        args.out.write_text(json.dumps(whole, indent=1) + "\n")


def rate(engine: Engine, args: argparse.Namespace, number: int, pack: bool) -> float:
    """Tokens a second of one job, after its first step."""
    events: list[dict[str, Any]] = []
    spec = JobSpec(
        f"round-{number}-{'packed' if pack else 'apart'}",
        (BypassSpec("lora", ("down",), 16, alpha=32.0),),
        args.steps + 1,
        gradient_accumulation=args.batch,
        pack=pack,
    )
    texts = RandomTexts(engine.model.config.vocab_size, args.tokens, args.tokens)
    begun = 0.0
    handle = engine.finetune(spec, texts, events.append)
    while not handle.ended.is_set():
        engine.step()
        if not begun and any(event["event"] == "step" for event in events):
            begun = time.perf_counter()
    if handle.state != "succeeded":
        raise SystemExit(f"the job is {handle.state}: {handle.error}")
    return float(args.steps * args.batch * args.tokens / (time.perf_counter() - begun))


if __name__ == "__main__":
    main()
