"""What a capture brings back in place of the value itself."""

from __future__ import annotations

import torch

from invivo.edits.apply import Context
from invivo.edits.resolved import CaptureRef
from invivo.models.decoder import Decoder


def reduce_capture(
    part: torch.Tensor, capture: CaptureRef, decoder: Decoder, context: Context
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reduced value and, for a lens with top, the tokens.

    Args:
        part: [positions, heads if there are any, numbers].
        decoder: its final norm and unembedding are the lens.
    """
    args = capture.args
    match capture.reduce:
        case "none":
            return part, None
        case "mean":
            return part.mean(0), None
        case "norm":
            return part.norm(dim=-1), None
        case "dot":
            return part @ context.tensor(args["v"]), None
        case "cos":
            return torch.cosine_similarity(part, context.tensor(args["v"]), dim=-1), None
        case "probe":
            return part @ context.tensor(args["w"]).T + context.tensor(args["b"]), None
        case _:
            return _lens(part, capture, decoder)


def _lens(
    part: torch.Tensor, capture: CaptureRef, decoder: Decoder
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities that the model would give if ``part`` were its last residual stream."""
    args = capture.args
    flat = part.reshape(-1, part.shape[-1])
    log = torch.log_softmax(decoder.logits(decoder.final_norm(flat)), -1)
    log = log.view(*part.shape[:-1], -1)
    if args["top"] is not None:
        values, tokens = log.topk(args["top"], dim=-1)
        return values, tokens
    if args["tokens"]:
        return log[..., list(args["tokens"])], None
    sets = [torch.logsumexp(log[..., list(tokens)], -1) for tokens in args["sets"]]
    return torch.stack(sets, -1), None
