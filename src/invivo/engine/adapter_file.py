"""Adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from invivo.engine.bypasses import BypassSpec, Parameters
from invivo.engine.peft_format import to_peft
from invivo.errors import InvalidRequest, NotFound
from invivo.models.config import ModelConfig

MAX_CONFIG_BYTES = 1 << 20


def write_adapter(
    folder: Path,
    specs: Sequence[BypassSpec],
    parameters: Parameters,
    config: ModelConfig,
    base_name: str,
) -> None:
    """Save an adapter; the folder is made if missing, its two files are replaced.

    Raises:
        InvalidRequest: see :func:`invivo.engine.peft_format.to_peft`.
    """
    from safetensors.torch import save_file

    described, tensors = to_peft(specs, parameters, config, base_name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of an adapter folder; only safetensors are read, never pickles.

    Raises:
        NotFound: the folder or one of the two files is missing.
        InvalidRequest: a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path = folder / "adapter_config.json"
    weights_path = folder / "adapter_model.safetensors"
    for path in (folder, config_path, weights_path):
        if not path.exists():
            pickled = path is weights_path and (folder / "adapter_model.bin").exists()
            raise NotFound(
                "does not exist",
                field="adapter",
                given=str(path),
                remedy="Save the adapter again as safetensors: pickled weights are not read"
                if pickled
                else "Give a folder with adapter_config.json and adapter_model.safetensors",
            )
    try:
        if config_path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("larger than a megabyte")
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise InvalidRequest(
            f"cannot be read: {error}", field="adapter_config", given=str(config_path)
        ) from error
    try:
        return config, load_file(weights_path)
    except SafetensorError as error:
        raise InvalidRequest(
            f"cannot be read: {error}", field="adapter_model", given=str(weights_path)
        ) from error
