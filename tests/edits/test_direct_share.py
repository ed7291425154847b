"""The direct shares of everything that is written to the residual stream add up to the logit."""

from __future__ import annotations

import pytest
import torch
from tests.edits.small_models import CONFIGS, captured, close, model, run

from invivo.errors import InvalidRequest

TOKENS = [3, 7]


@pytest.mark.parametrize("family", CONFIGS)
def test_shares_add_up_to_the_logit(family):
    decoder = model(family)
    config = decoder.config
    wanted = {
        "embed": "embed.out",
        "heads": "layers.*.attn.head.*.out",
        "attn": "layers.*.attn.out",
        "mlp": "layers.*.mlp.out",
        "end": "final.norm.out",
    }
    out = [
        {"capture": s, "name": n, "reduce": "direct", "tokens": TOKENS} for n, s in wanted.items()
    ]
    scales = ["final.norm.scale"] + (["layers.*.post1.scale"] if config.post_norm else [])
    out += [{"capture": s, "name": s} for s in scales]
    result = run(decoder, {"out": out})
    scale = captured(result, "final.norm.scale")[-1]
    attn, mlp = captured(result, "attn"), captured(result, "mlp")
    end = captured(result, "end")[-1]

    # The biases by themselves, from the weights.
    head = decoder.embed if decoder.head is None else decoder.head
    direction = head[TOKENS] * decoder.final_norm.weight
    constant = torch.zeros(len(TOKENS), dtype=torch.float64)
    if config.norm == "layer":
        direction = direction - direction.mean(-1, keepdim=True)
        constant = head[TOKENS] @ decoder.final_norm.bias
    total = captured(result, "embed")[-1] * scale + constant
    for layer, whole in attn.items():
        heads = captured(result, "heads")[layer].sum(1)
        if config.post_norm:
            heads = heads * captured(result, "layers.*.post1.scale")[layer]
        if config.o_bias:
            heads = heads + direction @ decoder.layers[layer].mixer.o_bias
        close(heads, whole)
        total = total + scale * (heads + mlp[layer])
    close(total, end)
    cap = config.logit_softcap
    logits = result.logits["main"][:, TOKENS]
    close(end if cap is None else cap * torch.tanh(end / cap), logits)


def test_only_values_as_wide_as_the_stream_have_a_share():
    with pytest.raises(InvalidRequest, match="a direct share reads values of width 16"):
        run(model("llama"), {"out": [
            {"capture": "layers.0.attn.head.0.z", "reduce": "direct", "tokens": [1]}]})  # fmt: skip
    with pytest.raises(InvalidRequest, match="tokens"):
        run(model("llama"), {"out": [{"capture": "embed.out", "reduce": "direct"}]})
