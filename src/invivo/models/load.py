"""Loading a model folder in the Hub's format: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from invivo.errors import InvalidRequest, UnsupportedModel
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.fingerprint import fingerprint_of
from invivo.models.hub_config import config_from_hf
from invivo.models.resolve import resolve
from invivo.models.tensor_names import Part, place_of, tensor_parts

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

# Tensors that some checkpoints carry and no forward pass of the text model reads.
_UNREAD = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|^(model\.)?vision_tower\.|"
    r"^(model\.)?multi_modal_projector\.)"
)

# Prefixes under which the same text model is found: plain, without a head class, inside a
# multimodal model (older and newer spelling).
_PREFIXES = (
    ("", ""),
    ("transformer.", ""),
    ("model.", ""),
    ("", "language_model."),
    ("model.", "model.language_model."),
)


@dataclass(slots=True)
class LoadedModel:
    """Config, weights and tokenizer of one model, ready to run.

    Attributes:
        name: what the caller asked for.
        path: the folder it was read from.
        tokenizer: transformers' fast tokenizer.
        fingerprint: sha256 of config and weights, the same on every machine and for every dtype.
    """

    name: str
    path: Path
    config: ModelConfig
    decoder: Decoder
    tokenizer: Any
    fingerprint: str


def load_model(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> LoadedModel:
    """Load a model by name, folder or file (see :func:`invivo.models.resolve.resolve`).

    Args:
        name: what to load.
        device: where the weights go; they are copied there one tensor at a time.
        dtype: None takes float32 on a CPU (half precisions are slow there), and elsewhere the
            checkpoint's own, bfloat16 for a float32 checkpoint.

    Raises:
        NotFound: there is no such model.
        InvalidRequest: there is no such device or dtype.
        UnsupportedModel: the folder's architecture or tensors cannot be read.
    """
    device = checked_device(device)
    folder = resolve(name)
    raw = read_json(folder / "config.json")
    config = _with_generation_eos(config_from_hf(raw), folder)
    decoder = Decoder(config, device=device, dtype=pick_dtype(raw, device, dtype))
    read_weights(decoder, folder)
    return LoadedModel(
        name=name,
        path=folder,
        config=config,
        decoder=decoder.eval(),
        tokenizer=load_tokenizer(folder),
        fingerprint=fingerprint_of(folder),
    )


def checked_device(device: torch.device | str) -> torch.device:
    """
    Raises:
        InvalidRequest: there is no such device or dtype.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    n_gpus = torch.cuda.device_count()
    if found is None or (found.type == "cuda" and (found.index or 0) >= n_gpus):
        raise InvalidRequest(
            "there is no such device here",
            field="device",
            given=str(device),
            remedy=f"Give cpu, or one of {n_gpus} GPUs as cuda:0, cuda:1 ..."
            if n_gpus
            else "Give cpu; torch finds no GPU",
        )
    return found


def pick_dtype(
    raw_config: dict[str, Any], device: torch.device | str, dtype: torch.dtype | str | None
) -> torch.dtype:
    """The dtype to load in; see :func:`load_model`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in _DTYPES:
            raise InvalidRequest(
                "unknown dtype", field="dtype", given=dtype, remedy=f"Known: {', '.join(_DTYPES)}"
            )
        return _DTYPES[dtype]
    if torch.device(device).type == "cpu":
        return torch.float32
    text = raw_config.get("text_config") or {}
    spelled = [c.get(key) for c in (raw_config, text) for key in ("dtype", "torch_dtype")]
    stored = _DTYPES.get(str(next((s for s in spelled if s), "bfloat16")), torch.bfloat16)
    return torch.bfloat16 if stored in (torch.float32, torch.float64) else stored


def read_json(path: Path) -> dict[str, Any]:
    """Parse one of a model folder's JSON files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModel(
            f"{path.name} is missing", field="model", given=str(path.parent)
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModel(
            f"{path.name} is not JSON: {error}", field="model", given=str(path.parent)
        ) from error
    if not isinstance(content, dict):
        raise UnsupportedModel(
            f"{path.name} is not a JSON object", field="model", given=str(path.parent)
        )
    return content


