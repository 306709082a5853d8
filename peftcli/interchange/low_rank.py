"""Any low-rank update of linear layers as a LoRA adapter: the form in which every tool exchanges them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.methods.lora_layers import LoraLayer


def exact_factors(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """``(A, B)`` with ``W + B A`` the weight that ``layer`` computes with, A [rank, in] and B [out, rank], or ``None`` where the
    layer does not add a product of two factors (DoRA, whose rows are scaled as well, or another method)."""
    if not isinstance(layer, LoraLayer) or type(layer).fold is not LoraLayer.fold:
        return None
    narrow, wide = layer.factors()
    # PEFT's `cat` scales A too: the tensors agree to the last bit.
    return narrow.detach() * layer.scaling, wide.detach()


def apply_factors(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], *, quantized: bool) -> tuple[nn.Module, Method[Any]]:
    """Put LoRA layers with these factors into ``model``; returns it and its method, ready to be saved.

    Args:
        factors: by module name, A [rank, in] and B [out, rank]. Lower ranks than the highest are filled up with zeros.
        quantized: the base's linear layers are.
    """
    cls = registry.get("lora")
    rank = max(narrow.shape[0] for narrow, _ in factors.values())
    method = cls(cls.Config.model_validate({"name": "lora", "rank": rank, "alpha": rank, "target_modules": list(factors)}))
    model = method.apply(model, Context(frozen_quantized=quantized, from_file=True))
    for name, (narrow, wide) in factors.items():
        layer = cast(LoraLayer, model.get_submodule(name))
        with torch.no_grad():
            for parameter, values in ((layer.lora_A, narrow), (layer.lora_B, wide)):
                parameter.zero_()
                parameter[: values.shape[0], : values.shape[1]].copy_(values)
    return model.eval(), method
