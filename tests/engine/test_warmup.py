"""Warming up touches no block that a request can get."""

from __future__ import annotations

import torch
from tests.tiny import tiny_loaded

from invivo.engine.warmup import warm_up
from invivo.models.cache import allocate_kv_cache


def test_warm_up_writes_to_the_scratch_block_alone(tmp_path):
    model = tiny_loaded(tmp_path)
    cache = allocate_kv_cache(
        model.config, n_blocks=4, block_size=16, device="cpu", dtype=torch.float32
    )
    warm_up(model.decoder, cache)
    assert cache.k[:, 0].abs().max() > 0
    assert cache.k[:, 1:].abs().max() == 0
    assert cache.v[:, 1:].abs().max() == 0