def _with_generation_eos(config: ModelConfig, folder: Path) -> ModelConfig:
    """Add the end tokens that only generation_config.json names."""
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    more = read_json(path).get("eos_token_id")
    more = [more] if isinstance(more, int) else more or []
    merged = dict.fromkeys((*config.eos_token_ids, *more))
    return replace(config, eos_token_ids=tuple(merged))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names.

    Raises:
        UnsupportedModel: there are none, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [folder / shard for shard in shards]
    else:
        files = [folder / "model.safetensors"]
    missing = [f.name for f in files if f.parent != folder or not f.is_file()]
    if missing or not files:
        raise UnsupportedModel(
            f"weight files are missing: {', '.join(missing) or 'the index is empty'}",
            field="model",
            given=str(folder),
            remedy="Only safetensors are read; convert other formats first",
        )
    return files


def read_weights(decoder: Decoder, folder: Path) -> None:
    """Copy a checkpoint's tensors into the decoder's parameters, converting dtype on the way.

    Only one tensor of the file is in memory besides the parameters.

    Raises:
        UnsupportedModel: tensors are missing, of another shape, or not known.
    """
    files = weight_files(folder)
    parts = tensor_parts(decoder.config)
    try:
        where = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                where.update(dict.fromkeys(opened.keys(), file))
        names = {_spelling(parts, where)(part.name): part for part in parts}
        _check_names(decoder.config, names, where, folder)
        parameters = dict(decoder.named_parameters())
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name in names:
                        _copy(opened.get_tensor(name), names[name], parameters, folder)
    except SafetensorError as error:
        raise UnsupportedModel(
            f"the weights cannot be read: {error}",
            field="model",
            given=str(folder),
            remedy="A file may be empty or cut short: fetch it again",
        ) from error


def _spelling(parts: list[Part], where: dict[str, Path]) -> Any:
    """How this checkpoint spells the Hub's names: a function of the usual name."""
    embedding = parts[0].name
    for usual, here in _PREFIXES:
        if embedding.startswith(usual) and here + embedding.removeprefix(usual) in where:

            def spell(name: str, usual: str = usual, here: str = here) -> str:
                return here + name.removeprefix(usual) if name.startswith(usual) else name

            return spell
    return lambda name: name


def _check_names(
    config: ModelConfig, names: dict[str, Part], where: dict[str, Path], folder: Path
) -> None:
    missing = sorted(set(names) - set(where))
    if missing:
        raise UnsupportedModel(
            f"{len(missing)} tensors are missing, among them {', '.join(missing[:3])}",
            field="model",
            given=str(folder),
            remedy=f"The config says {config.family}; is the folder complete?",
        )
    extra = [n for n in sorted(set(where) - set(names)) if not _UNREAD.search(n)]
    if config.tie_embeddings:
        extra = [n for n in extra if not n.endswith("lm_head.weight")]
    if extra:
        raise UnsupportedModel(
            f"{len(extra)} tensors have no place in a {config.family}, among them "
            f"{', '.join(extra[:3])}",
            field="model",
            given=str(folder),
            remedy="Loading would change what the model computes; check config.json",
        )


def _copy(
    tensor: torch.Tensor, part: Part, parameters: dict[str, torch.nn.Parameter], folder: Path
) -> None:
    if tuple(tensor.shape) != part.shape:
        raise UnsupportedModel(
            f"{part.name} has shape {tuple(tensor.shape)}, the config asks for {part.shape}",
            field="model",
            given=str(folder),
        )
    place_of(part, parameters).copy_(tensor.T if part.transposed else tensor)


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer, by transformers, without network.

    Raises:
        UnsupportedModel: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    stated = read_json(path).get("tokenizer_class") if path.is_file() else None
    # This class takes tokenizer.json as it is; the automatic choice goes by the model's family
    # and may rebuild the tokenizer in that family's way.
    plain = stated == "PreTrainedTokenizerFast" and (folder / "tokenizer.json").is_file()
    chosen = PreTrainedTokenizerFast if plain else AutoTokenizer
    try:
        return chosen.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"the tokenizer cannot be read: {' '.join(str(error).split())}",
            field="model",
            given=str(folder),
            remedy="The folder needs a tokenizer.json",
        ) from error


def random_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Decoder:
    """A decoder with random weights: normal with variance 1 / fan-in, norms at one, biases at 0."""
    decoder = Decoder(config, device=device, dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.dim() == 1:
            parameter.data.fill_(0.0 if config.norm_unit_offset else 1.0)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return decoder.eval()
