"""Texts that a model in training continues."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from invivo.models.decoder import Decoder
from invivo.training.forward import dense_forward


@torch.no_grad()
def continue_tokens(
    decoder: Decoder,
    tokens: Sequence[int],
    count: int,
    *,
    temperature: float,
    seed: int,
    ends: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> list[int]:
    """``count`` more tokens, fewer where one of ``ends`` is drawn (it is left out).

    The training pass runs over the whole text for each token: slow, and the very function that is
    being trained.

    Args:
        tokens: ids to go on from, at least one; only what fits the positions is seen.
        temperature: 0 takes the likeliest token.
        seed: of the draws, which happen on the CPU and are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    text, device = list(tokens), decoder.embed.device
    for _ in range(count):
        seen = torch.tensor([text[-decoder.config.max_positions :]], device=device)
        hidden = dense_forward(decoder, seen, dtype=dtype)[0, -1:]
        logits = decoder.logits(hidden.to(decoder.embed.dtype))[0].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            shares = torch.softmax(logits / temperature, dim=0)
            token = int(torch.multinomial(shares, 1, generator=generator))
        if token in ends:
            break
        text.append(token)
    return text[len(tokens) :]
