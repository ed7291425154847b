"""What a capture brings back in place of the value itself."""

from __future__ import annotations

import torch

from invivo.edits.apply import Context
from invivo.edits.resolved import CaptureRef
from invivo.models.decoder import Decoder
from invivo.models.norm import Norm


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
        case "direct":
            return _direct(part, capture, decoder), None
        case _:
            return _lens(part, capture, decoder)


def _direct(part: torch.Tensor, capture: CaptureRef, decoder: Decoder) -> torch.Tensor:
    """[..., tokens]: what ``part``, written to the residual stream, adds to each token's logit.

    The norms on the way are linear once their scales are held fixed; the scales themselves are left
    out, and so is a soft cap. Times ``final.norm.scale`` at its position (and, for heads and
    projections of a model with norms after its sub-layers, times ``post1.scale`` or
    ``post2.scale``) the shares of everything that is written, and of the biases, add up to the
    logit. Of ``final.norm.out`` it is the logit itself.
    """
    head = decoder.embed if decoder.head is None else decoder.head
    direction = head[list(capture.args["tokens"])].to(part.dtype)
    site, layer = capture.ref.site, capture.ref.layer
    if site != "final.norm.out":
        direction = _before(decoder.final_norm, direction)
        after = {"attn.head.out": "post1", "attn.proj": "post1", "mlp.proj": "post2"}.get(site)
        norm = None if after is None else getattr(decoder.layers[layer], after)
        if norm is not None:
            direction = _before(norm, direction)
    return part @ direction.T


def _before(norm: Norm, direction: torch.Tensor) -> torch.Tensor:
    """What reads from a norm's input, its scale left out, what ``direction`` reads behind it."""
    weight = norm.weight.to(direction.dtype)
    direction = direction * (1.0 + weight if norm.unit_offset else weight)
    return direction if norm.is_rms else direction - direction.mean(-1, keepdim=True)


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
