"""Which layers keep what the backward pass needs, which compute it again, and which keep nothing on the GPU: the least work that fits.

A layer is what transformers can checkpoint (``GradientCheckpointingLayer``), of any model. It is *saved* (keeps everything),
*recomputed* (keeps its input, runs forward once more in the backward pass) or *offloaded* (the same, and its input waits in the host's
pinned memory; on a GPU only). The choice changes no gradient by a bit, so it is made for each machine anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

__all__ = ["CHOICES", "Choice", "LayerCost", "MemoryPlan", "apply", "choose", "layers", "peak", "smallest"]

Choice = Literal["saved", "recomputed", "offloaded"]
CHOICES: tuple[Choice, ...] = ("saved", "recomputed", "offloaded")


@dataclass(frozen=True)
class LayerCost:
    """What one layer asks for, measured on the largest batch.

    Attributes:
        saved, recomputed: bytes that it leaves behind for the backward pass, of either kind; offloaded it leaves none.
        forward: bytes beyond what was there before it, at the peak of its forward pass.
        backward: bytes beyond what it and the layers before it left, at the peak of its backward pass when saved.
        again: the same when recomputed.
        work: of recomputing it (floating-point operations, or any unit).
    """

    saved: float
    recomputed: float
    forward: float
    backward: float
    again: float
    work: float

    def left(self, choice: Choice) -> float:
        """Bytes that it leaves behind."""
        return {"saved": self.saved, "recomputed": self.recomputed, "offloaded": 0.0}[choice]


@dataclass(frozen=True)
class MemoryPlan:
    """A choice for each layer, in the order in which they run."""

    choices: tuple[Choice, ...] = ()

    @classmethod
    def of(cls, choice: Choice, count: int) -> MemoryPlan:
        """The same choice for ``count`` layers."""
        return cls((choice,) * count)

    def count(self, choice: Choice) -> int:
        """How many layers are so."""
        return self.choices.count(choice)

    def __str__(self) -> str:
        """``24 of 30 layers saved, 6 recomputed``."""
        if not self.choices:
            return "nothing is recomputed"
        others = ", ".join(f"{self.count(choice)} {choice}" for choice in CHOICES[1:] if self.count(choice))
        return f"{self.count('saved')} of {len(self.choices)} layers saved" + (f", {others}" if others else "")


def peak(costs: Sequence[LayerCost], choices: Sequence[Choice], between: float) -> float:
    """Bytes beyond the weights at the highest point of a forward and a backward pass.

    Args:
        between: bytes beyond what all layers left, at the peak after the last layer's forward and before its backward pass.
    """
    left, highest = 0.0, 0.0
    for cost, choice in zip(costs, choices, strict=True):
        own = cost.left(choice)
        # An offloaded layer's input comes back before it is recomputed.
        returned = cost.recomputed if choice == "offloaded" else 0.0
        later = cost.backward if choice == "saved" else cost.again + returned
        highest = max(highest, left + cost.forward, left + own + later)
        left += own
    return max(highest, left + between)


def choose(costs: Sequence[LayerCost], between: float, budget: float, *, offload: bool) -> tuple[Choice, ...] | None:
    """The choices with the least work whose :func:`peak` is at most ``budget``; ``None`` where none fits.

    Layers are recomputed in the order of what that frees for its work, and among equals the first ones before: their backward pass comes
    last, when all others are gone. Of equal layers, no fewer would do. They are offloaded only where recomputing does not suffice.
    """
    for choices in _ladder(costs, between, offload=offload):
        if peak(costs, choices, between) <= budget:
            return _given_back(costs, choices, between, budget)
    return None


def smallest(costs: Sequence[LayerCost], between: float, *, offload: bool) -> tuple[Choice, ...]:
    """The choices with the lowest :func:`peak`."""
    return min(_ladder(costs, between, offload=offload), key=lambda choices: peak(costs, choices, between))


def _ladder(costs: Sequence[LayerCost], between: float, *, offload: bool) -> Iterator[tuple[Choice, ...]]:
    """Choices with ever more work, one layer more at a time; offloading starts from the best that recomputing can do."""
    best = MemoryPlan.of("saved", len(costs)).choices
    now = best
    yield now
    for instead in CHOICES[1 : 3 if offload else 2]:
        now = best
        for index in sorted(range(len(costs)), key=lambda index: (-_worth(costs[index], now[index], instead), index)):
            if instead == "offloaded" and best[index] == "saved":
                continue
            now = (*now[:index], instead, *now[index + 1 :])
            yield now
            if peak(costs, now, between) < peak(costs, best, between):
                best = now


def _worth(cost: LayerCost, old: Choice, new: Choice) -> float:
    """Bytes freed for each unit of work; what moves to the host costs by its bytes, so all are equal there."""
    freed = cost.left(old) - cost.left(new)
    return freed / max(cost.work, 1e-9) if new == "recomputed" else min(freed, 1.0)


def _given_back(costs: Sequence[LayerCost], choices: tuple[Choice, ...], between: float, budget: float) -> tuple[Choice, ...]:
    """``choices`` without the work that turns out not to be needed: a large layer that came last may have made smaller ones needless."""
    order = sorted(range(len(costs)), key=lambda index: (-costs[index].work, -index))
    while True:
        fewer = ((*choices[:i], cheaper, *choices[i + 1 :]) for i in order for cheaper in CHOICES[: CHOICES.index(choices[i])])
        found = next((other for other in fewer if peak(costs, other, between) <= budget), None)
        if found is None:
            return choices
        choices = found


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that can be recomputed, by name, in the order in which they are defined; none inside another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return found


def apply(model: nn.Module, plan: MemoryPlan, *, enable: Callable[[Any], None]) -> None:
    """Let the layers of ``model`` do as ``plan`` says. A plan of no choices changes nothing.

    Args:
        enable: lets every layer of a model recompute.
    """
    own = list(layers(model).values())
    if not plan.choices:
        return
    assert len(own) == len(plan.choices), "a plan of another model"
    if plan.count("saved") < len(own):
        enable(model)
    for module in model.modules():
        # Only layers recompute. The stacks around them would compute a little differently (T5's).
        if hasattr(module, "gradient_checkpointing"):
            cast(Any, module).gradient_checkpointing = False
    for layer, choice in zip(own, plan.choices, strict=True):
        layer.gradient_checkpointing = choice != "saved"
        if choice == "offloaded":
            layer._gradient_checkpointing_func = functools.partial(_offloaded, layer._gradient_checkpointing_func)


def _offloaded(recompute: Callable[..., Any], function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer whose inputs wait in the host's memory until it is recomputed."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return recompute(function, *inputs)
