"""Texts that a model in training continues."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from invivo.models.decoder import Decoder
from invivo.training.forward import dense_forward

_WIDTH = (
    64  # rows are filled up to a multiple, so that there are few shapes to be slow the first time
)


@torch.no_grad()
def continue_texts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    temperature: float,
    seed: int,
    end: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """``count`` more tokens for each prompt, fewer where ``end`` is drawn (it is left out).

    The training pass runs over all texts for each token: slow, and the very function that is being
    trained.

    Args:
        prompts: ids to go on from, at least one each; only what fits the positions is seen.
        temperature: 0 takes the likeliest token.
        seed: of the draws, which happen on the CPU and depend on no other prompt.
    """
    device, limit = decoder.embed.device, decoder.config.max_positions
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    texts = [list(prompt) for prompt in prompts]
    going = list(range(len(prompts)))
    for _ in range(count):
        seen = [texts[i][-limit:] for i in going]
        longest = max(map(len, seen), default=0)
        width = min(limit, -(-longest // _WIDTH) * _WIDTH)
        # What stands behind a text changes nothing within it.
        rows = torch.tensor([text + [0] * (width - len(text)) for text in seen], device=device)
        hidden = dense_forward(decoder, rows, dtype=dtype)
        last = torch.tensor([len(text) - 1 for text in seen], device=device)
        states = hidden[torch.arange(len(seen), device=device), last]
        logits = decoder.logits(states.to(decoder.embed.dtype)).float().cpu()
        for i, row in zip(tuple(going), logits, strict=True):
            if temperature == 0:
                token = int(row.argmax())
            else:
                shares = torch.softmax(row / temperature, dim=0)
                token = int(torch.multinomial(shares, 1, generator=generators[i]))
            if token == end:
                going.remove(i)
            else:
                texts[i].append(token)
        if not going:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
