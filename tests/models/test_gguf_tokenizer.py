"""Tokenizers built from GGUF metadata cut texts as the originals do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_tokenizer

from invivo.errors import UnsupportedModel
from invivo.models.gguf_tokenizer import tokenizer_from_gguf

SENTENCEPIECE = json.loads(
    (Path(__file__).parent / "data" / "sentencepiece_500.json").read_text(encoding="utf-8")
)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SENTENCEPIECE["pieces"],
        "tokenizer.ggml.scores": SENTENCEPIECE["scores"],
        "tokenizer.ggml.token_type": SENTENCEPIECE["types"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t.startswith("<|") else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("text", SENTENCEPIECE["texts"])
def test_sentencepiece_bpe_is_rebuilt_from_scores(text: str) -> None:
    tokenizer, _ = tokenizer_from_gguf(sentencepiece_metadata(add_bos_token=False))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False).replace("> b", ">b") == text
    if "<tool>" in text:  # a space is put after special tokens too, as llama.cpp does
        text_ids = [SENTENCEPIECE["pieces"].index(p) for p in ("▁a", "<tool>", "▁b")]
        assert ids == text_ids
    else:
        assert ids == SENTENCEPIECE["texts"][text]


def test_begin_and_end_tokens_are_added_as_the_file_says() -> None:
    plain, _ = tokenizer_from_gguf(sentencepiece_metadata(add_bos_token=False))
    body = plain.encode("peace").ids
    default, config = tokenizer_from_gguf(sentencepiece_metadata())
    assert default.encode("peace").ids == [1, *body]
    assert default.encode("peace", add_special_tokens=False).ids == body
    both, _ = tokenizer_from_gguf(sentencepiece_metadata(add_eos_token=True))
    assert both.encode("peace").ids == [1, *body, 2]
    assert both.encode("peace", "peace").ids == [1, *body, 2] * 2
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert config["model_max_length"] == 512


def test_no_space_is_put_in_front_where_the_file_says_so() -> None:
    tokenizer, _ = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode("peace").ids) == "peace"
    assert "▁" not in "".join(tokenizer.encode("peace").tokens)


def test_gemma_spells_runs_of_spaces_and_ranks_by_position() -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "   ", "▁a", "ab", "▁ab", "▁", "a", "b"]
    metadata = {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.token_type": [3, 3, 3, 3, 4, 4, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer, _ = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a   b").tokens == ["<bos>", "a", "▁▁▁", "b"]
    assert tokenizer.encode("b ab").tokens == ["<bos>", "b", "▁ab"]
    assert tokenizer.decode(tokenizer.encode("a   b ab").ids) == "a   b ab"


def pieces(rule: str, text: str) -> list[str]:
    tokenizer, _ = tokenizer_from_gguf(byte_level_metadata(pre=rule))
    assert tokenizer.pre_tokenizer is not None
    return [word.replace("Ġ", " ") for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("gpt-2", ["It", "'s", " 1234", "  ", " 56", "!!"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "   ", "5", "6", "!!"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", "  ", " ", "56", "!!"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "  ", " ", "5", "6", "!!"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "  ", " ", "5", "6", "!!"]),
    ],
)
def test_words_are_cut_by_the_files_rule(rule: str, words: list[str]) -> None:
    assert pieces(rule, "It's 1234   56!!") == words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "t5"}, "Supported: gpt2"),
        ({"model": None}, "Supported: gpt2"),
        ({"tokens": []}, "with vocabulary"),
        ({"pre": "unheard-of"}, "rule by which this vocabulary cuts words"),
    ],
)
def test_unknown_tokenizers_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        tokenizer_from_gguf(byte_level_metadata(**changes))


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer, _ = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("<think>hello<|im_end|>").ids
    assert ids == [298, 288, 297]
    assert tokenizer.decode(ids) == "<think>hello"
