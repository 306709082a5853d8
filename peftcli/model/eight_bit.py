"""``train.frozen_products``: the frozen linear layers of a model multiply in 8 bits while it is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.kernels.eight_bit import EightBitLinear, evening, unfit
from peftcli.methods.targets import replace
from peftcli.model.load import quantizable

# The formats' products want sizes that are multiples of this.
_STEP = 16


def refuse(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Stop a run that asks for what its device or its dtype cannot do.

    Raises:
        UsageError: says what was asked for, and what is allowed.
    """
    if dtype != torch.bfloat16:
        raise UsageError(
            f"train.frozen_products: {kind} goes with a computation in bfloat16; this one is in {str(dtype).removeprefix('torch.')}",
            hint="set base_model.dtype=bfloat16, or train.frozen_products=null.",
        )
    if reason := unfit(kind, device):
        raise UsageError(f"train.frozen_products: {reason}", hint="set train.frozen_products=null.")


def multiply_in_8_bits(model: nn.Module, kind: str, look: Callable[[nn.Module], object] | None = None) -> int:
    """Put twins that multiply in 8 bits in the place of all frozen bfloat16 linear layers but the output layer; returns their number.

    Args:
        look: runs the model on some rows of what it will be trained on: the same rows in every process and after every resumption.
            Without it the columns of the layers' inputs stay uneven.

    Raises:
        UsageError: there are none.
    """
    names = []
    for name in quantizable(model):
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear or layer.weight.dtype != torch.bfloat16:
            continue
        if not any(p.requires_grad for p in layer.parameters()) and layer.in_features % _STEP == layer.out_features % _STEP == 0:
            names.append(name)
    if not names:
        raise UsageError(
            f"train.frozen_products: {kind} finds no frozen linear layer in bfloat16, so there is nothing to multiply in 8 bits",
            hint="choose a method that leaves the base as it is, such as lora, or set train.frozen_products=null.",
        )
    twins = []
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        twins.append(EightBitLinear(layer, kind))
        replace(model, name, twins[-1])
    if kind == "int8" and look is not None:
        _settle(model, twins, look)
    return len(names)


@torch.no_grad()
def _settle(model: nn.Module, layers: list[EightBitLinear], look: Callable[[nn.Module], object]) -> None:
    """Even out the columns of the layers' inputs. On tokens drawn at random other columns stand out than in text: the loss was off by up to
    0.03 then, whichever were drawn."""
    last: tuple[Tensor | None, Tensor] = None, torch.empty(0)

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal last
        if last[0] is not inputs[0]:
            last = inputs[0], evening(inputs[0].flatten(0, -2).float().abs().amax(0))
        assert isinstance(layer, EightBitLinear)
        layer.product.settle(layer.weight, last[1])

    training = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        model.eval()
        look(model)
    finally:
        for module, before in training.items():
            module.training = before
        for hook in hooks:
            hook.remove()
