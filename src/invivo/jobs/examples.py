"""From a file of training data to token ids with the tokens that are learned marked."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invivo.chat_template import apply_template, has_chat_template, written_messages
from invivo.engine.detokenize import backend
from invivo.errors import InvalidRequest, InvivoError
from invivo.jobs.chat_spans import marked_spans, marks_answers, spans
from invivo.jobs.records import (
    MAX_PROBLEMS,
    BadLine,
    Chat,
    Completed,
    InvalidData,
    Problem,
    Record,
    decoded,
    is_plain,
    parse_line,
    parse_record,
)

PIECE = 1024  # tokens of a piece of a plain text, unless told
_BITE = 1 << 16  # characters of a plain text tokenised at once


@dataclass(frozen=True, slots=True)
class Examples:
    """Token ids of all examples, one after the other.

    Attributes:
        tokens: [N] int32.
        learned: [N] bool, whether the token is predicted with a loss.
        starts: [n + 1] int64, example i is tokens[starts[i] : starts[i + 1]].
        n_truncated: examples that were cut off.
        runs: prompts of other runs of each example, as token ids; empty where there are none.
        others: of each example tokens in place of the learned ones; empty where there are none.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    starts: NDArray[np.int64]
    n_truncated: int = 0
    runs: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    others: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def digest(self) -> str:
        """The same for the same examples in the same order."""
        told = hashlib.sha256()
        for part in (self.tokens, self.learned, self.starts):
            told.update(np.ascontiguousarray(part).tobytes())
        if self.runs:
            told.update(repr([sorted(runs.items()) for runs in self.runs]).encode())
        if self.others:
            told.update(repr(self.others).encode())
        return told.hexdigest()[:16]


