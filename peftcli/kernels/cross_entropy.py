"""Cross-entropy over supervised positions only, in slices, without a float32 copy of the logits.

The plain reference is ``torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# float32 scratch of one slice: 64 rows of a 128k vocabulary are 32 MiB. Small enough to be reused by the allocator.
_SLICE = 64


class _SumCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        double = logits.dtype == torch.float64
        wide = torch.float64 if double else torch.float32
        total = logits.new_zeros((), dtype=wide)
        correct = torch.zeros((), dtype=torch.long, device=logits.device)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        for start in range(0, logits.shape[0], _SLICE):
            rows = logits[start : start + _SLICE].detach().to(wide)
            target = targets[start : start + _SLICE].unsqueeze(1)
            picked = rows.gather(1, target)
            top = rows.amax(1, keepdim=True)
            norm = torch.logsumexp(rows, 1, keepdim=True)
            total += (norm - picked).sum()
            # A tie counts as correct: the target is as likely as any other token.
            correct += (picked == top).sum()
            if gradient is not None:
                # `rows` is a copy unless the logits are wide already.
                probabilities = (rows - norm).exp_() if logits.dtype == wide else rows.sub_(norm).exp_()
                probabilities.scatter_add_(1, target, torch.full_like(picked, -1.0))
                gradient[start : start + _SLICE] = probabilities
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None


def sum_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy in nats and the number of rows whose target is a most likely token.

    Args:
        logits: [rows, vocabulary], any float dtype.
        targets: [rows], int64.

    Returns:
        (scalar float32 total with gradient, float64 for float64 logits; scalar int64 correct).
    """
    if logits.shape[0] == 0:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return logits.sum(dtype=wide) * 0.0, torch.zeros((), dtype=torch.long, device=logits.device)
    result: tuple[Tensor, Tensor] = _SumCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return result


def reference_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`sum_cross_entropy` computes, in one plain expression."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="sum"), (wide.gather(1, targets[:, None]).squeeze(1) == wide.amax(1)).sum()
