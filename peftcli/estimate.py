"""What a run will need, found without weights: model and method are built from fake tensors (shapes without numbers), and one
forward and backward pass of the largest batch counts the bytes that are alive. No layer or method is known by name."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftcli.data.batching import Plan
from peftcli.data.prepare import Prepared
from peftcli.data.splits import Split
from peftcli.kernels import attention
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import trains_base_weights
from peftcli.model.load import CAUSAL_LM, Opened, checkpoint_activations, quantizable
from peftcli.recipe.schema import Recipe
from peftcli.tasks.base import Layout, Task

# Bytes of optimizer state for each trained parameter.
_STATE = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "sgd": 0.0, "adafactor": 0.1}
# Bytes for each weight: the codes, and one scale for 64 (4 bits; one byte of it where quantized again) or for each row (8 bits).
_PACKED = {
    ("nf4", True): 0.5 + 1 / 64 + 4 / 16384,
    ("nf4", False): 0.5 + 4 / 64,
    ("fp4", True): 0.5 + 1 / 64 + 4 / 16384,
    ("fp4", False): 0.5 + 4 / 64,
}


# Of what a step keeps alive, so much more stays with the process: the C library's heap is cut into pieces of many sizes and gives few
# back. Resident memory of ten steps of the quickstart, LoRA and full, two batch sizes: 0.58 to 0.68.
_HEAP = 0.65
# What reading a GGUF file takes beside the dense weights, as a share of these: 0.7 on the same model.
_GGUF = 0.7


@dataclass(frozen=True)
class Estimate:
    """Bytes at the run's most demanding moment, by cause, and the parameter counts.

    Attributes:
        moment: which one that is: loading, evaluation, training, update (of the weights) or saving.
        weights: frozen and trained weights as stored.
        gradients, optimizer: float32 gradients and the optimizer's state of the trained parameters.
        activations: what the largest batch keeps alive at that moment, temporaries, logits and a dequantized layer included.
        allocator: on the CPU, what the heap holds beyond that.
        copies: of the weights, while they are read or written.
        program: Python, torch and the libraries themselves (on the CPU, where memory is counted for the process).
    """

    parameters: int
    trainable: int
    moment: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    allocator: int = 0
    copies: int = 0
    program: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.allocator + self.copies + self.program


def fake_model(opened: Opened, dtype: torch.dtype, mode: FakeTensorMode, task: Task[Any]) -> Any:
    """The model of fake tensors that a settled task needs: its shapes, no weights."""
    import transformers

    config, head = copy.deepcopy(opened.config), task.head()
    if head is not None:
        config.num_labels, config.problem_type = len(head.labels), head.problem
        config.pad_token_id = opened.tokenizer.pad_token_id
    kernel = {"attn_implementation": attention.register()} if task.auto_model == CAUSAL_LM else {}
    with mode:
        return getattr(transformers, task.auto_model).from_config(config, dtype=dtype, trust_remote_code=opened.trust_remote_code, **kernel)


def estimate(
    model: Any,
    method: Method[Any],
    task: Task[Any],
    recipe: Recipe,
    data: Prepared,
    plan: Plan,
    dtype: torch.dtype,
    mode: FakeTensorMode,
    *,
    device: torch.device,
    program: int,
    gguf: bool = False,
) -> Estimate:
    """Apply ``method`` to the fake ``model`` and count.

    Args:
        model: of :func:`fake_model`; changed in place. ``mode``: the one that it was made in.
        task: settled by the rows.
        data, plan: the rows and their order, from which the largest batches are taken.
        dtype: of the computation.
        program: bytes that the process itself takes.
        gguf: the weights come from a GGUF file.
    """
    parameters = sum(p.numel() for p in model.parameters())
    loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    kind = recipe.base_model.quantization
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in quantizable(model)}
    quantized = {id(m.weight) for m in linears.values()} if kind else set()
    ids = tuple(range(len(recipe.base_model.new_tokens)))
    with mode:
        # Any text will do, and initial values do not matter: shapes do not depend on them.
        model = method.apply(model, Context(recipe.train.seed, ids, kind is not None, encode=lambda _: [0], from_file=True))
    weights = 0.0
    for parameter in model.parameters():
        if id(parameter) in quantized:
            per = _PACKED.get((str(kind), recipe.base_model.double_quantization), 1.0)
            weights += parameter.numel() * per
        else:
            weights += parameter.numel() * parameter.element_size()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    mixed = dtype == torch.bfloat16 and trains_base_weights(model)
    heap = _HEAP if device.type == "cpu" else 0.0
    dense = max((m.weight.numel() * torch.finfo(dtype).bits // 8 for m in linears.values()), default=0) if kind else 0
    held = Estimate(
        parameters, trainable, "loading", int(weights), optimizer=int(trainable * _STATE[recipe.train.optimizer]), program=program
    )

    def at(moment: str, activations: int, gradients: int = 0, copies: int = 0, slack: float = heap) -> Estimate:
        return replace(held, moment=moment, activations=activations, gradients=gradients, copies=copies, allocator=int(activations * slack))

    model.train()
    step, moved = _alive(model, task, data.train, _largest(plan), dtype, mixed, mode, 1 + heap)
    kept = trainable * 4 if recipe.train.gradient_accumulation_steps > 1 else moved
    largest = max((p.numel() * 4 for p in model.parameters() if p.requires_grad), default=0)
    moments = [
        replace(held, weights=loaded, optimizer=0, copies=int(loaded * _GGUF) if gguf else 0),
        at("training", step + dense, kept),
        # On a GPU all parameters are updated at once, which takes a copy of them; on the CPU one after the other.
        at("update", largest if device.type == "cpu" else trainable * 4, trainable * 4, slack=0.0),
    ]
    if data.eval is not None:
        model.eval()
        lengths = data.eval.lengths
        rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: recipe.eval.batch_size]
        with torch.no_grad():
            moments.append(at("evaluation", _alive(model, task, data.eval, rows, dtype, mixed, mode, 1 + heap)[0] + dense))
    if method.caps.whole_model and device.type == "cpu":
        # The weights as they are written, and the model as it is read back to be compared. What the step freed is still in the heap.
        moments.append(at("saving", max(step, trainable * 4), copies=2 * int(weights), slack=0.0))
    return max(moments, key=lambda moment: moment.total)


def _largest(plan: Plan) -> Sequence[int]:
    """The micro batch of the first epoch with the most tokens."""
    micros = [micro for step in plan.epoch(0) for share in step.shares for micro in share if micro]
    return max(micros, key=lambda rows: sum(plan.lengths[r] for r in rows))


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, until they are freed; gradients apart.

    Args:
        known: storages that were there before.
        factor: what a byte of anything but a gradient counts for in finding the peak.

    Attributes:
        peak: (bytes of gradients, bytes of everything else) at the moment with the most.
    """

    def __init__(self, known: set[int], factor: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.factor = known, factor
        self.now = self.gradients = 0
        self.peak = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        weakref.finalize(storage, self._free, key, size)
        if self._weigh((self.gradients, self.now)) > self._weigh(self.peak):
            self.peak = (self.gradients, self.now)

    def _weigh(self, moment: tuple[int, int]) -> float:
        return moment[0] + self.factor * moment[1]

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        self.seen.discard(key)

    def is_gradient(self, parameter: Tensor) -> None:
        """From now on count the parameter's gradient, which has just become whole, as one."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        self.now, self.gradients = self.now - size, self.gradients + size


@contextlib.contextmanager
def _hooks(model: nn.Module, alive: _Alive) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(alive.is_gradient) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None


def _alive(
    model: Any,
    task: Task[Any],
    split: Split,
    rows: Sequence[int],
    dtype: torch.dtype,
    mixed: bool,
    mode: FakeTensorMode,
    factor: float,
) -> tuple[int, int]:
    """(bytes alive, gradients among them not counted; gradients) at the peak of a pass over ``rows``, backward where gradients are on."""
    # Rows of text lie end to end wherever the model allows it; only a model with weights can tell.
    batch = _fake(task.batch(split, rows, Layout(task.auto_model == CAUSAL_LM, 0)), mode)
    alive = _Alive({p.untyped_storage()._cdata for p in model.parameters()}, factor)
    with _hooks(model, alive), mode, alive:
        with torch.autocast("cpu", dtype=dtype, enabled=mixed):
            loss = task.module(model)(batch).total
        if torch.is_grad_enabled():
            loss.backward()
    return alive.peak[1], alive.peak[0]


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
