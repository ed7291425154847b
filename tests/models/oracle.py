"""Transformers as the oracle, in float32 or in float64 throughout.

Its models compute norms, softmax and rotary angles in float32 whatever the weights are. For a
float64 oracle the names ``torch.float32`` and ``torch.float`` and the method ``Tensor.float`` mean
float64 while the model is built and run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """See the module's docstring."""
    names = {"float32": torch.float32, "float": torch.float}
    to_float = torch.Tensor.float
    try:
        for name in names:
            setattr(torch, name, torch.float64)
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
        yield
    finally:
        for name, value in names.items():
            setattr(torch, name, value)
        torch.Tensor.float = to_float  # type: ignore[method-assign]


class Oracle:
    """The model of a folder in transformers, eager attention."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.exact = dtype == torch.float64
        options: dict[str, Any] = {"attn_implementation": "eager"}
        if AutoConfig.from_pretrained(folder).model_type in _SPARSE:
            options["experts_implementation"] = "eager"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        if self.exact:
            weights = {name: value.double() for name, value in model.state_dict().items()}
            with everything_in_float64():
                model = AutoModelForCausalLM.from_config(model.config, **options).double()
            model.load_state_dict(weights)
        self.model = model.eval()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, V] of one whole text."""
        with torch.no_grad():
            if not self.exact:
                return self.model(torch.tensor([tokens])).logits[0]
            with everything_in_float64():
                return self.model(torch.tensor([tokens])).logits[0]


_SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
