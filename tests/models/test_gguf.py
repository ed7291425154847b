"""GGUF files become Hub folders with the same weights, tokenizer and logits."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.models.oracle import Oracle
from tests.models.pages import logits_of
from tests.tiny import CHAT_TEMPLATE, FAMILIES, tiny_hf_model, tiny_tokenizer

from invivo.errors import Conflict, UnsupportedModel
from invivo.models.convert import convert_gguf
from invivo.models.gguf import read_gguf
from invivo.models.load import load_model

gguf = pytest.importorskip("gguf")

from tests.models.write_gguf import finish, write_gguf  # noqa: E402 (needs gguf)

TOKENS = list(range(100, 133))

# Where the format cannot say what the tiny model does otherwise.
GGUF_OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {
        "query_pre_attn_scalar": 12,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"mlp_only_layers": []},
    "mixtral": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_keeps_its_logits(tmp_path: Path, family: str) -> None:
    model = tiny_hf_model(family, **GGUF_OVERRIDES.get(family, {}))
    write_gguf(tmp_path / "tiny.gguf", model)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    ours = load_model(str(folder))
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(ours.decoder, TOKENS) - expected).abs().max() < 1e-4
    # The folder is an ordinary one: transformers reads it too.
    theirs = Oracle(folder, torch.float32).logits(TOKENS)
    assert (theirs - expected).abs().max() < 1e-4


def test_tokenizer_and_template_survive(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_hf_model())
    loaded = load_model(str(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")))
    text = "hello world, the cat\n 12 <|im_end|> naïve 日本"
    assert loaded.tokenizer.encode(text) == tiny_tokenizer().encode(text).ids
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.tokenizer.bos_token == "<|im_start|>"
    assert loaded.tokenizer.eos_token == loaded.tokenizer.pad_token == "<|im_end|>"
    assert loaded.config.eos_token_ids == (297,)
    assert loaded.tokenizer.decode([288, 297], skip_special_tokens=True) == "hello"


def test_query_and_key_biases_of_llama_are_reordered_too(tmp_path: Path) -> None:
    model = tiny_hf_model("llama", attention_bias=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    ours = load_model(str(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")))
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(ours.decoder, TOKENS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("quantize", "worst"),
    [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 2e-2), ("Q5_0", 0.15), ("Q4_0", 0.3), ("Q4_1", 0.3)],
)
def test_weights_are_dequantised_exactly(tmp_path: Path, quantize: str, worst: float) -> None:
    model = tiny_hf_model("llama", intermediate_size=64)
    stored = write_gguf(tmp_path / "tiny.gguf", model, quantize=quantize)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    for hub, ours in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.2.self_attn.v_proj.weight", "blk.2.attn_v.weight"),
    ):
        assert np.array_equal(tensors[hub].float().numpy(), stored[ours])
        original = model.state_dict()[hub]
        assert (tensors[hub].float() - original).abs().max() < worst * original.abs().max()
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(quantize, torch.float32)
    assert {t.dtype for t in tensors.values()} == {dtype}
    dtypes = json.loads((folder / "config.json").read_text())["dtype"]
    assert dtypes == str(dtype).removeprefix("torch.")


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def scales_of_k4(packed: bytes, j: int) -> tuple[int, int]:
    """The j-th of eight 6-bit scales and minima in 12 bytes (Q4_K and Q5_K)."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
    minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
    return scale, minimum


