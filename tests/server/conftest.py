"""A tiny real model behind a real server on a free loopback port, shared by these tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import save_file
from tests.tiny import tiny_model_folder
from tests.waiting import PATIENCE

import invivo
from invivo.local import LocalLM
from invivo.server.run import ServerThread
from invivo.server.settings import Settings


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)
    state = tmp_path_factory.mktemp("state")
    options = {"device": "cpu", "dtype": "float32", "kv_bytes": 16 << 20, "state": state}
    with invivo.load(str(folder), **options) as made:
        yield made


@pytest.fixture(scope="session")
def server(lm: LocalLM) -> Iterator[ServerThread]:
    with ServerThread(lm, Settings(port=0, served_name="tiny")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def http(server: ServerThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as made:
        yield made


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the queries of every layer, in the peft library's format, with visible effect."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 32,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def idle(lm: LocalLM) -> Callable[[], dict[str, object]]:
    """Waits until the engine holds nothing and returns its statistics then."""

    def wait() -> dict[str, object]:
        deadline = time.monotonic() + PATIENCE
        while True:
            stats = lm.stats()
            if stats["running"] == stats["waiting"] == stats["kv"]["used"] == 0:
                return stats
            assert time.monotonic() < deadline, f"the engine is not idle: {stats}"
            time.sleep(0.01)

    return wait
