"""Paged attention on CPUs, for inference.

Decode spans and short prefills in float32 are attended by ``native.c`` where it can be built: it
reads the pages where they lie. The rest is torch operations: decode spans are sorted by length and
cut into groups whose gathered keys and values stay in the cache of the processor. Copying pages
first and attending with one batched call is twice as fast on two cores as one call a sequence on
views of the pages (8 sequences of 500 tokens, SmolLM2: 15 against 26 ms). A lone sequence in
consecutive blocks is read in place.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from invivo.kernels.native import native_for
from invivo.kernels.paging import PagedLayout

# Gathered keys and values of a group, in bytes: above this they fall out of the processor's cache.
GROUP_BYTES = 6 << 20
# A span of few rows and keys (their product) is attended natively, row by row as if each were a
# decode: at 24 rows of 24 keys twice as fast as torch's call for the span, at 64 of 64 no more.
NATIVE_PAIRS = 1024
# Query rows of one masked call: bounds the mask and skips keys no row of the piece sees.
ROWS = 512


@dataclass(slots=True)
class _Group:
    """Decode spans attended by one call.

    Attributes:
        rows: their rows of the flat batch.
        n: how many.
        first: first physical row of the keys where one span is read in place, else -1.
        blocks: [n * width] physical blocks to gather, spans one after the other; int64, with which
            a gather takes half the time.
        n_keys: keys of each span, masked ones included.
        mask: [n, 1, 1, n_keys] additive, None where every key is visible.
        hidden: gathered key rows that the mask hides, None where nothing is gathered past a span's
            end. They are zeroed: a block may hold NaN of its last owner, and NaN survives a mask.
    """

    rows: slice | torch.Tensor
    n: int
    first: int
    blocks: torch.Tensor
    n_keys: int
    mask: torch.Tensor | None
    hidden: torch.Tensor | None = None


@dataclass(slots=True)
class _Run:
    """Consecutive spans attended natively, each of their rows a query of its own.

    Attributes:
        rows: of the flat batch.
        table: [rows, blocks] int32.
        lengths: [rows] int32, visible keys.
    """

    spans: range
    rows: slice
    table: torch.Tensor
    lengths: torch.Tensor


def paged_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The function of ``paged_attention_reference``; not differentiable."""
    groups: list[_Group] = []
    native = native_for(q, k_cache, v_cache)
    in_rows = q.stride(2) == 1 and q.stride(1) == q.shape[2]
    if not (in_rows and k_cache.is_contiguous() and v_cache.is_contiguous()):
        native = None
    runs: list[_Run] = []
    if native is not None:
        if "cpu_attention.runs" not in layout.prepared:
            layout.prepared["cpu_attention.runs"] = _native_runs(layout)
        runs = layout.prepared["cpu_attention.runs"]
    mixed = [
        native.paged_decode(
            q[run.rows],
            k_cache,
            v_cache,
            run.table,
            run.lengths,
            scale=scale,
            window=window,
            softcap=softcap,
        )
        for run in runs
        if native is not None
    ]
    if len(mixed) == 1 and mixed[0].shape[0] == q.shape[0]:
        return mixed[0]
    if layout.n_decode and native is None:
        token_bytes = 2 * k_cache[0, 0].numel() * k_cache.element_size()
        key = ("cpu_attention.decode", window, token_bytes, q.dtype)
        if key not in layout.prepared:
            layout.prepared[key] = _group_decodes(layout, window, token_bytes, q.dtype)
        groups = layout.prepared[key]
        if groups[0].n == q.shape[0]:
            return _decode(q, k_cache, v_cache, groups[0], scale, softcap)
    out = torch.empty(q.shape, dtype=q.dtype)
    for run, rows_mixed in zip(runs, mixed, strict=True):
        out[run.rows] = rows_mixed
    for group in groups:
        out[group.rows] = _decode(q[group.rows], k_cache, v_cache, group, scale, softcap)
    starts = layout.span_start_host or layout.span_start.tolist()
    lengths = layout.kv_len_host or layout.kv_len.tolist()
    done = {span for run in runs for span in run.spans}
    for span in range(layout.n_decode, layout.n_spans):
        if span in done:
            continue
        rows = slice(starts[span], starts[span + 1])
        n_keys = lengths[span]
        keys, values = _keys_of_span(k_cache, v_cache, layout, span, n_keys)
        _attend_span(out[rows], q[rows], keys, values, scale, window, softcap)
    return out


