"""An output layer and the cross-entropy over it in one: the logits never exist as a whole.

The gradients are made beside the loss, a few hundred rows at a time, in two buffers that all rows share. What is kept for the backward
pass is as large as the hidden states and, where it is trained, the weight, not as the logits.

The plain reference is ``sum_cross_entropy(F.linear(hidden, weight, bias), targets)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels import native
from peftcli.kernels.cross_entropy import reference_cross_entropy
from peftcli.kernels.frozen import working_dtype

# Logits of one product: enough rows that the weight, which every product reads, is not what takes the time.
_LOGITS = 1 << 24
# Wide scratch of one slice of them, about what a core's share of the last cache holds.
_WIDE = 1 << 20
# Logits of one product where the weight has a gradient, to which every product adds: as many as that is wide, and more.
_TRAINED = 1 << 25
# The same on a GPU, where many small launches are what takes the time: 128 MiB of logits, 64 MiB of scratch.
_GPU_LOGITS, _GPU_WIDE = 1 << 26, 1 << 24


def _compiled(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`_operators`, in two passes over each row."""
    (rows, vocabulary), wide = logits.shape, torch.float32
    losses, shares, right = logits.new_empty(rows, dtype=wide), logits.new_empty(rows, dtype=wide), torch.empty_like(targets)
    native.call("cross_entropy", logits, logits, targets, losses, shares, right, rows, vocabulary, int(gradient))
    return losses.sum(), right.sum(), shares.unsqueeze(1)


def _operators(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy of logits [rows, vocabulary], the number of correct rows, and ``1 / sum of exp`` [rows, 1].

    With ``gradient`` the logits become ``exp - [target] * sum``, which the last result makes the gradient; it is multiplied in
    when the rows are short again.
    """
    rows, vocabulary = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    part = max(1, min(rows, (_WIDE if logits.device.type == "cpu" else _GPU_WIDE) // vocabulary))
    scratch, shares = logits.new_empty(part, vocabulary, dtype=wide), logits.new_empty(rows, 1, dtype=wide)
    total, correct = logits.new_zeros((), dtype=wide), torch.zeros((), dtype=torch.long, device=logits.device)
    for first in range(0, rows, part):
        narrow = logits[first : first + part]
        values = scratch[: len(narrow)].copy_(narrow)
        target = targets[first : first + part].unsqueeze(1)
        picked, top = values.gather(1, target), values.amax(1, keepdim=True)
        values.sub_(top).exp_()
        sums = values.sum(1, keepdim=True)
        total += (sums.log() + top - picked).sum()
        # A tie counts as correct: the target is as likely as any other token.
        correct += (picked == top).sum()
        if gradient:
            values.scatter_add_(1, target, -sums)
            narrow.copy_(values)
            shares[first : first + part] = sums.reciprocal_()
    return total, correct, shares


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        ctx.dtypes, moving = (hidden.dtype, weight.dtype), weight.requires_grad
        dtype = working_dtype(hidden)
        inner, outer = hidden.to(dtype), weight.to(dtype)
        most = _GPU_LOGITS if hidden.device.type != "cpu" else _TRAINED if moving else _LOGITS
        chunk = max(1, min(rows, most // vocabulary))
        logits = inner.new_empty(chunk, vocabulary)
        reduce = _compiled if native.usable(logits) else _operators
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        gradient = torch.empty_like(inner) if hidden.requires_grad else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        # In the products' dtype, as autocast leaves it; the sum over several is made in float32.
        for_weight: Tensor | None = None
        for_bias = torch.zeros(vocabulary, dtype=wide, device=weight.device) if bias is not None and bias.requires_grad else None
        for start in range(0, rows, chunk):
            here = slice(start, min(start + chunk, rows))
            some = logits[: here.stop - start]
            torch.mm(inner[here], outer.t(), out=some)
            if bias is not None:
                some += bias
            loss, right, shares = reduce(some, targets[here], gradient is not None or moving or for_bias is not None)
            total += loss
            correct += right
            if gradient is not None:
                gradient[here] = (some @ outer) * shares
            if moving:
                part = some.t() @ (inner[here] * shares).to(dtype)
                for_weight = part if for_weight is None else for_weight.to(wide).add_(part)
            if for_bias is not None:
                for_bias += (shares.to(dtype).t() @ some)[0]
        ctx.save_for_backward(gradient, None if for_weight is None else for_weight.to(dtype), for_bias)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtypes = (ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1])
        return *(None if x is None else x.to(to) * grads[0].to(to) for x, to in zip(ctx.saved_tensors, dtypes, strict=True)), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy in nats of ``hidden @ weight.T + bias``, and the number of rows whose target is a most likely token.

    Args:
        hidden: [rows, width]. ``weight``: [vocabulary, width] and ``bias`` [vocabulary] of one dtype: that of ``hidden``, or under
            autocast any. Products are computed in the dtype of ``hidden``, or autocast's.
        targets: [rows], int64.

    Returns:
        (scalar float32 total with gradient, float64 for float64 inputs; scalar int64 correct).
    """
    if hidden.shape[0] == 0:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return hidden.sum(dtype=wide) * 0.0, torch.zeros((), dtype=torch.long, device=hidden.device)
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return result


def reference_linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`linear_cross_entropy` computes, with all logits."""
    return reference_cross_entropy(F.linear(hidden, weight, bias), targets)