class ExampleReader:
    """Reads training data for one model.

    Args:
        tokenizer: transformers' fast tokenizer.
        end_tokens: ids that end an answer; the first is put after a text and a completion.
        longest: most tokens of an example.
        truncate: cut longer ones off instead of refusing them.
        going_on: asked now and then; the reading stops with Interrupted when it says no.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: Sequence[int],
        longest: int,
        *,
        truncate: bool = False,
        going_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._hub = tokenizer
        self._tokenizer = backend(tokenizer)
        self._end_tokens = list(end_tokens)
        self._ends = [self._tokenizer.id_to_token(token) or "" for token in end_tokens]
        self._ends = [text for text in self._ends if text]
        self._longest = longest
        self._truncate = truncate
        self._going_on = going_on
        self._marked = marks_answers(getattr(tokenizer, "chat_template", None))

    def read(self, path: Path, filename: str, piece: int = PIECE) -> Examples:
        """All examples of a file; ``piece`` is the length of a plain text's pieces.

        Raises:
            InvalidData: it has bad lines, or nothing to learn.
            Interrupted: ``going_on`` said no.
        """
        if is_plain(filename):
            return self._plain(path, min(piece, self._longest))
        with path.open("rb") as file:
            return self._gather((n, _parsed(line)) for n, line in decoded(file))

    def records(self, values: Iterable[Mapping[str, Any]]) -> Examples:
        """The same from objects in memory, numbered from 1."""
        return self._gather((n, _attempt(parse_record, v)) for n, v in enumerate(values, start=1))

    def _gather(self, records: Iterator[tuple[int, Record | BadLine]]) -> Examples:
        gathered = _Gathered()
        problems: list[Problem] = []
        n_truncated = 0
        for number, record in records:
            if not self._going_on():
                raise Interrupted
            try:
                if isinstance(record, BadLine):
                    raise record
                for tokens, learned in self._encoded(record):
                    n_truncated += len(tokens) > self._longest
                    gathered.add(*self._fitting(tokens, learned))
                    gathered.runs.append(self._runs(record))
                    gathered.others.append(self._other(record, tokens, learned))
            except BadLine as problem:
                problems.append(problem.at(number))
            except InvivoError as error:  # the chat template refuses the messages
                problems.append(
                    Problem(number, error.field, error.message, error.given, error.remedy)
                )
            if len(problems) == MAX_PROBLEMS:
                break
        if problems:
            raise InvalidData(problems)
        return gathered.examples(n_truncated)

    def _fitting(self, tokens: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
        if len(tokens) > self._longest:
            if not self._truncate:
                raise BadLine(
                    None,
                    f"has {len(tokens)} tokens, at most {self._longest} can be trained",
                    remedy="Shorten or split it, or set truncate to cut such examples off",
                )
            tokens, learned = tokens[: self._longest], learned[: self._longest]
        if not any(learned[1:]):
            raise BadLine(
                None,
                "has nothing to learn within its first tokens",
                len(tokens),
                "Leave it out, or shorten what stands before the answer",
            )
        return tokens, learned

    def _runs(self, record: Record) -> Mapping[str, tuple[int, ...]]:
        given = record.runs if isinstance(record, Completed) else {}
        return {
            name: tuple(self._tokenizer.encode(text, add_special_tokens=True).ids)
            for name, text in given.items()
        }

    def _other(
        self, record: Record, tokens: Sequence[int], learned: Sequence[bool]
    ) -> tuple[int, ...]:
        """Tokens of what an example's completion is compared with; none where there is nothing."""
        if not isinstance(record, Completed) or record.other is None:
            return ()
        compared = Completed(record.prompt, record.other)
        ((others, also_learned),) = self._encoded(compared)
        if list(also_learned) != list(learned):
            raise BadLine(
                "other",
                "must have as many tokens as the completion",
                record.other,
                "Compare single words",
            )
        return tuple(token for token, one in zip(others, learned, strict=True) if one)

    def _encoded(self, record: Record) -> Iterator[tuple[list[int], list[bool]]]:
        if isinstance(record, Chat):
            yield from self._chat(record)
        elif isinstance(record, Completed):
            whole = record.prompt + record.completion
            encoding = self._tokenizer.encode(whole, add_special_tokens=True)
            bounds = [(len(record.prompt), len(whole))]
            yield self._ended(encoding.ids, _inside(encoding, bounds))
        else:
            encoding = self._tokenizer.encode(record.text, add_special_tokens=True)
            yield self._ended(encoding.ids, [True] * len(encoding.ids))

    def _ended(self, ids: Sequence[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
        """With the token that ends a text, where the tokenizer does not write it itself."""
        end = self._end_tokens[:1]
        if ids and ids[-1] in self._end_tokens:
            return list(ids), [*learned[:-1], True]
        return [*ids, *end], [*learned, *[True] * len(end)]

    def _chat(self, chat: Chat) -> Iterator[tuple[list[int], list[bool]]]:
        if not has_chat_template(self._hub):
            raise BadLine(
                "messages",
                "the model has no chat template",
                remedy='Write {"prompt": ..., "completion": ...}, or take a chat model',
            )
        messages, tools = written_messages(self._hub, chat.messages, chat.tools)
        chat = Chat([dict(m) for m in messages], chat.learned, chat.tools)
        if self._marked:
            yield self._marked_chat(chat, tools)
            return

        def render(some: Sequence[dict[str, Any]], begun: bool) -> str:
            return apply_template(self._hub, some, tools, begun)

        for rendered in spans(chat, render, self._ends):
            encoding = self._tokenizer.encode(rendered.text, add_special_tokens=False)
            yield list(encoding.ids), _inside(encoding, rendered.learned)

    def _marked_chat(
        self, chat: Chat, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[int], list[bool]]:
        given = self._hub.apply_chat_template(
            chat.messages,
            tools=[dict(tool) for tool in tools] if tools else None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(given["input_ids"]), list(given["assistant_masks"])
        edges = [0, *[i for i in range(1, len(mask)) if mask[i] != mask[i - 1]], len(mask)]
        marked = [(a, b) for a, b in pairwise(edges) if a < b and mask[a]]
        learned = [False] * len(ids)
        for start, stop in marked_spans(chat, marked):
            learned[start:stop] = [True] * (stop - start)
        return ids, learned

    def _plain(self, path: Path, piece: int) -> Examples:
        """One text in pieces of ``piece`` tokens, each begun as the tokenizer begins a text."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidData(
                [Problem(1, None, "the file is not UTF-8 text", remedy="Save it as UTF-8")]
            ) from error
        begin = self._tokenizer.encode("", add_special_tokens=True).ids
        begin = [] if begin and begin[-1] in self._end_tokens else list(begin)
        room = piece - len(begin)
        gathered = _Gathered()
        held: list[int] = []
        for bite in _bites(text):
            if not self._going_on():
                raise Interrupted
            held += self._tokenizer.encode(bite, add_special_tokens=False).ids
            while len(held) >= room:
                cut, held = begin + held[:room], held[room:]
                gathered.add(cut, [True] * len(cut))
        held += self._end_tokens[:1]
        if len(begin) + len(held) > 1 and text.strip():
            gathered.add(begin + held, [True] * (len(begin) + len(held)))
        return gathered.examples(0)


class Interrupted(Exception):
    """Nobody waits for these examples any more."""


@dataclass(slots=True)
class _Gathered:
    tokens: array[int] = field(default_factory=lambda: array("i"))
    learned: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=lambda: [0])
    runs: list[Mapping[str, tuple[int, ...]]] = field(default_factory=list)
    others: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, tokens: Sequence[int], learned: Sequence[bool]) -> None:
        self.tokens.extend(tokens)
        self.learned.extend(learned)
        self.starts.append(len(self.tokens))

    def examples(self, n_truncated: int) -> Examples:
        if len(self.starts) == 1:
            raise InvalidData([Problem(1, None, "the file has no examples")])
        return Examples(
            np.array(self.tokens, np.int32),
            np.frombuffer(bytes(self.learned), np.bool_),
            np.array(self.starts, np.int64),
            n_truncated,
            tuple(self.runs) if any(self.runs) else (),
            tuple(self.others) if any(self.others) else (),
        )


def _parsed(line: str | BadLine) -> Record | BadLine:
    return line if isinstance(line, BadLine) else _attempt(parse_line, line)


def _attempt(parse: Callable[[Any], Record], value: Any) -> Record | BadLine:
    try:
        return parse(value)
    except BadLine as problem:
        return problem


def _inside(encoding: Any, pieces: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens have a character in one of the pieces; pieces come in order.

    A token that lies across the edge of a piece counts to it, as in scoring.
    """
    learned = []
    at = 0
    for start, stop in encoding.offsets:
        while at < len(pieces) and pieces[at][1] <= start:
            at += 1
        learned.append(at < len(pieces) and start < stop and stop > pieces[at][0])
    return learned


def _bites(text: str) -> Iterator[str]:
    """The text in parts that end with a line, so that no word is cut."""
    start = 0
    while start < len(text):
        stop = text.rfind("\n", start, start + _BITE) + 1
        if start + _BITE >= len(text):
            stop = len(text)
        elif stop <= start:  # one very long line
            stop = start + _BITE
        yield text[start:stop]
        start = stop


def longest_example(max_length: int | None, can_train: int) -> int:
    """Most tokens of an example.

    Raises:
        InvalidRequest: more than the engine can train.
    """
    if max_length is None:
        return can_train
    if max_length > can_train:
        raise InvalidRequest(
            f"the engine can train at most {can_train} tokens at once",
            field="max_length",
            given=max_length,
            remedy="Ask for less, or start the engine with a larger cache",
        )
    return max_length
