"""Products with frozen weights in 8 bits, forward and backward: rows and weight are rounded to 8 bits, the sums are exact or nearly so.

Each output channel of the weight has a scale, and each row that is multiplied by it one of its own, found when it comes: no row depends
on those beside it. On the way back the weight's scales lie on the axis that is summed over, so they are multiplied into the gradient
before it is rounded.

``fp8`` is float8_e4m3fn on tensor cores (``torch._scaled_mm``), ``int8`` integers with the instructions of CPUs that have them
(``torch._int_mm``). The plain reference of both products is one in float32 over the same rounded numbers; it is what runs where fast paths
are turned off.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.kernels import fast, native
from peftcli.kernels.frozen import Product, frozen_linear

_NAME = "frozen products in 8 bits"
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def reference_quantize(rows: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row in 8 bits, with a scale that makes its largest number the largest of ``dtype``.

    Args:
        rows: [n, width]. ``factors``: [width] float32 that every row is multiplied by before.
        dtype: float8_e4m3fn or int8.

    Returns:
        (codes [n, width] of ``dtype``, scales [n] float32); code * scale is the value. A row that holds no number gets the scale NaN.
    """
    wide = rows.float() if factors is None else rows.float() * factors
    # Not below 1e-12: a row of zeros has codes and scale that are numbers.
    top = wide.abs().amax(1).clamp_min(1e-12)
    largest = _LARGEST[dtype]
    values = wide * (torch.full_like(top, largest) / top).unsqueeze(1)
    if dtype == torch.int8:
        return values.nan_to_num(0.0, 0.0, 0.0).round().to(dtype), torch.where(top < torch.inf, top / largest, torch.nan)
    return values.to(dtype), top / largest


