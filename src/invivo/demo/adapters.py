"""Two LoRA adapters for the demo, in the peft library's format.

They are not trained: their factors are random, drawn from a fixed seed and scaled so that the
answers change a little. That is enough to show adapters sharing one batch, and honest about it.
"""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8
ALPHA = 16.0
STRENGTH = 0.2  # size of what is added beside the layer's own output, about


def write_random_adapter(
    folder: Path, model_folder: Path, seed: int, *, strength: float = STRENGTH
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for q_proj and v_proj.

    Args:
        folder: made if missing.
        model_folder: Hub-format folder of a Llama-type model; its config gives the shapes.
        seed: of the random factors; the same seed gives the same adapter.
        strength: scale of the factors.

    Returns:
        ``folder``.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
    d_head = config.get("head_dim") or d_model // n_heads
    widths = {"q_proj": n_heads * d_head, "v_proj": config["num_key_value_heads"] * d_head}
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, d_model, generator=draw) / d_model**0.5
            up = torch.randn(width, RANK, generator=draw) / RANK**0.5
            tensors[f"{prefix}.lora_A.weight"] = down
            tensors[f"{prefix}.lora_B.weight"] = up * (strength * RANK / ALPHA)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(widths),
    }
    text = json.dumps(description, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder
