"""Mixed batches run once at the start, so that no request waits while a GPU kernel is compiled."""

from __future__ import annotations

import torch

from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder

# Spans on both sides of the row count from which attention copies its keys first.
SPAN_ROWS = (2, 512)


@torch.inference_mode()
def warm_up(decoder: Decoder, cache: KVCache) -> None:
    """Run a decode beside a short and a long span; all keys go to block 0, which is nobody's."""
    device, block_size = cache.k.device, cache.block_size
    for rows in SPAN_ROWS:
        rows = min(rows, decoder.config.max_positions)
        lengths = [1, rows]
        layout = PagedLayout(
            positions=torch.cat((torch.zeros(1), torch.arange(rows))).to(device, torch.int64),
            slots=torch.zeros(1 + rows, dtype=torch.int64, device=device),
            span_start=torch.tensor([0, 1, 1 + rows], dtype=torch.int32, device=device),
            kv_len=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table=torch.zeros(2, -(-rows // block_size), dtype=torch.int32, device=device),
            block_size=block_size,
            n_decode=1,
            max_query=rows,
            max_kv=rows,
            span_start_host=[0, 1, 1 + rows],
            kv_len_host=lengths,
            state_slots=torch.zeros(2, dtype=torch.int64, device=device),
        )
        tokens = torch.zeros(1 + rows, dtype=torch.int64, device=device)
        decoder.logits(decoder.forward(tokens, layout, cache)[:2])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
