"""Loading folders in the Hub's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.pages import logits_of
from tests.tiny import FAMILIES, tiny_hf_model, tiny_model_folder

from invivo.errors import InvalidRequest, UnsupportedModel
from invivo.models.fingerprint import fingerprint_of
from invivo.models.hub_config import config_from_hf
from invivo.models.load import load_model, pick_dtype, random_model

TOKENS = list(range(5, 25))


def rewrite(folder: Path, change: Any) -> None:
    """Let ``change`` edit the dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def test_shards_give_the_same_model_and_fingerprint(tmp_path: Path) -> None:
    one = tiny_model_folder(tmp_path / "one")
    many = tmp_path / "many"
    tiny_hf_model().save_pretrained(many, max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (many / name).write_bytes((one / name).read_bytes())
    assert len(list(many.glob("*.safetensors"))) > 2
    a, b = load_model(str(one)), load_model(str(many))
    assert a.fingerprint == b.fingerprint
    assert torch.equal(logits_of(a.decoder, TOKENS), logits_of(b.decoder, TOKENS))


def test_dtype_is_converted_on_the_way(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    loaded = load_model(str(folder), dtype="bfloat16")
    assert {p.dtype for p in loaded.decoder.parameters()} == {torch.bfloat16}
    assert loaded.fingerprint == load_model(str(folder)).fingerprint
    with pytest.raises(InvalidRequest, match="float8"):
        load_model(str(folder), dtype="float8")


def test_dtype_by_default_goes_by_device_and_checkpoint() -> None:
    assert pick_dtype({"dtype": "bfloat16"}, "cpu", None) == torch.float32
    assert pick_dtype({"dtype": "float32"}, "cuda", None) == torch.bfloat16
    assert pick_dtype({"torch_dtype": "float16"}, "cuda", None) == torch.float16
    assert pick_dtype({"text_config": {"torch_dtype": "bfloat16"}}, "cuda", None) == torch.bfloat16
    assert pick_dtype({}, "cuda", None) == torch.bfloat16
    assert pick_dtype({}, "cuda", "float32") == torch.float32


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_devices_that_are_not_there_are_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_model(str(tiny_model_folder(tmp_path)), device=device)
    assert caught.value.field == "device"


def test_parameters_are_frozen(tmp_path: Path) -> None:
    loaded = load_model(str(tiny_model_folder(tmp_path)))
    assert not any(p.requires_grad for p in loaded.decoder.parameters())


def test_end_tokens_of_both_files_count(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=[297, 295])
    assert load_model(str(folder)).config.eos_token_ids == (297, 295)
    edit_json(folder / "generation_config.json", eos_token_id=7)
    assert load_model(str(folder)).config.eos_token_ids == (297, 7)
    (folder / "generation_config.json").unlink()
    assert load_model(str(folder)).config.eos_token_ids == (297,)


def test_tokenizer_and_chat_template_are_loaded(tmp_path: Path) -> None:
    tokenizer = load_model(str(tiny_model_folder(tmp_path))).tokenizer
    assert tokenizer.is_fast
    ids = tokenizer.encode("hello world, the cat")
    assert tokenizer.decode(ids) == "hello world, the cat"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_json_is_taken_as_it_is(tmp_path: Path, family: str) -> None:
    """Also where transformers would rebuild the tokenizer in the family's own way."""
    tokenizer = load_model(str(tiny_model_folder(tmp_path, family))).tokenizer
    assert len(tokenizer) == 298
    assert tokenizer.encode("the cat  12") == [257, 274, 220, 220, 16, 17]


def test_tied_model_ignores_a_stored_head(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, tie_word_embeddings=True)
    plain = load_model(str(folder))
    assert plain.decoder.head is None
    rewrite(folder, lambda t: t | {"lm_head.weight": torch.zeros(298, 32)})
    again = load_model(str(folder))
    assert torch.equal(logits_of(again.decoder, TOKENS), logits_of(plain.decoder, TOKENS))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gpt2", "transformer.", ""),
        ("llama", "model.", ""),
        ("gemma3_text", "model.", "language_model.model."),
        ("gemma3_text", "model.", "model.language_model."),
    ],
)
def test_prefixes_of_other_spellings_are_found(
    tmp_path: Path, family: str, old: str, new: str
) -> None:
    folder = tiny_model_folder(tmp_path, family)
    expected = logits_of(load_model(str(folder)).decoder, TOKENS)
    rewrite(folder, lambda t: {new + k.removeprefix(old) if k != "lm_head.weight" else k: v
                               for k, v in t.items()})  # fmt: skip
    assert torch.equal(logits_of(load_model(str(folder)).decoder, TOKENS), expected)


