"""What stands between the products of a LLaMA-like layer: RMSNorm, SwiGLU and rotary positions, one pass over memory each.

Each function has a plain reference, which is what transformers' modules compute. Kept for the backward pass are the inputs and one
number for each row, nothing in float32 that is as wide as the model. Compiled code does the work (``rows.c``); :func:`native.usable`
says whether there is any for a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels import fast, native
from peftcli.kernels.again import cheap


def _normalized(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    out, inverse = torch.empty_like(x), x.new_empty(x.numel() // width, dtype=torch.float32)
    native.call("rms_norm", x, x, weight, out, inverse, len(inverse), width, float(eps))
    return out, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, width = grads[0].contiguous(), x.shape[-1]
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = torch.empty_like(x)
            native.call("rms_norm_backward", x, grad, x, weight, inverse, for_x, len(inverse), width)
        if ctx.needs_input_grad[1]:
            normal = (x.view(-1, width) * inverse.unsqueeze(1)).to(x.dtype)
            for_weight = (grad.view(-1, width) * normal).sum(0, dtype=torch.float32).to(weight.dtype)
        return for_x, for_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, the mean in float32.

    Args:
        x: [..., width] on the CPU, ``weight`` [width] of the same dtype: bfloat16 or float32.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return cheap(out, lambda x, weight: _normalized(x, weight, eps)[0], x, weight)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What :func:`rms_norm` computes, operator by operator."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out, width = torch.empty_like(gate), gate.shape[-1]
    native.call("swiglu", gate, gate, up, out, gate.numel() // width, width)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, width = grads[0].contiguous(), gate.shape[-1]
        for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
        native.call("swiglu_backward", gate, grad, gate, up, for_gate, for_up, gate.numel() // width, width)
        return for_gate, for_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` for two [..., width] on the CPU of one dtype: bfloat16 or float32. Rounded once, at the end."""
    gate, up = gate.contiguous(), up.contiguous()
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return cheap(out, _gated, gate, up)


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What :func:`swiglu` computes, operator by operator."""
    return F.silu(gate) * up


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """[1, heads, length, width], laid out as [length, heads, width], from any layout whose heads of a token lie together."""
    _, heads, length, width = x.shape
    tokens = x[0].transpose(0, 1)
    if tokens.stride()[1:] != (width, 1):
        tokens = tokens.contiguous()
    out = x.new_empty(length, heads, width)
    # Under autocast the angles come in float32, and the result is rounded once.
    name = "rotate" if cosine.dtype == x.dtype else "rotate_wide"
    native.call(name, x, tokens, tokens.stride(0), cosine, sine, out, length, heads, width, int(back))
    return out.transpose(0, 1).unsqueeze(0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(grads[0], cosine, sine, back=True), None, None


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv:2104.09864) in the order of transformers: the halves of a head's width form the pairs.

    Args:
        x: [1, heads, length, width]; ``cosine`` and ``sine``: [1, length, width], contiguous, of its dtype or, on the CPU, float32,
            without gradient.
    """
    out: Tensor = _Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
    return out


def reference_rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """What :func:`rotate` computes, operator by operator."""
    low, high = x.chunk(2, dim=-1)
    return (x * cosine.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sine.unsqueeze(1)).to(x.dtype)


# Rows whose products are summed one after the other.
_PIECE = 64


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        out, width = torch.empty_like(x), x.shape[-1]
        native.call("scale_columns", x, x, scale, out, x.numel() // width, width)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        grad, width = grads[0].contiguous(), x.shape[-1]
        rows = x.numel() // width
        for_x, sums = torch.empty_like(x), scale.new_zeros(-(-rows // _PIECE), width)
        native.call("scale_columns_backward", x, grad, x, scale, for_x, sums, rows, width, _PIECE)
        return for_x, sums.sum(0)


def scale_columns(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale``, rounded once; gradients of the scale add up in float32.

    Args:
        x: [..., width] on the CPU: bfloat16 or float32. ``scale``: [width] float32.
    """
    out: Tensor = _ScaleColumns.apply(x.contiguous(), scale.contiguous())  # type: ignore[no-untyped-call]
    return out


def reference_scale_columns(x: Tensor, scale: Tensor) -> Tensor:
    """What :func:`scale_columns` computes, operator by operator."""
    return (x * scale).to(x.dtype)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """:func:`scale_columns` where the compiled code takes ``x``, else :func:`reference_scale_columns`."""
    on_cpu = x.device.type == "cpu" and scale.dtype == torch.float32 and native.usable(x)
    return (scale_columns if on_cpu and fast.take("scales in one pass") else reference_scale_columns)(x, scale)
