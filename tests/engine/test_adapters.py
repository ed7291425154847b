"""LoRA adapters: equal to the peft library, side by side in one batch, versions and slots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.drive import ask, run, settle, small_engine
from tests.tiny import tiny_hf_model, tiny_model_folder

from invivo.engine.adapters import AdapterStore
from invivo.engine.engine import Engine
from invivo.errors import InvalidRequest, NotFound
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.load import LoadedModel, load_model

peft = pytest.importorskip("peft")


def make_adapter(
    folder: Path, family: str = "llama", *, seed: int = 1, **options: Any
) -> tuple[Path, Any]:
    """An adapter with random matrices, saved by peft; also its model, adapter applied."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    model = peft.get_peft_model(tiny_hf_model(family), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder, model.eval()


def our_logits(model: LoadedModel, tokens: list[int], adapter: Path | None) -> torch.Tensor:
    layout = contiguous_layout([len(tokens)])
    cache = allocate_kv_cache(
        model.config,
        n_blocks=blocks_needed([len(tokens)]),
        block_size=16,
        device="cpu",
        dtype=torch.float32,
    )
    bypass = None
    if adapter is not None:
        store = AdapterStore(
            model.config, device="cpu", dtype=torch.float32, max_slots=2, max_rank=64
        )
        store.load("a", adapter)
        slot = store.place(store.hold("a"))
        bypass = store.bypass(torch.full((len(tokens),), slot, dtype=torch.int32))
    with torch.inference_mode():
        hidden = model.decoder(torch.tensor(tokens), layout, cache, bypass=bypass)
        return model.decoder.logits(hidden)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear maps": ("llama", {}),
    "q and v only": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "up without gate": ("llama", {"target_modules": ["up_proj"]}),
    "regular expression": ("llama", {"target_modules": r".*\.1\..*(k_proj|down_proj)"}),
    "rank-stabilised": ("llama", {"use_rslora": True, "r": 5}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 7, r"layers\.2\.self_attn\.q_proj": 2},
            "alpha_pattern": {"k_proj": 3, r".*\.0\.mlp\.gate_proj": 16},
        },
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "Gemma 3": ("gemma3_text", {}),
    "Qwen 3": ("qwen3", {}),
    "Phi-3": ("phi3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_peft(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    adapter, reference = make_adapter(tmp_path / "adapter", family, **options)
    model = load_model(str(tiny_model_folder(tmp_path, family)))
    tokens = [5, 77, 260, 3, 9, 141, 280, 33]
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
        merged = reference.merge_and_unload()(torch.tensor([tokens])).logits[0]
    got = our_logits(model, tokens, adapter)
    assert (got - expected).abs().max() < 1e-4
    assert (got - merged).abs().max() < 1e-4
    assert (our_logits(model, tokens, None) - expected).abs().max() > 0.05


def test_tensors_in_memory_are_as_good_as_a_folder(tmp_path: Path, tiny: LoadedModel) -> None:
    folder, _ = make_adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    engine = small_engine(tiny)
    engine.adapters.load("file", folder)
    engine.adapters.load("memory", (config, tensors))
    one, other = (ask(engine, [1, 2, 3], adapter=a, max_tokens=6, temperature=0.0)
                  for a in ("file", "memory"))  # fmt: skip
    run(engine, one, other)
    assert one.tokens() == other.tokens()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    change: dict[str, Any], name: str, tmp_path: Path, tiny: LoadedModel
) -> None:
    folder, _ = make_adapter(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidRequest) as error:
        small_engine(tiny).adapters.load("a", folder)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding"),
        ("base_model.model.lm_head.lora_A.weight", "lm_head"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "layer 9"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "bias"),
        ("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight", "expert"),
        ("something.else", "unknown tensor"),
    ],
)
def test_unsupported_tensors_are_refused_by_name(
    key: str, word: str, tmp_path: Path, tiny: LoadedModel
) -> None:
    folder, _ = make_adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {key: torch.zeros(4, 32)}, path)
    with pytest.raises(InvalidRequest) as error:
        small_engine(tiny).adapters.load("a", folder)
    assert word in str(error.value)


def test_adapters_of_another_model_and_too_large_ranks_are_refused(
    tmp_path: Path, tiny: LoadedModel
) -> None:
    folder, _ = make_adapter(tmp_path, r=9)
    with pytest.raises(InvalidRequest, match="max_lora_rank"):
        small_engine(tiny, max_lora_rank=8).adapters.load("a", folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("q_proj.lora_A.weight"))
    save_file(tensors | {key: torch.zeros(9, 33)}, path)
    with pytest.raises(InvalidRequest, match="does not fit the model"):
        small_engine(tiny).adapters.load("a", folder)


