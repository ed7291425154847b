"""Structured output: which tokens a JSON schema, a regular expression or a choice admits next.

The automata are llguidance's; it is imported only when the first grammar comes.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invivo.engine.types import Grammar
from invivo.errors import InvalidRequest, MissingDependency

# Between the parts of a JSON value: nothing, one blank, or a line break with an indent. Without a
# bound a small model can go on with blanks for ever.
_JSON_BLANKS = r"(\n[ ]{0,16}|[ ])?"
KEEP_COMPILED = 64  # grammars kept ready, oldest out first


class Matcher:
    """Follows one sequence through its grammar."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Write one bit a token (1 = admitted) into ``words``, [ceil(V / 32)]."""
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def accept(self, token: int) -> bool:
        """Move on by a drawn token; False when the grammar did not admit it."""
        return bool(self._inner.consume_token(token))

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further (it grew too complex); "" when it can."""
        return _first_line(self._inner.get_error()) if self._inner.is_error() else ""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._inner.is_stopped())


class GrammarCompiler:
    """Makes matchers for one tokenizer; thread-safe. Compiled grammars are kept for reuse.

    Args:
        tokenizer: transformers fast tokenizer.
        vocab_size: V of the model's logits, which may exceed the tokenizer's.
        eos_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: dict[Grammar, Any] = {}

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of ``grammar``.

        Raises:
            InvalidRequest: the grammar cannot be compiled; the field is its kind.
            MissingDependency: llguidance is not installed.
        """
        with self._lock:
            inner = self._compiled.get(grammar)
            if inner is None:
                inner = self._compile(grammar)
                while len(self._compiled) >= KEEP_COMPILED:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[grammar] = inner
            return Matcher(inner.deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise MissingDependency(
                "structured output needs llguidance",
                field=grammar.kind,
                remedy="pip install 'invivo[serve]'",
            ) from error
        if self._vocabulary is None:
            self._vocabulary = llguidance.hf.from_tokenizer(
                self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_ids or None
            )
        source = _llguidance_source(llguidance.LLMatcher, grammar)
        inner = llguidance.LLMatcher(self._vocabulary, source, log_level=0)
        if inner.is_error():
            raise InvalidRequest(
                f"cannot be compiled: {_first_line(inner.get_error())}",
                field=grammar.kind,
                given=grammar.source,
                remedy="Simplify it, or use only keywords that the grammar library knows",
            )
        return inner


def _llguidance_source(matcher: Any, grammar: Grammar) -> str:
    """The library's own text form of a grammar."""
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.source))
    try:
        value = json.loads(grammar.source)
    except ValueError as error:
        raise InvalidRequest(
            f"is not JSON: {error}", field=grammar.kind, given=grammar.source
        ) from error
    if grammar.kind == "choice":
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(s, str) and s for s in value)
        ):
            raise InvalidRequest(
                "must be a list of non-empty strings", field="choice", given=grammar.source
            )
        return str(matcher.grammar_from_regex("|".join(_escape(s) for s in value)))
    if not isinstance(value, dict | bool):
        raise InvalidRequest(
            "must be a JSON schema object", field="json_schema", given=grammar.source
        )
    try:
        options = {"whitespace_pattern": _JSON_BLANKS}
        return str(matcher.grammar_from_json_schema(json.dumps(value), defaults=options))
    except ValueError as error:
        raise InvalidRequest(
            f"cannot be read: {_first_line(str(error))}",
            field="json_schema",
            given=grammar.source,
        ) from error


def _escape(text: str) -> str:
    """``text`` as a regular expression that matches only itself."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "unknown reason"
