"""How whole texts [B, T] lie: spans, positions and what a row may see of its own text.

Without document starts each text is one span. With them every document is a span of its own:
positions, recurrent state, convolution and attention begin anew at its first token, and it is
computed as if it were alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from invivo.models.config import ModelConfig
from invivo.models.rope import long_text_offset


@dataclass(slots=True)
class Texts:
    """Layout of B texts of T tokens, R = B * T rows.

    Attributes:
        positions: [R] int64 rows of the position tables.
        span_start: [S + 1] int64 first row of each span, and R; on the host.
        span_start_device: the same, int32, where the texts are.
        place: [B, T] int64 index of each token within its span; None: a text is one span.
        span_of: [B, T] int64, the same number for tokens of one span; None as ``place``.
        masks: by sliding window, see :meth:`mask`.
    """

    n_texts: int
    length: int
    positions: torch.Tensor
    span_start: torch.Tensor
    span_start_device: torch.Tensor
    place: torch.Tensor | None
    span_of: torch.Tensor | None
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """[B or 1, 1, T, T], True where a row sees a column.

        None where that is all columns up to its own.
        """
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> torch.Tensor | None:
        short = window is not None and window < self.length
        if not short and self.span_of is None:
            return None
        index = torch.arange(self.length, device=self.positions.device)
        distance = index[:, None] - index[None, :]
        seen = (distance >= 0)[None]
        if window is not None and short:
            seen = seen & (distance < window)
        if self.span_of is not None:
            seen = seen & (self.span_of[:, :, None] == self.span_of[:, None, :])
        return seen[:, None]


def lay_out(
    config: ModelConfig,
    shape: torch.Size,
    device: torch.device,
    starts: torch.Tensor | None = None,
) -> Texts:
    """The layout of texts.

    Args:
        shape: [B, T].
        device: where the tokens are.
        starts: [B, T] bool, True at the first token of each document (column 0 begins one
            anyway); best on the host, a device is waited for. None: a text is one document.
    """
    n_texts, length = shape
    if starts is None:
        span_start = length * torch.arange(n_texts + 1)
        offset = long_text_offset(config, length)
        positions = torch.arange(offset, offset + length, device=device).repeat(n_texts)
        return Texts(
            n_texts, length, positions, span_start, _int32_on(device, span_start), None, None
        )
    assert starts.shape == shape, f"starts {tuple(starts.shape)}"
    begins = starts.to("cpu", torch.bool, copy=True)
    begins[:, :1] = True
    first = begins.flatten().nonzero().flatten()
    span_start = torch.cat((first, torch.tensor([n_texts * length])))
    lengths = span_start.diff()
    span_of = torch.repeat_interleave(torch.arange(len(first)), lengths)
    place = torch.arange(n_texts * length) - first[span_of]
    offsets = torch.tensor([long_text_offset(config, n) for n in lengths.tolist()])
    return Texts(
        n_texts,
        length,
        (place + offsets[span_of]).to(device),
        span_start,
        _int32_on(device, span_start),
        place.view(n_texts, length).to(device),
        span_of.view(n_texts, length).to(device),
    )


def _int32_on(device: torch.device, rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.int32).to(device, non_blocking=True)
