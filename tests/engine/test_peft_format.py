"""Adapter files: the peft library computes the same from ours, and we the same from theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.bypass_cases import KINDS, logits_of, random_parameters
from tests.tiny import tiny_hf_model, tiny_model_folder

from invivo.engine.adapter_file import read_adapter, write_adapter
from invivo.engine.bypasses import BypassSpec, TrainBypass, checked_specs, n_virtual
from invivo.engine.peft_format import from_peft, to_peft
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig
from invivo.models.load import LoadedModel, load_model

peft = pytest.importorskip("peft")

TOKENS = [5, 77, 260, 3, 9, 141, 280, 33]
PREFIX = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}

THEIRS: dict[str, tuple[str, Any]] = {
    "LoRA": ("llama", lambda: peft.LoraConfig(r=4, target_modules="all-linear")),
    "rank-stabilised LoRA": (
        "llama",
        lambda: peft.LoraConfig(r=5, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    ),
    "IA3": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "IA3 with biases": (
        "qwen2",
        lambda: peft.IA3Config(
            target_modules=["q_proj", "o_proj", "up_proj"], feedforward_modules=[]
        ),
    ),
    "IA3 of GPT-2": (
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "prefix": ("llama", lambda: peft.PrefixTuningConfig(**PREFIX)),
    "prefix, reparametrised": (
        "llama",
        lambda: peft.PrefixTuningConfig(**PREFIX, prefix_projection=True, encoder_hidden_size=8),
    ),
    "prefix, QK-norm": ("qwen3", lambda: peft.PrefixTuningConfig(**PREFIX)),
    "prefix, GPT-2": ("gpt2", lambda: peft.PrefixTuningConfig(**PREFIX)),
    "prefix, partial rotary": ("phi3", lambda: peft.PrefixTuningConfig(**PREFIX)),
    "prompt": ("llama", lambda: peft.PromptTuningConfig(**PREFIX)),
    "prompt, GPT-2": ("gpt2", lambda: peft.PromptTuningConfig(**PREFIX)),
    "prompt, scaled embeddings": ("gemma3_text", lambda: peft.PromptTuningConfig(**PREFIX)),
}

OURS: dict[str, tuple[str, tuple[BypassSpec, ...]]] = {
    "LoRA": ("llama", KINDS["lora"]),
    "rank-stabilised LoRA": ("llama", KINDS["rslora"]),
    "LoRA on a fused map": ("llama", KINDS["fused lora"]),
    "LoRA of GPT-2": ("gpt2", (BypassSpec("lora", ("qkv", "o", "up", "down"), 3),)),
    "LoRA of Phi-3": ("phi3", (BypassSpec("lora", ("qkv", "gate_up"), 3, layers=(0, 2)),)),
    "IA3": ("llama", KINDS["ia3"]),
    "IA3 on fused maps": ("llama", (BypassSpec("ia3", ("qkv", "gate_up", "down")),)),
    "IA3 of Phi-3": ("phi3", (BypassSpec("ia3", ("qkv", "gate_up", "down")),)),
    "prefix": ("llama", KINDS["prefix"]),
    "prefix, GPT-2": ("gpt2", KINDS["prefix"]),
    "prompt": ("llama", KINDS["soft_prompt"]),
}


def hub_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of the given tokens only; mask as a user's tokenizer gives it."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits[-len(tokens) :]


def adapted(model: LoadedModel, specs: Any, parameters: Any) -> torch.Tensor:
    n = n_virtual(specs)
    bypass = TrainBypass(model.config, specs, parameters).window(0, n + len(TOKENS))
    return logits_of(model, TOKENS, bypass, n)


@pytest.mark.parametrize("case", THEIRS)
def test_adapters_saved_by_peft_load_here(case: str, tmp_path: Path) -> None:
    family, config = THEIRS[case]
    reference = peft.get_peft_model(tiny_hf_model(family), config())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "ia3" in name else noise)
    reference.save_pretrained(tmp_path / "adapter")
    model = load_model(str(tiny_model_folder(tmp_path, family)))
    specs, parameters = from_peft(*read_adapter(tmp_path / "adapter"), model.config)
    expected = hub_logits(reference, TOKENS)
    assert (adapted(model, specs, parameters) - expected).abs().max() < 1e-4
    assert (logits_of(model, TOKENS, None, 0) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", OURS)
def test_adapters_saved_here_load_in_peft(case: str, tmp_path: Path) -> None:
    family, specs = OURS[case]
    model = load_model(str(tiny_model_folder(tmp_path, family)))
    parameters = random_parameters(model.config, specs)
    write_adapter(tmp_path / "adapter", specs, parameters, model.config, "tiny")
    reference = peft.PeftModel.from_pretrained(tiny_hf_model(family), str(tmp_path / "adapter"))
    expected = adapted(model, specs, parameters)
    assert (hub_logits(reference, TOKENS) - expected).abs().max() < 1e-4
    assert (logits_of(model, TOKENS, None, 0) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_from_its_file(kind: str, tmp_path: Path, tiny: LoadedModel) -> None:
    specs = KINDS[kind]
    parameters = random_parameters(tiny.config, specs)
    write_adapter(tmp_path, specs, parameters, tiny.config, "tiny")
    again, tensors = from_peft(*read_adapter(tmp_path), tiny.config)
    expected = adapted(tiny, specs, parameters)
    assert (adapted(tiny, again, tensors) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("adapter", "INVIVO_BOTTLENECK"),
        ("steering", "INVIVO_STEERING"),
        ("all at once", "INVIVO_MIXED"),
    ],
)
def test_kinds_without_a_format_have_our_own(
    kind: str, name: str, tmp_path: Path, tiny: LoadedModel
) -> None:
    parameters = random_parameters(tiny.config, KINDS[kind])
    write_adapter(tmp_path, KINDS[kind], parameters, tiny.config, "tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == name
    specs, tensors = from_peft(*read_adapter(tmp_path), tiny.config)
    assert specs == checked_specs(tiny.config, KINDS[kind])
    assert all(torch.equal(tensors[key], value) for key, value in parameters.items())


def broken(change: dict[str, Any], kind: str, config: ModelConfig) -> tuple[Any, Any]:
    written, tensors = to_peft(KINDS[kind], random_parameters(config, KINDS[kind]), config, "tiny")
    return written | change, tensors


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("lora", {"peft_type": "LOHA"}, "peft_type"),
        ("lora", {"peft_type": "IA3"}, "peft_type"),
        ("ia3", {"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ("ia3", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("soft_prompt", {"peft_type": "PREFIX_TUNING"}, "does not fit"),
        ("steering", {"bypasses": None}, "must list"),
        ("steering", {"bypasses": [{"kind": "steering", "on": "x"}]}, "bypasses.on"),
        ("steering", {"bypasses": [{"kind": "steering", "new": 1}]}, "bypasses.new"),
        ("steering", {"bypasses": [{}]}, "bypasses.kind"),
        ("steering", {"bypasses": [{"kind": "magic"}]}, "unknown kind"),
        ("steering", {"bypasses": [{"kind": "steering", "on": ["attn.in"]}]}, "parameters"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    kind: str, change: dict[str, Any], word: str, tiny: LoadedModel
) -> None:
    with pytest.raises(InvalidRequest, match=word):
        from_peft(*broken(change, kind, tiny.config), tiny.config)


def test_parts_that_the_hub_fuses_cannot_be_written_alone(tmp_path: Path) -> None:
    config = load_model(str(tiny_model_folder(tmp_path, "phi3"))).config
    for kind, size in (("lora", 2), ("ia3", 0)):
        specs = (BypassSpec(kind, ("q",), size),)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="Train on qkv"):
            to_peft(specs, random_parameters(config, specs), config, "tiny")
