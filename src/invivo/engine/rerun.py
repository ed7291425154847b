"""Backward of a window by running its layers again under autograd.

A window is a function of its tokens (or of its rows' residual stream at some layer) and of the
keys and values before it. The rerun takes those past keys and values as leaves; the gradients of
the window's own keys and values, summed over all later windows, go in beside that of its output.
This holds for any bypass, mixer and feed-forward.
"""

from __future__ import annotations

import numpy as np
import torch

from invivo.engine.edit_taps import EditedSpan, EditTaps
from invivo.engine.packing import parts
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.trained_hooks import TrainedHooks
from invivo.engine.transfer import to_device
from invivo.kernels.attention_backward import gather_rows
from invivo.kernels.paging import PagedLayout
from invivo.models.bypass import Bypass
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.sites import offer

Memory = tuple[torch.Tensor, torch.Tensor]
States = tuple[torch.Tensor, torch.Tensor]


def rerun_backward(
    decoder: Decoder,
    cache: KVCache,
    hooks: TrainedHooks,
    sequence: TrainSequence,
    bypass: Bypass | None,
    rows: tuple[int, int],
    layers: tuple[int, int],
    start_from: torch.Tensor | None,
    entering: States | None = None,
) -> torch.Tensor | None:
    """Gradient by the residual stream before ``layers``; parameters gather theirs in ``.grad``.

    The sequence's program, if it has one, acts here as it did in the forward windows.

    Args:
        bypass: differentiable, for these rows.
        rows, layers: ranges, the ends exclusive.
        start_from: [s, d] residual stream of the rows before the first of the layers; None: the
            embeddings.
        entering: states and tails of all recurrent layers before the rows, [n, ...] each.

    Returns:
        [s, d], None where nothing reads it.
    """
    assert sequence.dx is not None
    start, stop = rows
    first, last = layers
    goes_on = first > hooks.bottom or hooks.last_hook is None
    with torch.enable_grad():
        taps = _taps_of(sequence, decoder, start, stop)
        if start_from is None:
            tokens, positions = sequence.tokens[start:stop], sequence.positions(start, stop)
            x = decoder.embedded(tokens, positions, bypass)
            if taps is not None:
                x = offer(taps, "embed.out", -1, x)
        else:
            x = start_from.detach()
        if goes_on and not x.requires_grad:
            x.requires_grad_()
        if goes_on:
            x.retain_grad()
        past: list[Memory] = []
        memory: list[Memory] = []
        for layer in range(first, last):
            if layer in decoder.config.recurrent:
                assert entering is not None
                wanted = hooks.carries_state(decoder.config, layer)
                leaves, grown = _state(decoder, layer, entering, wanted=wanted)
            else:
                leaves, grown = _past(cache, sequence, layer, start, stop, hooks.carried.get(layer))
            past.append(leaves)
            memory.append(grown)
        layout = window_layout(sequence, start, stop, cache.block_size)
        pending, residual = decoder.run_layers(
            x, layout, memory, first=first, last=last, bypass=bypass, taps=taps
        )
        if last == decoder.config.n_layers:
            out = decoder.finished(pending, residual, taps)
        else:
            out = residual if pending is None else residual + pending
        if sequence.edits is not None and sequence.edits.error is not None:
            raise sequence.edits.error
        outputs, gradients = [], []
        if out.requires_grad:  # a program may act behind these rows alone
            outputs, gradients = [out], [sequence.dx[start:stop]]
        for layer, grown in enumerate(memory, first):
            if layer in decoder.config.recurrent:
                for new, total in zip(grown, sequence.sums.get(layer, ()), strict=False):
                    if total is not None and new.requires_grad:
                        outputs.append(new[1])
                        gradients.append(total)
                continue
            for new, total in zip(grown, sequence.sums.get(layer, (None, None)), strict=True):
                own = new.flatten(0, 1)[layout.slots]
                if total is not None and own.requires_grad:
                    outputs.append(own)
                    gradients.append(total[start:stop].to(own.dtype))
        if outputs:
            torch.autograd.backward(outputs, gradients)
    for layer, leaves in enumerate(past, first):
        if layer in decoder.config.recurrent:
            if layer in sequence.sums:
                state, tail = (torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)
                sequence.sums[layer] = state, tail
            continue
        for leaf, total in zip(leaves, sequence.sums.get(layer, (None, None)), strict=True):
            if total is not None and leaf.grad is not None:
                begin = parts(sequence.packing, start, stop)[0].begin
                total[begin:start] += leaf.grad
    return x.grad if goes_on else None


