"""An output layer and the cross-entropy over it in one: the logits never exist as a whole.

The gradients are made beside the loss, a few hundred rows at a time, in two buffers that all rows share. What is kept for the backward
pass is as large as the hidden states and, where it is trained, the weight, not as the logits.

The plain reference is ``sum_cross_entropy(F.linear(hidden, weight, bias), targets)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    return losses, right, shares.unsqueeze(1)


def _operators(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of logits [rows, vocabulary] and whether the target is a most likely token, [rows] each, and
    ``1 / sum of exp`` [rows, 1].

    With ``gradient`` the logits become ``exp - [target] * sum``, which the last result makes the gradient; it is multiplied in
    when the rows are short again.
    """
    rows, vocabulary = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    part = max(1, min(rows, (_WIDE if logits.device.type == "cpu" else _GPU_WIDE) // vocabulary))
    scratch, shares = logits.new_empty(part, vocabulary, dtype=wide), logits.new_empty(rows, 1, dtype=wide)
    losses, right = logits.new_empty(rows, dtype=wide), torch.empty_like(targets)
    for first in range(0, rows, part):
        here = slice(first, first + part)
        narrow = logits[here]
        values = scratch[: len(narrow)].copy_(narrow)
        target = targets[here].unsqueeze(1)
        picked, top = values.gather(1, target), values.amax(1, keepdim=True)
        values.sub_(top).exp_()
        sums = values.sum(1, keepdim=True)
        losses[here] = (sums.log() + top - picked).squeeze(1)
        # A tie counts as correct: the target is as likely as any other token.
        right[here] = (picked == top).squeeze(1).long()
        if gradient:
            values.scatter_add_(1, target, -sums)
            narrow.copy_(values)
            shares[here] = sums.reciprocal_()
    return losses, right, shares


class _Found(NamedTuple):
    """Losses and whether each row is right, [rows] each; the gradients of the losses' sum where they are wanted."""

    losses: Tensor
    right: Tensor
    for_hidden: Tensor | None
    for_weight: Tensor | None
    for_bias: Tensor | None


def _found(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: Sequence[bool]) -> _Found:
    """Everything in one pass over the rows, a chunk at a time.

    Args:
        wanted: whether hidden states, weight and bias want a gradient.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    dtype = working_dtype(hidden)
    inner, outer = hidden.to(dtype), weight.to(dtype)
    most = _GPU_LOGITS if hidden.device.type != "cpu" else _TRAINED if wanted[1] else _LOGITS
    chunk = max(1, min(rows, most // vocabulary))
    logits = inner.new_empty(chunk, vocabulary)
    reduce = _compiled if native.usable(logits) else _operators
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for_hidden = torch.empty_like(inner) if wanted[0] else None
    wide = torch.promote_types(weight.dtype, torch.float32)
    # In the products' dtype, as autocast leaves it; the sum over several in float32.
    for_weight: Tensor | None = None
    for_bias = torch.zeros(vocabulary, dtype=wide, device=weight.device) if wanted[2] else None
    for start in range(0, rows, chunk):
        here = slice(start, min(start + chunk, rows))
        some = logits[: here.stop - start]
        torch.mm(inner[here], outer.t(), out=some)
        if bias is not None:
            some += bias
        loss, hits, shares = reduce(some, targets[here], any(wanted))
        losses.append(loss)
        right.append(hits)
        if for_hidden is not None:
            for_hidden[here] = (some @ outer) * shares
        if wanted[1]:
            part = some.t() @ (inner[here] * shares).to(dtype)
            for_weight = part if for_weight is None else for_weight.to(wide).add_(part)
        if for_bias is not None:
            for_bias += (shares.to(dtype).t() @ some)[0]
    return _Found(torch.cat(losses), torch.cat(right), for_hidden, for_weight, for_bias)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        found = _found(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        correct = found.right.sum()
        ctx.save_for_backward(*found[2:])
        ctx.mark_non_differentiable(correct)
        return found.losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x.to(to) * grads[0].to(to) for x, to in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtype = hidden.dtype
        found = _found(hidden, weight, bias, targets, (ctx.needs_input_grad[0], False, False))
        right = found.right.bool()
        ctx.save_for_backward(found.for_hidden)
        ctx.mark_non_differentiable(right)
        return found.losses, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # A row's loss depends on its own hidden state only, so the gradient of the sum holds every row's own.
        (for_hidden,) = ctx.saved_tensors
        return (for_hidden * grads[0].unsqueeze(1)).to(ctx.dtype), None, None, None


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


def linear_token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, and whether its target is a most likely token; [rows] both. The output layer is frozen, or gradients
    are off.

    Args:
        hidden, weight, bias, targets: as for :func:`linear_cross_entropy`.

    Raises:
        ValueError: weight or bias wants a gradient, which needs to know what becomes of each row's loss.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the losses of single tokens have no gradient for a trained output layer")
    if hidden.shape[0] == 0:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return hidden.sum(1, dtype=wide), targets.bool()
    result: tuple[Tensor, Tensor] = _LinearTokenLosses.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return result


def reference_linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`linear_cross_entropy` computes, with all logits."""
    return reference_cross_entropy(F.linear(hidden, weight, bias), targets)


def reference_linear_token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`linear_token_losses` computes, with all logits."""
    logits = F.linear(hidden, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="none"), wide.gather(1, targets[:, None]).squeeze(1) == wide.amax(1)