def read_q4_k(block: bytes) -> list[float]:
    d, dmin = struct.unpack("<ee", block[:4])
    scales, nibbles = block[4:16], block[16:144]
    values = []
    for j in range(8):
        scale, minimum = scales_of_k4(scales, j)
        for i in range(32):
            byte = nibbles[32 * (j // 2) + i]
            quant = byte >> 4 if j % 2 else byte & 15
            values.append(d * scale * quant - dmin * minimum)
    return values


def read_q5_k(block: bytes) -> list[float]:
    d, dmin = struct.unpack("<ee", block[:4])
    scales, high, nibbles = block[4:16], block[16:48], block[48:176]
    values = []
    for j in range(8):
        scale, minimum = scales_of_k4(scales, j)
        for i in range(32):
            byte = nibbles[32 * (j // 2) + i]
            quant = (byte >> 4 if j % 2 else byte & 15) + 16 * ((high[i] >> j) & 1)
            values.append(d * scale * quant - dmin * minimum)
    return values


def read_q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:210])
    values = []
    for i in range(256):
        part, rest = divmod(i, 128)  # two halves of four runs of 32
        run, place = divmod(rest, 32)
        byte = low[64 * part + 32 * (run % 2) + place]
        four = byte >> 4 if run >= 2 else byte & 15
        two = (high[32 * part + place] >> (2 * run)) & 3
        values.append(d * scales[i // 16] * ((four | two << 4) - 32))
    return values


@pytest.mark.parametrize(
    ("kind", "size", "numbers", "read"),
    [
        ("Q4_K", 144, [0, 2], read_q4_k),
        ("Q5_K", 176, [0, 2], read_q5_k),
        ("Q6_K", 210, [208], read_q6_k),
    ],
)
def test_k_quants_against_the_format_written_out(
    tmp_path: Path,
    kind: str,
    size: int,
    numbers: list[int],
    read: Callable[[bytes], list[float]],
) -> None:
    random = np.random.default_rng(5)
    blocks = random.integers(0, 256, (3, 2, size), dtype=np.uint8)
    for place in numbers:  # half-precision factors: random bytes could be nan
        for row in blocks.reshape(-1, size):
            row[place : place + 2] = np.frombuffer(half(random.uniform(-1, 1)), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", blocks.reshape(3, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    tensor = read_gguf(tmp_path / "one.gguf").tensors["w"]
    assert (tensor.shape, tensor.type) == ((3, 512), kind)
    expected = [[v for block in row for v in read(block.tobytes())] for row in blocks]
    np.testing.assert_allclose(tensor.read().numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tensor.read(1).numpy(), expected[1], rtol=1e-5, atol=1e-6)


def llama3_divisors(theta: float, dim: int, factor: float) -> torch.Tensor:
    """The divisors that the converter stores for Llama 3.1's rule."""
    out = []
    for i in range(0, dim, 2):
        frequency = theta ** (-i / dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(out)


@pytest.mark.parametrize("factor", [8.0, 32.0, 5.0])
def test_llama3_scaling_is_found_from_its_divisors(tmp_path: Path, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_hf_model("llama", head_dim=64, rope_parameters=scaling)
    extra = {"rope_freqs.weight": llama3_divisors(5e5, 64, factor)}
    write_gguf(tmp_path / "tiny.gguf", model, extra=extra, metadata={"rope.scaling.type": None})
    ours = load_model(str(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")))
    found = dict(ours.config.ropes[0].scaling or ())
    # Only the released models' factors are known by name; others keep their divisors.
    assert found["rope_type"] == ("longrope" if factor == 5.0 else "llama3")
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(ours.decoder, TOKENS) - expected).abs().max() < 1e-4


def test_longrope_factors_of_phi3_are_kept(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.2],
        "long_factor": [2.0, 9.0],
    }
    model = tiny_hf_model("phi3", rope_parameters=scaling, original_max_position_embeddings=64)
    extra = {
        "rope_factors_short.weight": torch.tensor([1.0, 1.2]),
        "rope_factors_long.weight": torch.tensor([2.0, 9.0]),
    }
    write_gguf(tmp_path / "tiny.gguf", model, extra=extra)
    ours = load_model(str(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")))
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(ours.decoder, TOKENS) - expected).abs().max() < 1e-4


def test_a_copied_output_matrix_is_tied_again(tmp_path: Path) -> None:
    model = tiny_hf_model("gpt2")
    extra = {"output.weight": model.transformer.wte.weight.detach()}
    write_gguf(tmp_path / "tiny.gguf", model, extra=extra)
    ours = load_model(str(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")))
    assert ours.config.tie_embeddings


def test_progress_is_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_hf_model())
    told: list[float] = []
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "f", progress=lambda _, s: told.append(s))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"GGML" + data[4:], "not a readable GGUF"),
        (lambda data: data[:100], "not a readable GGUF"),
        (lambda data: data[:-5000], "not a readable GGUF"),
        (lambda data: b"", "not a readable GGUF"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_kount"), "block_count"),
        (lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_op.weight"), "blk.1.ffn_up"),
    ],
)
def test_unreadable_files_are_refused_and_leave_nothing(
    tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_hf_model())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnsupportedModel, match=says):
        convert_gguf(path, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    with pytest.raises(UnsupportedModel, match=r"mamba.*Supported: llama"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "folder")


def test_existing_folders_are_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_hf_model())
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    with pytest.raises(Conflict):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
