"""The functions of ``rows.c`` for a GPU, in Triton: row-wise arithmetic of a transformer layer, one pass over memory each.

Imported only where Triton runs. ``native.call`` comes here with tensors of a GPU; the arguments are those of ``rows.c``, and so is where
intermediate results are rounded. Every row is computed by one program in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli.kernels.triton_code import bfloat16_bits

# Numbers of one row that a program holds at a time where it cannot hold the whole row.
_COLUMNS = 4096


@triton.jit
def _store(place, value, mask, half: tl.constexpr):
    if half:
        tl.store(place, bfloat16_bits(value), mask=mask)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def _rounded(value, half: tl.constexpr):
    if half:
        return (bfloat16_bits(value).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _rms_norm_kernel(x, weight, out, inverse, width, eps, columns: tl.constexpr, half: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, columns)
    inside = place < width
    value = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / width + eps)
    tl.store(inverse + row, scale)
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    _store(out + row * width + place, factor * _rounded(value * scale, half), inside, half)


@triton.jit
def _rms_norm_backward_kernel(grad, x, weight, inverse, out, width, columns: tl.constexpr, half: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, columns)
    inside = place < width
    value = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    coming = tl.load(grad + row * width + place, mask=inside, other=0.0).to(tl.float32) * factor
    scale = tl.load(inverse + row)
    shared = tl.sum(coming * value, axis=0) / width * scale * scale
    _store(out + row * width + place, scale * (coming - value * shared), inside, half)


@triton.jit
def _swiglu_kernel(gate, up, out, count, columns: tl.constexpr, half: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    _store(out + place, x / (1.0 + tl.exp(-x)) * tl.load(up + place, mask=inside, other=0.0).to(tl.float32), inside, half)


@triton.jit
def _swiglu_backward_kernel(grad, gate, up, for_gate, for_up, count, columns: tl.constexpr, half: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    coming = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    part = 1.0 / (1.0 + tl.exp(-x))
    _store(for_up + place, coming * x * part, inside, half)
    _store(for_gate + place, coming * other * part * (1.0 + x * (1.0 - part)), inside, half)


@triton.jit
def _rotate_kernel(
    x, step, cosine, sine, out, heads, width, back: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, half: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, rows)[:, None], tl.arange(0, columns)[None, :]
    far = width // 2
    inside = (head < heads) & (pair < far)
    low = tl.load(x + token * step + head * width + pair, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + token * step + head * width + pair + far, mask=inside, other=0.0).to(tl.float32)
    c, s = cosine + token * width + pair, sine + token * width + pair
    c_low, c_high = tl.load(c, mask=pair < far, other=0.0).to(tl.float32), tl.load(c + far, mask=pair < far, other=0.0).to(tl.float32)
    s_low, s_high = tl.load(s, mask=pair < far, other=0.0).to(tl.float32), tl.load(s + far, mask=pair < far, other=0.0).to(tl.float32)
    if back:
        first = _rounded(low * c_low, half) + _rounded(high * s_high, half)
        second = _rounded(high * c_high, half) - _rounded(low * s_low, half)
    else:
        first = _rounded(low * c_low, half) - _rounded(high * s_low, half)
        second = _rounded(high * c_high, half) + _rounded(low * s_high, half)
    to = out + (token * heads + head) * width + pair
    _store(to, first, inside, half)
    _store(to + far, second, inside, half)


@triton.jit
def _cross_entropy_kernel(
    logits, bits, target, loss, inverse, correct, width, gradient: tl.constexpr, columns: tl.constexpr, half: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(target + row)
    begin = logits + row * width
    picked = tl.load(begin + own).to(tl.float32)
    highest = tl.full([columns], float("-inf"), dtype=tl.float32)
    for start in range(0, width, columns):
        place = start + tl.arange(0, columns)
        highest = tl.maximum(highest, tl.load(begin + place, mask=place < width, other=float("-inf")).to(tl.float32))
    top = tl.max(highest, axis=0)
    sums = tl.zeros([columns], dtype=tl.float32)
    for start in range(0, width, columns):
        place = start + tl.arange(0, columns)
        sums += tl.exp(tl.load(begin + place, mask=place < width, other=float("-inf")).to(tl.float32) - top)
    total = tl.sum(sums, axis=0)  # NaN where a logit is: the largest one may pass over it
    tl.store(loss + row, tl.log(total) + top - picked)
    tl.store(inverse + row, 1.0 / total)
    tl.store(correct + row, (picked == top).to(tl.int64))
    if gradient:
        for start in range(0, width, columns):
            place = start + tl.arange(0, columns)
            inside = place < width
            power = tl.exp(tl.load(begin + place, mask=inside, other=float("-inf")).to(tl.float32) - top)
            _store(bits + row * width + place, tl.where(place == own, power - total, power), inside, half)


def _bits(tensor: Tensor) -> Tensor:
    """What a kernel writes into: of a bfloat16 tensor its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _rms_norm(x: Tensor, weight: Tensor, out: Tensor, inverse: Tensor, rows: int, width: int, eps: float) -> None:
    _rms_norm_kernel[(rows,)](x, weight, _bits(out), inverse, width, eps, columns=triton.next_power_of_2(width), half=_half(x))


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, out: Tensor, rows: int, width: int) -> None:
    columns = triton.next_power_of_2(width)
    _rms_norm_backward_kernel[(rows,)](grad, x, weight, inverse, _bits(out), width, columns=columns, half=_half(x))


def _swiglu(gate: Tensor, up: Tensor, out: Tensor, rows: int, width: int) -> None:
    grid = (triton.cdiv(rows * width, _COLUMNS),)
    _swiglu_kernel[grid](gate, up, _bits(out), rows * width, columns=_COLUMNS, half=_half(gate))


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, for_gate: Tensor, for_up: Tensor, rows: int, width: int) -> None:
    grid = (triton.cdiv(rows * width, _COLUMNS),)
    _swiglu_backward_kernel[grid](grad, gate, up, _bits(for_gate), _bits(for_up), rows * width, columns=_COLUMNS, half=_half(gate))


def _rotate(x: Tensor, step: int, cosine: Tensor, sine: Tensor, out: Tensor, rows: int, heads: int, width: int, back: int) -> None:
    sizes = {"rows": triton.next_power_of_2(heads), "columns": triton.next_power_of_2(width // 2)}
    _rotate_kernel[(rows,)](x, step, cosine, sine, _bits(out), heads, width, back=bool(back), half=_half(x), **sizes)


def _cross_entropy(
    logits: Tensor, target: Tensor, loss: Tensor, inverse: Tensor, correct: Tensor, rows: int, width: int, gradient: int
) -> None:
    _cross_entropy_kernel[(rows,)](
        logits, _bits(logits), target, loss, inverse, correct, width, gradient=bool(gradient), columns=_COLUMNS, half=_half(logits)
    )


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "rotate": _rotate,
    "cross_entropy": _cross_entropy,
}