def _native_runs(layout: PagedLayout) -> list[_Run]:
    """The decode spans and every run of short spans behind them."""
    starts = layout.span_start_host or layout.span_start.tolist()
    lengths = layout.kv_len_host or layout.kv_len.tolist()

    def is_native(span: int) -> bool:
        n_rows = starts[span + 1] - starts[span]
        return span < layout.n_decode or n_rows * lengths[span] <= NATIVE_PAIRS

    runs = []
    for native, found in itertools.groupby(range(layout.n_spans), is_native):
        spans = list(found)
        if not native:
            continue
        first, last = spans[0], spans[-1] + 1
        table, seen = layout.block_table[first:last], layout.kv_len[first:last]
        if last > layout.n_decode:
            # A row sees what comes before it: as many keys as a decode would at that row.
            n_rows = torch.tensor([starts[s + 1] - starts[s] for s in spans])
            table = table.repeat_interleave(n_rows, dim=0)
            ends = torch.tensor(starts[first + 1 : last + 1]).repeat_interleave(n_rows)
            after = ends - 1 - torch.arange(starts[first], starts[last])
            seen = seen.repeat_interleave(n_rows) - after.to(seen.dtype)
        runs.append(_Run(range(first, last), slice(starts[first], starts[last]), table, seen))
    return runs


