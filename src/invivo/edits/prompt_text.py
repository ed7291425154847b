"""What selectors look at: the tokens of a run with their texts, turns and marked ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PromptText:
    """The tokens of one run.

    Attributes:
        ids: token ids; those from ``n_prompt`` on are generated tokens that are known already.
        texts: text of each token.
        text: the whole text, in which spans and patterns are looked for.
        offsets: (start, end) of each token in ``text``; empty ranges for tokens without text.
        n_prompt: how many tokens are the prompt; None: all.
        n_new: how many tokens may follow the prompt at most; None: those that are known.
        n_past: leading tokens of which a request wants nothing but that later ones see them: all
            that a prefix cache can spare it; None: all but the prompt's last.
        turns: (role, first token, end) of each turn of a chat.
        groups: marked ranges of tokens by name (an image, the blocks of a set).
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    text: str
    offsets: tuple[Range, ...]
    n_prompt: int = -1
    n_new: int = -1
    n_past: int = -1
    turns: tuple[tuple[str, int, int], ...] = ()
    groups: Mapping[str, tuple[Range, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.texts) == len(self.offsets)
        if self.n_prompt < 0:
            object.__setattr__(self, "n_prompt", len(self.ids))
        if self.n_new < 0:
            object.__setattr__(self, "n_new", len(self.ids) - self.n_prompt)
        if self.n_past < 0:
            object.__setattr__(self, "n_past", max(self.n_prompt - 1, 0))
        assert len(self.ids) <= self.n_prompt + self.n_new

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation at most."""
        return self.n_prompt + self.n_new

    def token_text(self, index: int) -> str:
        return self.texts[index] if index < len(self.texts) else f"<new {index - self.n_prompt}>"


def prompt_of_pieces(pieces: Sequence[tuple[int, str]], **fields: Any) -> PromptText:
    """A prompt whose text is its tokens' texts laid end to end: [(id, text), ...]."""
    offsets, end = [], 0
    for _, text in pieces:
        offsets.append((end, end + len(text)))
        end += len(text)
    return PromptText(
        ids=tuple(i for i, _ in pieces),
        texts=tuple(text for _, text in pieces),
        text="".join(text for _, text in pieces),
        offsets=tuple(offsets),
        **fields,
    )


def prompt_of_ids(
    ids: Sequence[int], decode: Callable[[list[int]], str], **fields: Any
) -> PromptText:
    """The prompt of token ids alone; ``decode`` gives the text of any list of ids.

    A token's characters are what it adds to the text of the tokens before it, so that a character
    made of several tokens belongs to the last of them, and so do its neighbours' texts.
    """
    pieces: list[tuple[int, str]] = []
    waiting: list[int] = []  # tokens whose bytes are no whole character yet
    before: list[int] = []  # a few tokens of context: some tokenizers drop the first blank
    for i in ids:
        waiting.append(i)
        head = decode(before)
        new = decode(before + waiting)
        if new.endswith("\ufffd") and len(waiting) < 4:
            continue
        added = new[len(head) :] if new.startswith(head) else decode(waiting)
        pieces += [(w, "") for w in waiting[:-1]] + [(waiting[-1], added)]
        before = waiting[-4:]
        waiting = []
    pieces += [(w, "") for w in waiting]
    return prompt_of_pieces(pieces, **fields)
