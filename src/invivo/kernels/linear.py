"""Linear maps: ``x @ weight.T + bias``.

torch's own product of a few float32 rows with a plain matrix runs far below the memory's speed on
a CPU: one row is read by one thread, and eight rows cost more than eight times the reading. Two
other ways are used there:

* up to two rows: a batched product over 16 pieces of the matrix, which all threads share;
* more rows: oneDNN, best with a copy of the matrix *packed* into its blocks beforehand.

All matrices of SmolLM2-135M (538 MB; reading them once takes 15 ms) on two Zen 4 cores,
milliseconds by rows:

| rows          | 1  | 2  | 4   | 8  | 16 | 32  | 128 | 512 |
|---------------|----|----|-----|----|----|-----|-----|-----|
| torch         | 46 | 81 | 78  | 66 | 76 | 109 | 286 | 820 |
| pieces        | 13 | 15 | 31  | 38 | 52 | 75  | -   | -   |
| oneDNN        | 25 | 30 | 31  | 37 | 48 | 71  | 198 | 699 |
| oneDNN packed | 22 | 25 | 18  | 22 | 29 | 51  | 172 | 668 |
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from invivo.kernels.device import wants_grad

ROWS_IN_PIECES = 2
PIECES = 16
# The blocks chosen for this many rows were the best or near it for 3 to 128 rows.
PACKED_FOR_ROWS = 64


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, d_in], weight [d_out, d_in], bias [d_out] -> [T, d_out].

    Args:
        packed: what :func:`pack` made of ``weight``; used where it is faster.
    """
    if x.is_cuda or wants_grad(x, weight) or not _has_onednn(x):
        return F.linear(x, weight, bias)
    if x.shape[0] <= ROWS_IN_PIECES:
        return _in_pieces(x, weight, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight if packed is None else packed, bias, "none", [], ""
    )
    return y


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """A copy of ``weight`` [d_out, d_in] for :func:`linear`; None where packing does not apply.

    It applies to float32 matrices on CPUs whose torch has oneDNN, and takes their memory again.
    """
    if weight.dim() != 2 or not _has_onednn(weight):
        return None
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), PACKED_FOR_ROWS
    )
    return packed


def _has_onednn(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and torch.backends.mkldnn.is_available()


def _in_pieces(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One or two rows by a batched product over pieces of the matrix's rows."""
    n_rows, d_in = x.shape
    d_out = weight.shape[0]
    pieces = math.gcd(d_out, PIECES)
    # The stride of d_in matters even for one row: told that the columns lie side by side, torch
    # takes a way that is six times slower.
    columns = x.contiguous().as_strided((pieces, d_in, n_rows), (0, 1, d_in))
    y = torch.bmm(weight.view(pieces, -1, d_in), columns)
    y = y.view(1, d_out) if n_rows == 1 else y.view(d_out, n_rows).t().contiguous()
    return y if bias is None else y.add_(bias)