def _group_decodes(
    layout: PagedLayout, window: int | None, token_bytes: int, dtype: torch.dtype
) -> list[_Group]:
    block_size = layout.block_size
    lengths = (layout.kv_len_host or layout.kv_len.tolist())[: layout.n_decode]
    firsts = [0 if window is None else max(0, n - window) // block_size for n in lengths]
    widths = [-(-n // block_size) - first for n, first in zip(lengths, firsts, strict=True)]
    order = sorted(range(layout.n_decode), key=lambda span: -widths[span])
    groups = []
    at = 0
    while at < len(order):
        width = widths[order[at]]
        most = max(1, GROUP_BYTES // (width * block_size * token_bytes))
        least = width - max(4, width // 4)  # shorter spans would mostly read padding
        stop = at + 1
        while stop < len(order) and stop - at < most and widths[order[stop]] >= least:
            stop += 1
        groups.append(
            _make_group(layout, sorted(order[at:stop]), lengths, firsts, width, window, dtype)
        )
        at = stop
    return groups


def _make_group(
    layout: PagedLayout,
    spans: list[int],
    lengths: list[int],
    firsts: list[int],
    width: int,
    window: int | None,
    dtype: torch.dtype,
) -> _Group:
    n, block_size = len(spans), layout.block_size
    together = spans[-1] - spans[0] == n - 1
    rows = slice(spans[0], spans[-1] + 1) if together else torch.tensor(spans)
    if n == 1:
        span, first = spans[0], firsts[spans[0]]
        blocks = layout.block_table[span, first : first + width]
        n_keys = lengths[span] - first * block_size
        skip = 0 if window is None else max(0, lengths[span] - window - first * block_size)
        physical = blocks.tolist()
        if physical == list(range(physical[0], physical[0] + width)):
            return _Group(rows, 1, physical[0] * block_size + skip, blocks, n_keys - skip, None)
        mask = None
        if skip:
            mask = torch.zeros(1, 1, 1, n_keys, dtype=dtype)
            mask[..., :skip] = -torch.inf
        return _Group(rows, 1, -1, blocks.long(), n_keys, mask)
    first_block = torch.tensor([firsts[span] for span in spans])
    logical = first_block[:, None] + torch.arange(width)
    # Blocks past a span's end are masked: any block that exists will do.
    logical.clamp_(max=layout.block_table.shape[1] - 1)
    last = torch.tensor([-(-lengths[span] // block_size) - 1 for span in spans])
    logical = torch.minimum(logical, last[:, None])
    blocks = layout.block_table[rows].gather(1, logical).flatten().long()
    index = first_block[:, None] * block_size + torch.arange(width * block_size)
    length = torch.tensor([lengths[span] for span in spans])[:, None]
    hidden = index >= length
    if window is not None:
        hidden |= index < length - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    rows_hidden = hidden.flatten().nonzero().flatten()
    return _Group(rows, n, -1, blocks, width * block_size, mask[:, None, None, :], rows_hidden)


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    group: _Group,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one group: q [n, H, D], its rows alone, -> [n, H, D]."""
    n_heads, head_dim = q.shape[1:]
    n_groups = k_cache.shape[2]
    n, n_keys = group.n, group.n_keys
    if group.first >= 0:
        place = slice(group.first, group.first + n_keys)
        keys = k_cache.view(1, -1, n_groups, head_dim)[:, place].transpose(1, 2)
        values = v_cache.view(1, -1, n_groups, head_dim)[:, place].transpose(1, 2)
    else:
        shape = (n, -1, n_groups, head_dim)
        keys = k_cache.index_select(0, group.blocks)
        values = v_cache.index_select(0, group.blocks)
        if group.hidden is not None:
            keys.view(-1, n_groups, head_dim).index_fill_(0, group.hidden, 0.0)
            values.view(-1, n_groups, head_dim).index_fill_(0, group.hidden, 0.0)
        keys = keys.view(shape)[:, :n_keys].transpose(1, 2)
        values = values.view(shape)[:, :n_keys].transpose(1, 2)
    if softcap is not None:
        queries = q.reshape(n, n_groups, -1, head_dim)
        mixed = _attend_capped(queries, keys, values, group.mask, scale, softcap)
    else:
        # Heads as heads rather than as rows of a group: a quarter faster.
        mixed = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, group.mask, scale=scale, enable_gqa=True
        )
    return mixed.reshape(n, n_heads, head_dim)


def _keys_of_span(
    k_cache: torch.Tensor, v_cache: torch.Tensor, layout: PagedLayout, span: int, n_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one span, [G, n_keys, D] each; gathered once a layer."""
    blocks = layout.block_table[span, : -(-n_keys // layout.block_size)]
    keys = k_cache.index_select(0, blocks).flatten(0, 1)[:n_keys].transpose(0, 1)
    values = v_cache.index_select(0, blocks).flatten(0, 1)[:n_keys].transpose(0, 1)
    return keys, values


def _attend_span(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Causal attention of the last rows of one sequence: q [R, H, D] over keys [G, L, D]."""
    n_rows, n_heads, head_dim = q.shape
    n_groups, n_keys, _ = keys.shape
    before = n_keys - n_rows
    narrow = window is not None and window < n_keys
    if before == 0 and not narrow and softcap is None:
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        out.copy_(mixed[0].transpose(0, 1))
        return
    for start in range(0, n_rows, ROWS):
        stop = min(start + ROWS, n_rows)
        seen = slice(0, before + stop)
        if window is not None:
            seen = slice(max(0, before + start - window + 1), before + stop)
        distance = torch.arange(before + start, before + stop)[:, None] - torch.arange(
            seen.start, seen.stop
        )
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        queries = q[start:stop].transpose(0, 1)
        k, v = keys[:, seen], values[:, seen]
        if softcap is None:
            mixed = F.scaled_dot_product_attention(
                queries.unsqueeze(0),
                k.unsqueeze(0),
                v.unsqueeze(0),
                mask,
                scale=scale,
                enable_gqa=True,
            )[0]
        else:
            repeat = n_heads // n_groups
            mixed = _attend_capped(
                queries.reshape(n_groups, repeat * (stop - start), head_dim),
                k,
                v,
                mask.repeat(repeat, 1),
                scale,
                softcap,
            ).view(n_heads, stop - start, head_dim)
        out[start:stop] = mixed.transpose(0, 1)


def _attend_capped(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores: q [..., M, D] over keys [..., L, D], mask [..., M, L]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), keys.to(wide).transpose(-1, -2))
    scores = scores.mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1), values.to(wide)).to(q.dtype)