def test_missing_and_broken_files_are_typed_errors(tmp_path: Path, tiny: LoadedModel) -> None:
    store = small_engine(tiny).adapters
    with pytest.raises(NotFound):
        store.load("a", tmp_path / "nowhere")
    folder, _ = make_adapter(tmp_path / "ok")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"not a safetensors file")
    with pytest.raises(InvalidRequest, match="adapter_model"):
        store.load("a", folder)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(NotFound, match="pickled weights are not read"):
        store.load("a", folder)
    (folder / "adapter_config.json").write_text("[]")
    weights.write_bytes(b"")
    with pytest.raises(InvalidRequest, match="not a JSON object"):
        store.load("a", folder)
    with pytest.raises(InvalidRequest, match="name"):
        store.load("../a", folder)
    with pytest.raises(NotFound, match="loaded: none"):
        store.hold("a")


def loaded_engine(model: LoadedModel, tmp_path: Path, names: str, **options: Any) -> Engine:
    engine = small_engine(model, **options)
    for i, name in enumerate(names):
        engine.adapters.load(name, make_adapter(tmp_path / name, seed=i + 1, r=i + 2)[0])
    return engine


def test_adapters_side_by_side_answer_as_alone(tmp_path: Path, tiny: LoadedModel) -> None:
    engine = loaded_engine(tiny, tmp_path, "abc")
    asked = {"max_tokens": 8, "temperature": 0.0, "logprobs": 0}
    alone = {}
    for name in (None, "a", "b", "c"):
        alone[name] = ask(engine, [1, 2, 3, 4], adapter=name, **asked)
        run(engine, alone[name])
    assert len({tuple(i.tokens()) for i in alone.values()}) == 4
    together = [
        ask(engine, [1, 2, 3, 4], adapter=name, **asked)
        for name in ("c", None, "a", "b", None, "c", "a")
    ]
    run(engine, *together)
    for inquiry in together:
        expected = alone[inquiry.request.adapter]
        assert inquiry.tokens() == expected.tokens()
        assert inquiry.logprobs() == pytest.approx(expected.logprobs(), abs=1e-5)


def test_more_adapters_than_slots_take_turns(tmp_path: Path, tiny: LoadedModel) -> None:
    asked = {"max_tokens": 5, "temperature": 0.0}
    wide = loaded_engine(tiny, tmp_path, "abcd")
    expected = [ask(wide, [9, 8], adapter=name, **asked) for name in "abcd"]
    run(wide, *expected)
    engine = loaded_engine(tiny, tmp_path, "abcd", max_adapters=2)
    inquiries = [ask(engine, [9, 8], adapter=name, **asked) for name in "abcdabcd"]
    base = ask(engine, [9, 8], **asked)
    run(engine, *inquiries, base)
    for inquiry, other in zip(inquiries, expected * 2, strict=True):
        assert inquiry.tokens() == other.tokens()


def test_waiting_for_a_slot_can_be_cancelled(tmp_path: Path, tiny: LoadedModel) -> None:
    engine = loaded_engine(tiny, tmp_path, "ab", max_adapters=1)
    first = ask(engine, [1], adapter="a", max_tokens=20, ignore_eos=True)
    second = ask(engine, [1], adapter="b", max_tokens=20)
    engine.step()
    engine.abort(second.request.id)
    engine.step()
    assert second.done
    assert second.reason() == "cancelled"
    run(engine, first)


def test_running_requests_keep_the_version_they_began_with(
    tmp_path: Path, tiny: LoadedModel
) -> None:
    old, _ = make_adapter(tmp_path / "old", seed=1)
    new, _ = make_adapter(tmp_path / "new", seed=2)
    asked = {"adapter": "a", "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    engine = small_engine(tiny)
    assert engine.adapters.load("a", old).version == 1
    undisturbed = ask(engine, [4, 5, 6], **asked)
    run(engine, undisturbed)
    running = ask(engine, [4, 5, 6], **asked)
    engine.step()
    assert engine.adapters.load("a", new).version == 2
    later = ask(engine, [4, 5, 6], **asked)
    run(engine, running, later)
    assert running.tokens() == undisturbed.tokens()
    assert later.tokens() != undisturbed.tokens()


def test_unloading_lets_running_requests_finish(tmp_path: Path, tiny: LoadedModel) -> None:
    engine = loaded_engine(tiny, tmp_path, "a")
    running = ask(engine, [4], adapter="a", max_tokens=12, ignore_eos=True)
    engine.step()
    assert [info.running for info in engine.adapters.list()] == [1]
    engine.adapters.unload("a")
    assert engine.adapters.list() == []
    with pytest.raises(NotFound):
        ask(engine, [4], adapter="a")
    run(engine, running)
    assert len(running.tokens()) == 12
    with pytest.raises(NotFound):
        engine.adapters.unload("a")
    # The name comes back as a new version: prefixes cached under the old one must not be found.
    info = engine.adapters.load("a", tmp_path / "a")
    assert info.version == 2
    settle(engine)
