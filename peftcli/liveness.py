"""How many bytes of tensors are alive in a forward and a backward pass, in all and by layer, found without numbers: with fake tensors."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from peftcli.data.splits import Split
from peftcli.model.load import CAUSAL_LM, checkpoint_activations
from peftcli.planner import MemoryPlan, apply, layers
from peftcli.tasks.base import Layout, Task


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, until they are freed; gradients apart.

    Args:
        known: storages that were there before.
        factor: what a byte of anything but a gradient counts for in finding the peak.

    Attributes:
        peak: (bytes of gradients, bytes of everything else) at the moment with the most.
        highest: the most that counted in each part of the pass: (``forward`` or ``backward``, layer), or (``between``, 0).
        draws: random numbers are drawn.
        started, left, work: by layer: what counted before it, what it left behind, and its floating-point operations.
    """

    def __init__(self, known: set[int], factor: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.factor = known, factor
        self.now = self.gradients = 0
        self.peak = (0, 0)
        self.part, self.draws = ("before", 0), False
        self.highest: defaultdict[tuple[str, int], float] = defaultdict(float)
        self.started: dict[int, float] = {}
        self.left: defaultdict[int, float] = defaultdict(float)
        self.work: defaultdict[int, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.draws = self.draws or torch.Tag.nondeterministic_seeded in func.tags
        if self.part[0] == "forward" and func._overloadpacket in flop_registry:
            self.work[self.part[1]] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    @property
    def weight(self) -> float:
        """What counts now."""
        return self._weigh((self.gradients, self.now))

    @property
    def highest_weight(self) -> float:
        """What counted at the peak."""
        return self._weigh(self.peak)

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        weakref.finalize(storage, self._free, key, size)
        self._rise()

    def _rise(self) -> None:
        self.highest[self.part] = max(self.highest[self.part], self.weight)
        if self.weight > self.highest_weight:
            self.peak = (self.gradients, self.now)

    def _weigh(self, moment: tuple[int, int]) -> float:
        return moment[0] + self.factor * moment[1]

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        self.seen.discard(key)

    def enter(self, part: str, layer: int) -> None:
        """From now on it is this part of the pass."""
        self.part = (part, layer)
        self._rise()

    def is_gradient(self, parameter: Tensor) -> None:
        """From now on count the parameter's gradient, which has just become whole, as one."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        self.now, self.gradients = self.now - size, self.gradients + size

    def follow(self, layer: nn.Module, index: int) -> list[Any]:
        """Notice when a layer runs; returns what takes the hooks off."""

        def before(*_: Any) -> None:
            self.started.setdefault(index, self.weight)
            self._at = self.weight
            self.enter("forward", index)

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            self.left[index] += self.weight - self._at
            self.enter("between", 0)
            tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad), None)
            if tensor is not None:
                tensor.register_hook(lambda _: self.enter("backward", index))

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


@dataclass(frozen=True)
class Batch:
    """A pass over some rows, backward where gradients are on. ``factor``: see :class:`Alive`; ``share``: see :class:`Layout`."""

    model: Any
    task: Task[Any]
    split: Split
    rows: Sequence[int]
    dtype: torch.dtype
    mixed: bool
    mode: FakeTensorMode
    factor: float
    share: bool = False

    def alive(self, plan: MemoryPlan | None = None) -> Alive:
        """What is alive in the pass, with layers recomputed as ``plan`` says."""
        # Rows of text lie end to end wherever the model allows it; only a model with weights can tell.
        layout = Layout(self.task.auto_model == CAUSAL_LM, 0, share=self.share)
        batch = _fake(self.task.batch(self.split, self.rows, layout), self.mode)
        alive = Alive({p.untyped_storage()._cdata for p in self.model.parameters()}, self.factor)
        if plan is not None:
            # Offloaded inputs are counted as if they stayed, and left out afterwards.
            here: tuple[Any, ...] = tuple("saved" if choice == "saved" else "recomputed" for choice in plan.choices)
            apply(self.model, MemoryPlan(here), enable=checkpoint_activations)
        with _hooks(self.model, alive), self.mode, alive:
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.mixed):
                loss = self.task.module(self.model)(batch).total
            if torch.is_grad_enabled():
                loss.backward()
        away = [alive.left[index] for index, choice in enumerate(plan.choices) if choice == "offloaded"] if plan is not None else []
        gradients, rest = alive.peak
        alive.peak = (gradients, rest - int(sum(away[1:]) / self.factor))
        return alive


@contextlib.contextmanager
def _hooks(model: nn.Module, alive: Alive) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(alive.is_gradient) for parameter in trained]
    handles += [handle for index, layer in enumerate(layers(model).values()) for handle in alive.follow(layer, index)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """``value`` with every tensor in it, at any depth of lists and objects, replaced by a fake one."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list):
        return [_fake(item, mode) for item in value]
    if hasattr(value, "__dict__"):
        twin = copy.copy(value)
        twin.__dict__.update({key: _fake(item, mode) for key, item in value.__dict__.items()})
        return twin
    return value
