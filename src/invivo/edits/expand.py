"""The same model with a key head of its own for every query head."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from invivo.models.decoder import Decoder, Layer


def expand_key_heads(decoder: Decoder) -> Decoder:
    """A copy of ``decoder`` whose key and value matrices are repeated for every query head.

    Its outputs are those of ``decoder``; key head h is a copy of key head h / (H / G).
    """
    config = decoder.config
    times = config.n_heads // config.n_kv_heads
    wide = replace(config, n_kv_heads=config.n_heads)
    expanded = Decoder(wide, device=decoder.embed.device, dtype=decoder.embed.dtype)
    weights = copy.copy(decoder.state_dict())
    q_rows, kv_rows = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        if i in config.recurrent:  # its heads share nothing
            continue
        for name in ("qkv", "qkv_bias", "k_norm"):
            key = f"layers.{i}.mixer.{name}"
            if key not in weights:
                continue
            parts = [kv_rows] if name == "k_norm" else [q_rows, kv_rows, kv_rows]
            if name == "k_norm" and config.qk_norm != "full":
                continue
            pieces = list(weights[key].split(parts))
            for at in range(len(pieces) - 2 if len(pieces) > 1 else 0, len(pieces)):
                heads = pieces[at].unflatten(0, (config.n_kv_heads, config.head_dim))
                pieces[at] = heads.repeat_interleave(times, dim=0).flatten(0, 1)
            weights[key] = torch.cat(pieces)
    expanded.load_state_dict(weights)
    return expanded.eval()