def _taps_of(sequence: TrainSequence, decoder: Decoder, start: int, stop: int) -> EditTaps | None:
    if sequence.edits is None:
        return None
    return EditTaps(decoder.config, [EditedSpan(sequence.edits, 0, 0, range(start, stop))])


@torch.no_grad()
def replay(
    decoder: Decoder,
    cache: KVCache,
    sequence: TrainSequence,
    bypass: Bypass | None,
    rows: tuple[int, int],
    entering: States,
) -> States:
    """The recurrent states after ``rows`` from those before them."""
    start, stop = rows
    recurrent = decoder.config.recurrent
    memory = [
        _state(decoder, layer, entering, wanted=False)[1]
        if layer in recurrent
        else _past(cache, sequence, layer, start, stop, None)[1]
        for layer in range(decoder.config.n_layers)
    ]
    x = decoder.embedded(sequence.tokens[start:stop], sequence.positions(start, stop), bypass)
    taps = _taps_of(sequence, decoder, start, stop)
    if taps is not None:
        x = offer(taps, "embed.out", -1, x)
    layout = window_layout(sequence, start, stop, cache.block_size)
    decoder.run_layers(x, layout, memory, bypass=bypass, taps=taps)
    states, tails = (torch.stack([memory[layer][i][1] for layer in recurrent]) for i in (0, 1))
    return states, tails


def _state(
    decoder: Decoder, layer: int, entering: States, *, wanted: bool
) -> tuple[Memory, Memory]:
    """Leaves of a recurrent layer's state and tail before the window, and two slots each: scratch
    and that."""
    i = decoder.config.recurrent.index(layer)
    leaves = entering[0][i].clone(), entering[1][i].clone()
    for leaf in leaves:
        leaf.requires_grad_(wanted)
    state, tail = (torch.stack((torch.zeros_like(leaf), leaf)) for leaf in leaves)
    return leaves, (state, tail)


def window_layout(sequence: TrainSequence, start: int, stop: int, block_size: int) -> PagedLayout:
    """Rows [start, stop) of one sequence, a span for each text, whose blocks follow each other from
    block 0."""
    device = sequence.tokens.device
    own = parts(sequence.packing, start, stop)
    starts = [0, *(part.stop - start for part in own)]
    lengths = [part.stop - part.begin for part in own]
    sizes = [-(-length // block_size) for length in lengths]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    slots = [
        np.arange(first * block_size + part.start - part.begin, first * block_size + length)
        for part, first, length in zip(own, firsts, lengths, strict=True)
    ]
    last = sum(sizes) - 1  # blocks past the end of a text are never read
    table = np.minimum(np.array(firsts)[:, None] + np.arange(max(sizes)), last).astype(np.int32)
    return PagedLayout(
        positions=sequence.positions(start, stop),
        slots=to_device(np.concatenate(slots), device),
        span_start=to_device(np.array(starts, dtype=np.int32), device),
        kv_len=to_device(np.array(lengths, dtype=np.int32), device),
        block_table=to_device(table, device),
        block_size=block_size,
        n_decode=int(len(own) == 1 and stop - start == 1),
        max_query=max(part.stop - part.start for part in own),
        max_kv=max(lengths),
        span_start_host=starts,
        kv_len_host=lengths,
        state_slots=torch.ones(len(own), dtype=torch.int64, device=device),
    )


def _past(
    cache: KVCache,
    sequence: TrainSequence,
    layer: int,
    start: int,
    stop: int,
    carried: tuple[bool, bool] | None,
) -> tuple[Memory, Memory]:
    """Leaves [n, G, D] of the keys and values that the window's first text has before it, and the
    blocks [.., block_size, G, D] of :func:`window_layout`, which begin with them."""
    own, size = parts(sequence.packing, start, stop), cache.block_size
    before = own[0].start - own[0].begin
    length = sum(-(-(part.stop - part.begin) // size) for part in own) * size
    leaves, grown = [], []
    for pages, wanted in zip(cache.layers[layer], carried or (False, False), strict=True):
        leaf = gather_rows(pages, sequence.table_of(own[0]), 0, before)
        leaf.requires_grad_(wanted)
        room = leaf.new_zeros(length - before, *leaf.shape[1:])
        leaves.append(leaf)
        grown.append(torch.cat((leaf, room)).unflatten(0, (-1, cache.block_size)))
    return (leaves[0], leaves[1]), (grown[0], grown[1])