def reference_multiply(codes: Tensor, scales: Tensor, weight: Tensor, by: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(codes * scales) @ (weight * by).T`` in float32, as ``dtype``.

    Args:
        codes: [n, k]; ``scales`` [n]. ``weight``: [m, k] in 8 bits; ``by`` [m].
    """
    sums = codes.float() @ weight.float().t()
    sums = sums * scales.unsqueeze(1)
    return (sums if by is None else sums * by).to(dtype)


class EightBit:
    """A frozen weight in 8 bits as something to multiply by.

    Args:
        weight: [out, in], bfloat16.
    """

    dtype: ClassVar[torch.dtype]
    # The rows that came last, as they were, and what they were rounded to: layers of one input are multiplied one after the other.
    last: ClassVar[tuple[weakref.ref[Tensor], int, Tensor | None, Tensor, Tensor] | None] = None
    # [in] float32 that every row is multiplied by before it is rounded, and the forward weight divided by; none is all ones.
    factors: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        self.codes, self.scales = reference_quantize(weight, None, self.dtype)

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        codes, scales = self._once(rows)
        if fast.take(_NAME):
            out = self._forward(codes, scales, rows.dtype)
        else:
            out = reference_multiply(codes, scales, *self._forward_weight(), rows.dtype)
        return out if bias is None else out.add_(bias)

    def back(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        codes, scales = self._quantize(rows, self.scales)
        if fast.take(_NAME):
            return self._backward(codes, scales, rows.dtype, onto)
        out = reference_multiply(codes, scales, self.codes.t(), None, rows.dtype)
        return out if onto is None else onto.add_(out)

    def settle(self, weight: Tensor, factors: Tensor) -> None:
        """Let every row be multiplied by ``factors`` before it is rounded, where that helps.

        Args:
            weight: [out, in] that this was made of. ``factors``: [in] float32, the same tensor for layers of one input, which then
                round it once.
        """

    def _once(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        last = EightBit.last
        if last is not None and last[0]() is rows and last[1] == rows._version and last[2] is self.factors and last[3].dtype == self.dtype:
            return last[3], last[4]
        codes, scales = self._quantize(rows, self.factors)
        EightBit.last = (weakref.ref(rows), rows._version, self.factors, codes, scales)
        return codes, scales

    def _forward_weight(self) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and scales [out]."""
        return self.codes, self.scales

    def _quantize(self, rows: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _forward(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _backward(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, onto: Tensor | None) -> Tensor:
        raise NotImplementedError


class Float8(EightBit):
    """In float8_e4m3fn. Its product knows one layout on NVIDIA's Hopper, so the weight is held twice, once turned."""

    dtype = torch.float8_e4m3fn

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.turned = self.codes.t().contiguous()
        self.ones = torch.ones(1, weight.shape[1], device=weight.device)

    def _quantize(self, rows: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        if rows.device.type != "cuda" or not native.triton_runs() or not fast.on():
            return reference_quantize(rows, factors, self.dtype)
        rows = rows.contiguous()
        codes, scales = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device), rows.new_empty(len(rows), dtype=torch.float32)
        importlib.import_module("peftcli.kernels.triton_code").quantize_rows(rows, factors, codes, scales)
        return codes.view(self.dtype), scales

    def _forward(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        by = self.scales.unsqueeze(0)
        return torch._scaled_mm(codes, self.codes.t(), scales.unsqueeze(1), by, out_dtype=dtype, use_fast_accum=True)

    def _backward(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, onto: Tensor | None) -> Tensor:
        out = torch._scaled_mm(codes, self.turned.t(), scales.unsqueeze(1), self.ones, out_dtype=dtype)
        return out if onto is None else onto.add_(out)


class Int8(EightBit):
    """In integers, whose sums are exact.

    A language model's activations hold a few columns that are a hundred times as large as the others, and rounding would leave the others
    little. Factors that make them more alike go into the forward product's weight the other way round (:func:`evening`). The way back
    keeps the weight as it is: a gradient has no such columns.
    """

    dtype = torch.int8

    def settle(self, weight: Tensor, factors: Tensor) -> None:
        self.factors = factors
        self.ahead = reference_quantize(weight.float() / factors, None, self.dtype)

    def _forward_weight(self) -> tuple[Tensor, Tensor]:
        return (self.codes, self.scales) if self.factors is None else self.ahead

    def _quantize(self, rows: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = rows.contiguous()
        if not native.usable(rows) or not fast.on():
            return reference_quantize(rows, factors, self.dtype)
        codes, scales = torch.empty(rows.shape, dtype=self.dtype), torch.empty(len(rows))
        native.call("quantize", rows, rows, factors, codes, scales, *rows.shape)
        return codes, scales

    def _forward(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        weight, by = self._forward_weight()
        return _widened(torch._int_mm(codes, weight.t()), scales, by, dtype)

    def _backward(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, onto: Tensor | None) -> Tensor:
        return _widened(torch._int_mm(codes, self.codes), scales, None, dtype, onto)


class Int8Backward(Int8):
    """Integers on the way back only, so that the loss is the dense model's. Measured on SmolLM2-135M and rows of GSM8K, all of LoRA's
    gradients as one vector against those of bfloat16: cosine 0.9988, where plain bfloat16 operators in another order give 0.9993, and
    integers in both directions 0.965."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.weight = weight

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, self.weight, bias)


def evening(largest: Tensor) -> Tensor:
    """[in] factors for :meth:`EightBit.settle` from the largest number that each column of rows held: one over its square root, as
    SmoothQuant does on the side of the activations (arXiv:2211.10438). Measured on SmolLM2-135M and 6 batches of GSM8K, the loss beside
    float32's: 0.007 off in the mean, 0.027 without, where bfloat16 is 0.002 off; with a power of 0.7 instead of 0.5, 0.014."""
    return largest.clamp_min(1e-3 * float(largest.mean())).clamp_min(1e-12).rsqrt()


def _widened(sums: Tensor, scales: Tensor, by: Tensor | None, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    """``sums * scales * by`` as ``dtype``, or ``onto`` with that added, where there is no ``by``."""
    out = sums.new_empty(sums.shape, dtype=dtype) if onto is None else onto
    if native.usable(out) and out.is_contiguous():
        native.call("dequantize", out, sums, scales, by, out, *sums.shape, int(onto is not None))
        return out
    wide = sums.float().mul_(scales.unsqueeze(1))
    wide = wide if by is None else wide.mul_(by)
    return out.copy_(wide) if onto is None else out.add_(wide)


KINDS: dict[str, type[EightBit]] = {"fp8": Float8, "int8": Int8, "int8_backward": Int8Backward}
# Weights in 8 bits beside each dense one.
COPIES = {None: 0, "fp8": 2, "int8": 2, "int8_backward": 1}
# A product of fewer multiplications stays as it is: what rounding to 8 bits costs would be more than what the product saves. On a GPU
# (2048, 2048, 2048) is an assumption, not measured by us; on the CPU every shape that was measured gained, the smallest (2,048 rows, 576
# to 192) 1.3 times.
_WORTHWHILE = {"cuda": 1 << 33, "cpu": 0}


class EightBitLinear(nn.Linear):
    """A frozen linear layer that multiplies in 8 bits while it is trained through, and as before in evaluation mode.

    Args:
        linear: its weight and bias are taken over, not copied.
        kind: one of ``KINDS``.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.product = KINDS[kind](linear.weight.detach())

    def frozen_product(self, x: Tensor) -> Product | None:
        """How it multiplies ``x``; ``None`` where it does as every linear layer does."""
        work = x.numel() * self.out_features
        wanted = self.training and torch.is_grad_enabled() and x.dtype == torch.bfloat16
        return self.product if wanted and work >= _WORTHWHILE.get(x.device.type, 0) else None

    def forward(self, x: Tensor) -> Tensor:
        product = self.frozen_product(x)
        return super().forward(x) if product is None else frozen_linear(x, product, self.bias)


def unfit(kind: str, device: torch.device) -> str | None:
    """Why ``device`` does not multiply in 8 bits of this kind; ``None`` where it does."""
    if kind.startswith("int8"):
        if device.type != "cpu":
            return "int8 products are for CPUs; this run is on a GPU"
        vnni: Any = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
        return None if vnni() else "this CPU has no instructions for int8 products (AVX512-VNNI or AMX)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has no FP8 products: its compute capability is {major}.{minor}, 8.9 is needed"
    return None
