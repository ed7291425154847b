"""What a job that trains a program may pursue in place of the labels' cross-entropy.

Both are sums over the rows with a label, from final states, a piece of logits at a time:

- ``logit_diff``: the logit of another token minus that of the label;
- ``kl``: the Kullback-Leibler divergence (nats) of the model's own distribution, without the
  program, from the one with it: KL(without || with).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from invivo.engine.kept_rows import KeptRows
from invivo.engine.transfer import index_on
from invivo.kernels.cross_entropy import LOGITS_BYTES, CrossEntropy
from invivo.models.decoder import Decoder

Objective = Literal["cross_entropy", "logit_diff", "kl"]


@dataclass(slots=True, eq=False)
class Goal:
    """The loss of one text.

    Attributes:
        others: [L] int64 tokens that the labels are compared with (``logit_diff``).
        reference: final states without the program at all rows with a label (``kl``).
    """

    others: torch.Tensor | None = None
    reference: KeptRows | None = None

    def measure(
        self,
        decoder: Decoder,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        rows: Sequence[int],
        start: int,
        *,
        want_grad: bool,
    ) -> CrossEntropy:
        """Loss and gradient of a window.

        Args:
            hidden: [n, d] final states of the text's rows from ``start`` on.
            labels, weights: of these rows.
            rows: those with a label, as rows of the text.
        """
        device = hidden.device
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=device)
        n_correct = torch.zeros((), dtype=torch.int64, device=device)
        d_hidden = torch.zeros_like(hidden) if want_grad else None
        step = max(1, LOGITS_BYTES // (8 * decoder.config.vocab_size))
        for i in range(0, len(rows), step):
            piece = rows[i : i + step]
            at = index_on([row - start for row in piece], device)
            with torch.set_grad_enabled(want_grad):
                states = hidden[at].detach().requires_grad_(want_grad)
                logits = decoder.logits(states).to(wide)
                each = self._each(decoder, logits, labels[at], piece)
                total = each.sum() if weights is None else (each * weights[at]).sum()
            if d_hidden is not None:
                (d_hidden[at],) = torch.autograd.grad(total, states)
            loss += total.detach()
            n_correct += (logits.detach().argmax(-1) == labels[at]).sum()
        n_labels = torch.tensor(len(rows), device=device)
        return CrossEntropy(loss, n_labels, n_correct, d_hidden, None)

    def _each(
        self, decoder: Decoder, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[int]
    ) -> torch.Tensor:
        if self.others is not None:
            other = self.others[index_on(list(rows), logits.device)]
            return (logits.gather(1, other[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
        assert self.reference is not None
        with torch.no_grad():
            wanted = decoder.logits(self.reference.at(rows)).to(logits.dtype).log_softmax(-1)
        return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
