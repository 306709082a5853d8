"""4-bit and 8-bit linear layers. The only place that imports bitsandbytes.

Quantization belongs to loading a model: methods call ``base(x)`` and never ask how the base stores its weights; only
merging asks for the dense weight, through :func:`dense_weight`.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from peftcli.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


# Weights that share one scale.
_BLOCK = 64


def _bitsandbytes() -> Any:
    # The welcome banner and missing-CUDA notes of the import are no news to somebody without a GPU.
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(f"bitsandbytes cannot be imported: {error}", hint="pip install 'bitsandbytes>=0.50'") from error
    return bitsandbytes


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that stores its weight in 4 or 8 bits."""
    return type(module).__module__.startswith("bitsandbytes.")


@functools.cache
def _linear4bit() -> Any:
    """bitsandbytes' 4-bit layer, whose frozen weight is expanded once forward and once backward, by a kernel of ours where there is one."""
    import torch

    from peftcli.kernels import fast
    from peftcli.kernels.four_bit import FourBit
    from peftcli.kernels.frozen import Product, frozen_linear

    bnb = _bitsandbytes()

    class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
        __module__ = bnb.nn.Linear4bit.__module__  # checks by class, ours and other libraries', stay as they are

        def frozen_product(self, x: torch.Tensor) -> Product | None:
            """How it multiplies ``x``; ``None`` where that is left to bitsandbytes."""
            state = self.weight.quant_state
            repacked = state is None or getattr(state, "packing_format_for_cpu", False)
            if repacked or not x.dtype == state.dtype == self.compute_dtype == torch.bfloat16 or not torch.is_grad_enabled():
                return None
            return FourBit(self.weight.data, state, bnb.functional.dequantize_4bit)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = self.frozen_product(x) if x.device.type == "cuda" and fast.on() else None
            if product is None or (self.bias is not None and self.bias.requires_grad):
                result: torch.Tensor = super().forward(x)
                return result
            return frozen_linear(x, product, self.bias)

    return Linear4bit


def quantize_linear(module: nn.Linear, kind: str, *, double: bool, compute_dtype: torch.dtype) -> nn.Module:
    """A quantized twin of ``module`` on the same device.

    Args:
        module: weight [out, in], dense.
        kind: ``nf4``, ``fp4`` (QLoRA, 2305.14314) or ``int8`` (LLM.int8(), 2208.07339).
        double: quantize the 4-bit scales once more.
        compute_dtype: dtype that the 4-bit weight is expanded to in the product.

    Raises:
        ModelError: bitsandbytes would compute with wrong weights, or is not installed.
    """
    import torch

    bnb = _bitsandbytes()
    device = module.weight.device
    bias = module.bias is not None
    if kind != "int8" and device.type == "cpu" and module.in_features % _BLOCK:
        # The CPU kernels of bitsandbytes 0.50 start a new block with each row where the quantizer does not.
        raise ModelError(
            f"base_model.quantization: {kind} on the CPU needs layers whose input width is a multiple of {_BLOCK}; "
            f"one has {module.in_features}, and bitsandbytes would expand its weight wrongly",
            hint="use int8, no quantization, or a GPU.",
        )
    if kind == "int8":
        quantized = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=bias, has_fp16_weights=False, device="meta")
        quantized.weight = bnb.nn.Int8Params(module.weight.data.contiguous().cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        quantized = _linear4bit()(
            module.in_features,
            module.out_features,
            bias=bias,
            compute_dtype=compute_dtype,
            compress_statistics=double,
            quant_type=kind,
            device="meta",
        )
        quantized.weight = bnb.nn.Params4bit(
            module.weight.data.contiguous().to(compute_dtype),
            requires_grad=False,
            compress_statistics=double,
            quant_type=kind,
            module=quantized,
        )
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weight in place during the first evaluation; dequantizing
        # it afterwards returns wrong numbers without a word. Training, merging and evaluation must agree: never repack.
        quantized.support_avx512bf16_for_cpu = False
    if bias:
        quantized.bias = torch.nn.Parameter(module.bias.data.to(compute_dtype), requires_grad=False)
    result: nn.Module = quantized.to(device)
    result.train(module.training)
    return result


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The float32 weight [out, in] that a quantized layer computes with; a copy, the layer stays as it is."""
    import torch

    bnb = _bitsandbytes()
    if isinstance(module, bnb.nn.Linear4bit):
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError("a 4-bit layer was repacked for inference; its weight cannot be recovered exactly")
        # In the layer's own compute dtype first: merging folds into exactly the weight that the forward pass uses.
        dense: torch.Tensor = bnb.functional.dequantize_4bit(module.weight.data, state).to(module.compute_dtype or torch.float32)
        return dense.to(torch.float32)
    if isinstance(module, bnb.nn.Linear8bitLt):
        weight = module.weight
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        codes: torch.Tensor = weight.data if weight.SCB is not None or module.state.CB is None else module.state.CB
        rows: torch.Tensor = scale.to(torch.float32).view(-1, 1) / 127.0
        return codes.to(torch.float32) * rows
    raise ModelError(f"{type(module).__name__} is no quantized layer that can be expanded")


def optimizer_class(name: str) -> Any:
    """bitsandbytes' optimizer for a recipe's name: ``adamw_8bit``, ``paged_adamw`` or ``paged_adamw_8bit``."""
    optim = _bitsandbytes().optim
    return {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW32bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[name]
