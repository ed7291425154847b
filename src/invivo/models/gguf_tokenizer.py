"""A tokenizer.json from the metadata of a GGUF file.

The file holds vocabulary, merges or scores, kinds of tokens and the name of the rule that cuts
text into words; the rest of a tokenizer follows from its type. Two types are built: byte-level
BPE ("gpt2") and SentencePiece BPE ("llama"), the latter in Llama's and in Gemma's form.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from invivo.errors import UnsupportedModel

_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens in tokenizer.ggml.token_type
_SPACE = "▁"

# How the words of a byte-level vocabulary were cut when its merges were learned.
_LETTERS_AND_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_THREE_DIGITS = _LETTERS_AND_DIGITS.replace("DIGITS", "{1,3}")
_ONE_DIGIT = _LETTERS_AND_DIGITS.replace("DIGITS", "")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REGEXES = {
    "llama-bpe": _THREE_DIGITS,
    "llama3": _THREE_DIGITS,
    "llama-v3": _THREE_DIGITS,
    "dbrx": _THREE_DIGITS,
    "smaug-bpe": _THREE_DIGITS,
    "qwen2": _ONE_DIGIT,
    "deepseek-r1-qwen": _ONE_DIGIT,
    "tekken": _CASED,
}
_PLAIN = ("default", "gpt-2", "gpt2", "olmo", "mpt", "jais", "phi-2")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def tokenizer_from_gguf(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer and the content of its ``tokenizer_config.json``.

    Args:
        metadata: of :class:`~invivo.models.gguf.GGUFFile`.

    Raises:
        UnsupportedModel: a kind of tokenizer, or of word cutting, that is not known.
    """
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens or kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            "this kind of GGUF tokenizer is not supported",
            field="tokenizer.ggml.model",
            given=kind,
            remedy="Supported: gpt2 (byte-level BPE), llama (SentencePiece BPE), with vocabulary",
        )
    architecture = str(metadata.get("general.architecture"))
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif architecture.startswith("gemma"):
        tokens = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
        tokenizer = _gemma(metadata, tokens)
    else:
        tokenizer = _llama(metadata, tokens)
    _add_special(tokenizer, metadata, tokens)
    special = {
        name: tokens[metadata[key]]
        for name, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        )
        if 0 <= metadata.get(key, -1) < len(tokens)
    }
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = special.get("bos_token") if add_bos else None
    after = special.get("eos_token") if add_eos else None
    if before or after:
        tokenizer.post_processor = _template(tokenizer, before, after)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{architecture}.context_length", 1 << 20),
        **special,
    }
    template = metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return tokenizer, config


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges") or []]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    rule = metadata.get("tokenizer.ggml.pre", "default")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=rule not in _REGEXES)
    if rule in _REGEXES:
        split = pre_tokenizers.Split(Regex(_REGEXES[rule]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, words])
    elif rule in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif rule in _PLAIN:
        tokenizer.pre_tokenizer = words
    else:
        raise UnsupportedModel(
            "the rule by which this vocabulary cuts words is not known",
            field="tokenizer.ggml.pre",
            given=rule,
            remedy=f"Supported: {', '.join(sorted((*_REGEXES, *_SINGLE_DIGITS, *_PLAIN)))}",
        )
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], rank: list[float]) -> Tokenizer:
    """BPE with byte fallback; merges from the file or rebuilt, the greatest ``rank`` first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    stated = metadata.get("tokenizer.ggml.merges")
    merges = [tuple(m.split(" ", 1)) for m in stated] if stated else _rebuild_merges(vocab, rank)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )


def _rebuild_merges(vocab: dict[str, int], rank: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best token first.

    SentencePiece joins the pair whose result ranks highest, and its file lists only the results.
    Cuts of the same token are ordered longer left piece first.
    """
    found = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-rank[index], -cut, left, right))
    found.sort(key=lambda f: f[:2])
    return [(left, right) for _, _, left, right in found]


def _gemma(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    # Gemma's scores do not follow its merges; the order of the vocabulary does.
    tokenizer = _sentencepiece(metadata, tokens, [-float(i) for i in range(len(tokens))])
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _llama(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    tokenizer = _sentencepiece(metadata, tokens, metadata["tokenizer.ggml.scores"])
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tail: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        # At the start and after each special token, as llama.cpp and the Hub's Llama files do.
        steps.insert(0, normalizers.Prepend(_SPACE))
        tail.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(tail)
    return tokenizer


def _add_special(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Tokens that are matched whole: control tokens, hidden from text, and user-defined ones."""
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and token.strip(_SPACE)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _template(tokenizer: Tokenizer, before: str | None, after: str | None) -> Any:
    """Put the begin and end tokens around each text."""
    head = [f"{before}:0"] if before else []
    tail = [f"{after}:0"] if after else []
    second = [piece.replace(":0", ":1") for piece in [*head, "$B:0", *tail]]
    return processors.TemplateProcessing(
        single=[*head, "$A:0", *tail],
        pair=[*head, "$A:0", *tail, *second],
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (before, after) if t],
    )
