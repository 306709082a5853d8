"""Triton kernels of frozen weights. Imported only where Triton runs; each has its plain reference in the module that calls it.

Values are rounded by integer arithmetic, so that a GPU, Triton's interpreter on the CPU and the plain references agree to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS, _COLUMNS = 2048, 1024


@triton.jit
def bfloat16_bits(value):
    """float32 -> the 16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, near).to(tl.int16)


@triton.jit
def _e4m3_bits(value):
    """float32 within +-464 -> the 8 bits of the nearest float8_e4m3fn, ties to even; anything else becomes its NaN."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Below 2**-6 the format's steps are even: adding 2**14 leaves the number of steps in the low bits.
    even = size.to(tl.float32, bitcast=True) + 16384.0
    small = even.to(tl.int32, bitcast=True) - 0x46800000
    large = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    code = tl.where(size < 0x3C800000, small, large)
    code = tl.where(size > 0x43E80000, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def _expand_kernel(
    packed, code, scales, scale_code, scale_scales, offset, out, count,
    block: tl.constexpr, outer: tl.constexpr, double: tl.constexpr, elements: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * elements + tl.arange(0, elements)
    inside = place < count
    byte = tl.load(packed + place // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    share = place // block
    if double:
        step = tl.load(scales + share, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_code + step) * tl.load(scale_scales + share // outer, mask=inside, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(scales + share, mask=inside, other=0.0)
    tl.store(out + place, bfloat16_bits(tl.load(code + nibble) * scale), mask=inside)


def expand(
    packed: Tensor, code: Tensor, scales: Tensor, double: tuple[Tensor, Tensor, Tensor, int] | None, block: int, out: Tensor
) -> None:
    """Four-bit codes as bfloat16 numbers, in one launch.

    Args:
        packed: uint8, two codes in each byte, the first one in the high half. ``code``: [16] float32 what a code stands for.
        scales: one for ``block`` numbers: float32, or uint8 codes with ``double`` = (what those stand for [256] float32, scales of
            them float32, a number added to each, how many share one).
        out: bfloat16, contiguous, written.
    """
    count = out.numel()
    more = (scales, scales, scales, 1) if double is None else double
    _expand_kernel[(triton.cdiv(count, _ELEMENTS),)](
        packed, code, scales, more[0], more[1], more[2], out.view(torch.int16), count,
        block=block, outer=more[3], double=double is not None, elements=_ELEMENTS, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _rows_kernel(rows, factors, codes, scales, width, stride, weighted: tl.constexpr, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([columns], dtype=tl.float32)
    for start in range(0, width, columns):
        place = start + tl.arange(0, columns)
        value = tl.load(rows + row * stride + place, mask=place < width, other=0.0).to(tl.float32)
        if weighted:
            value = value * tl.load(factors + place, mask=place < width, other=0.0)
        top = tl.maximum(top, tl.abs(value))
    most = tl.maximum(tl.max(top, axis=0), 1e-12)
    tl.store(scales + row, tl.div_rn(most, 448.0))
    shrink = tl.div_rn(448.0, most)
    for start in range(0, width, columns):
        place = start + tl.arange(0, columns)
        value = tl.load(rows + row * stride + place, mask=place < width, other=0.0).to(tl.float32)
        if weighted:
            value = value * tl.load(factors + place, mask=place < width, other=0.0)
        tl.store(codes + row * width + place, _e4m3_bits(value * shrink), mask=place < width)


def quantize_rows(rows: Tensor, factors: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    """Each row as float8_e4m3fn with a scale of its own, in one launch.

    Args:
        rows: [n, width] bfloat16, each row contiguous. ``factors``: [width] float32 that every row is multiplied by before.
        codes: [n, width] uint8, written. ``scales``: [n] float32, written; code * scale is the value.
    """
    if not len(rows):
        return
    _rows_kernel[(rows.shape[0],)](
        rows, scales if factors is None else factors, codes, scales, rows.shape[1], rows.stride(0),
        weighted=factors is not None, columns=_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
