"""Layers of LoRA that a block calls with one input, query, key and value or gate and up, compute together."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftcli.kernels import fast
from peftcli.kernels.frozen import product_of, working_dtype
from peftcli.kernels.siblings import low_rank_siblings
from peftcli.methods.lora_layers import LoraLayer

LLAMA = "transformers.models.llama.modeling_llama"
# Where a block's code is written, the block, and those of its layers that it calls one after another with one input.
_BLOCKS = (
    (LLAMA, "LlamaAttention", ("q_proj", "k_proj", "v_proj")),
    (LLAMA, "LlamaMLP", ("gate_proj", "up_proj")),
    ("transformers.models.bert.modeling_bert", "BertSelfAttention", ("query", "key", "value")),
)


def same_code(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions consist of the same instructions on the same names and constants.

    transformers writes the parts of LLaMA-like models once and copies that code from model to model: what has LLaMA's code computes
    what LLaMA computes, whatever it is called.
    """
    mine, theirs = (getattr(inspect.unwrap(f), "__code__", None) for f in (function, other))
    if mine is None or theirs is None:
        return False

    def parts(code: Any) -> tuple[Any, ...]:
        constants = tuple(c for c in code.co_consts if not isinstance(c, str))  # not the docstring
        return code.co_code, code.co_names, code.co_varnames, constants

    return parts(mine) == parts(theirs)


def join_siblings(model: nn.Module) -> None:
    """Let the layers of LoRA in blocks with LLaMA's or BERT's code compute together where they have one input."""
    for source, block, names in _BLOCKS:
        likely = [module for module in model.modules() if sum(isinstance(getattr(module, name, None), LoraLayer) for name in names) > 1]
        if likely:
            code = getattr(importlib.import_module(source), block).forward
            for module in likely:
                if same_code(type(module).forward, code):
                    _join(module, names)


def _join(parent: nn.Module, names: Sequence[str]) -> None:
    """Those children of ``parent`` called ``names``, which it calls in this order, that are LoRA's."""
    layers = [getattr(parent, name, None) for name in names]
    plain = [layer for layer in layers if isinstance(layer, LoraLayer) and type(layer).forward is LoraLayer.forward]
    if len(plain) < 2 or any(isinstance(layer.dropout, nn.Dropout) for layer in plain):
        return
    siblings = Siblings(plain)
    for layer in plain:
        layer.siblings = siblings


class Siblings:
    """LoRA's layers of one block that are called one after another with the same input: the first call computes for all.

    Args:
        layers: in the order of their calls; none has dropout, which would give each an input of its own.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = tuple(layers)
        # The input that is being worked on, and what waits for the layers that have not been called with it yet.
        self._input: Tensor | None = None
        self._waiting: dict[LoraLayer, Tensor] = {}

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor | None:
        """What ``layer`` computes of ``x``; ``None`` where it has to do so alone."""
        if layer is self.layers[0]:
            self._waiting = self._compute(x)
            self._input = x
        out = self._waiting.pop(layer, None) if x is self._input else None
        if not self._waiting:
            self._input = None
        return out

    def _compute(self, x: Tensor) -> dict[LoraLayer, Tensor]:
        x = x.to(working_dtype(x))
        products = [product for layer in self.layers if (product := product_of(layer.base, x)) is not None]
        if len(products) < len(self.layers) or not fast.take("low-rank updates of one input together"):
            return {}
        narrow, wide = zip(*(layer.factors() for layer in self.layers), strict=True)
        biases = [cast(nn.Linear, layer.base).bias for layer in self.layers]
        outs = low_rank_siblings(x, products, biases, narrow, wide, [layer.scaling for layer in self.layers])
        return dict(zip(self.layers, outs, strict=True))
