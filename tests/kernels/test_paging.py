"""Parts of a flat batch's layout."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.kernels.paging import contiguous_layout, part_of


@settings(max_examples=60, deadline=None)
@given(
    singles=st.integers(0, 3),
    longer=st.lists(st.integers(2, 7), max_size=4),
    data=st.data(),
)
def test_a_part_of_a_layout_says_the_same_of_its_spans(
    singles: int, longer: list[int], data: st.DataObject
) -> None:
    lengths = [1] * singles + longer
    layout = contiguous_layout(lengths, block_size=4)
    spans = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1)))) if lengths else []
    part, rows = part_of(layout, spans)
    starts = layout.span_start_host
    expected = [row for span in spans for row in range(starts[span], starts[span + 1])]
    assert torch.arange(layout.n_rows)[rows].tolist() == expected
    assert part.positions.tolist() == layout.positions[expected].tolist()
    assert part.slots.tolist() == layout.slots[expected].tolist()
    chosen = [lengths[span] for span in spans]
    assert part.kv_len.tolist() == part.kv_len_host == chosen
    assert part.span_start.tolist() == part.span_start_host
    assert part.n_rows == part.span_start_host[-1] == sum(chosen)
    assert part.block_table.tolist() == layout.block_table[spans].tolist()
    assert part.n_decode == chosen.count(1)
    assert part.max_query == part.max_kv == max(chosen, default=0)
