"""Flat batches over a paged cache, for tests: sequences grow span by span in scattered blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache, allocate_kv_cache
from invivo.models.decoder import Decoder
from invivo.models.sites import Taps


@dataclass
class Text:
    """One sequence: its tokens, how many are in the cache, and where."""

    tokens: list[int]
    n_done: int = 0
    blocks: list[int] = field(default_factory=list)


class Pages:
    """A cache whose blocks are handed out in random order, and the forward passes over it."""

    def __init__(self, decoder: Decoder, *, n_blocks: int = 96, block_size: int = 4) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.free = list(range(n_blocks))
        random.Random(7).shuffle(self.free)
        self.cache: KVCache = allocate_kv_cache(
            decoder.config,
            n_blocks=n_blocks,
            block_size=block_size,
            device=decoder.embed.device,
            dtype=decoder.embed.dtype,
        )
        # What is not written must not count: a wrong slot shows as a huge error.
        self.cache.k.fill_(1e4)
        self.cache.v.fill_(1e4)

    def layout(self, spans: list[tuple[Text, int]]) -> PagedLayout:
        """The next ``n`` tokens of each text; spans of one token must come first."""
        starts, kv_len, slots, positions = [0], [], [], []
        for text, n in spans:
            stop = text.n_done + n
            while len(text.blocks) * self.block_size < stop:
                text.blocks.append(self.free.pop())
            for i in range(text.n_done, stop):
                block = text.blocks[i // self.block_size]
                slots.append(block * self.block_size + i % self.block_size)
                positions.append(i)
            starts.append(starts[-1] + n)
            kv_len.append(stop)
        width = max(len(text.blocks) for text, _ in spans)
        table = torch.zeros(len(spans), width, dtype=torch.int32)
        for row, (text, _) in enumerate(spans):
            table[row, : len(text.blocks)] = torch.tensor(text.blocks, dtype=torch.int32)
        n_decode = 0
        while n_decode < len(spans) and spans[n_decode][1] == 1:
            n_decode += 1
        return PagedLayout(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            span_start=torch.tensor(starts, dtype=torch.int32),
            kv_len=torch.tensor(kv_len, dtype=torch.int32),
            block_table=table,
            block_size=self.block_size,
            n_decode=n_decode,
            max_query=max(n for _, n in spans),
            max_kv=max(kv_len),
            span_start_host=starts,
            kv_len_host=kv_len,
        )

    def run(
        self, spans: list[tuple[Text, int]], *, taps: Taps | None = None, offset: int = 0
    ) -> list[torch.Tensor]:
        """Logits [n, V] of the next ``n`` tokens of each text."""
        layout = self.layout(spans)
        layout.positions += offset
        tokens = [t for text, n in spans for t in text.tokens[text.n_done : text.n_done + n]]
        with torch.no_grad():
            hidden = self.decoder(torch.tensor(tokens), layout, self.cache, taps=taps)
            logits = self.decoder.logits(hidden, taps=taps)
        for text, n in spans:
            text.n_done += n
        return list(logits.split([n for _, n in spans]))


def logits_of(decoder: Decoder, tokens: list[int], *, taps: Taps | None = None) -> torch.Tensor:
    """Logits [T, V] of one whole text."""
    return Pages(decoder).run([(Text(tokens), len(tokens))], taps=taps)[0]