def test_buffers_and_other_modalities_are_passed_over(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.vision_tower.patch.weight": torch.zeros(2, 2),
    }
    rewrite(folder, lambda t: t | extra)
    load_model(str(folder))


def drop_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}


def add_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}


def bend_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"model.norm.weight": torch.ones(31)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_one, "1 tensors are missing, among them model.layers.1.mlp.up_proj.weight"),
        (add_one, "no place in a llama, among them model.layers.1.self_attn.q_proj.bias"),
        (bend_one, r"model.norm.weight has shape \(31,\), the config asks for \(32,\)"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path: Path, change: Any, says: str) -> None:
    folder = tiny_model_folder(tmp_path)
    rewrite(folder, change)
    with pytest.raises(UnsupportedModel, match=says):
        load_model(str(folder))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(UnsupportedModel, match=r"missing: model\.safetensors"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not JSON"):
        load_model(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(UnsupportedModel, match="not a JSON object"):
        load_model(str(folder))


def test_shards_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="missing"):
        load_model(str(folder))


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModel, match="tokenizer"):
        load_model(str(folder))


def test_fingerprint_tells_models_apart_and_copies_together(tmp_path: Path) -> None:
    a = tiny_model_folder(tmp_path / "a", seed=1)
    b = tiny_model_folder(tmp_path / "b", seed=1)
    c = tiny_model_folder(tmp_path / "c", seed=2)
    assert fingerprint_of(a) == fingerprint_of(b) != fingerprint_of(c)
    edit_json(b / "config.json", transformers_version="0", _name_or_path="x")
    assert fingerprint_of(a) == fingerprint_of(b)
    edit_json(b / "config.json", rms_norm_eps=1e-3)
    assert fingerprint_of(a) != fingerprint_of(b)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_run_and_are_seeded(family: str) -> None:
    config = config_from_hf(tiny_hf_model(family).config.to_dict())
    logits = logits_of(random_model(config, seed=1), TOKENS)
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert torch.equal(logits_of(random_model(config, seed=1), TOKENS), logits)
    assert not torch.equal(logits_of(random_model(config, seed=2), TOKENS), logits)


def test_gradients_flow_through_the_decoder() -> None:
    """Training comes later; the pass must already allow it, frozen weights and all."""
    from invivo.kernels.paging import blocks_needed, contiguous_layout
    from invivo.models.cache import allocate_kv_cache

    config = config_from_hf(tiny_hf_model("gemma3_text").config.to_dict())
    decoder = random_model(config, dtype=torch.float64)
    decoder.layers[1].mixer.qkv.requires_grad_(True)
    cache = allocate_kv_cache(
        config, n_blocks=blocks_needed([9]), block_size=16, device="cpu", dtype=torch.float64
    )
    # One tensor a layer: autograd does not allow writing into views of a shared one.
    cache.layers = [(k.clone(), v.clone()) for k, v in cache.layers]
    tokens = torch.tensor(TOKENS[:9])

    def loss() -> torch.Tensor:
        for k, v in cache.layers:
            k.detach_().zero_()
            v.detach_().zero_()
        hidden = decoder(tokens, contiguous_layout([9]), cache)
        return decoder.logits(hidden).log_softmax(-1)[:, 3].sum()

    weight = decoder.layers[1].mixer.qkv
    loss().backward()
    assert weight.grad is not None
    with torch.no_grad():
        for place in ((0, 3), (40, 5), (60, 0)):
            kept = weight[place].item()
            weight[place] = kept + 1e-6
            up = loss()
            weight[place] = kept - 1e-6
            down = loss()
            weight[place] = kept
            slope = (up - down) / 2e-6
            torch.testing.assert_close(weight.grad[place], slope, rtol=1e-5, atol=1e-7)
