"""What a run will need, found without weights: model and method are built from fake tensors (shapes without numbers), and one
forward and backward pass of the largest batch counts the bytes that are alive. No layer or method is known by name. Where the recipe
limits the memory, further passes tell what each layer takes, and which of them have to be recomputed."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftcli.data.batching import Plan
from peftcli.data.prepare import Prepared
from peftcli.errors import OutOfMemoryError
from peftcli.kernels import attention
from peftcli.kernels.attention import PackingUnsupportedError
from peftcli.kernels.eight_bit import COPIES
from peftcli.liveness import Alive, Batch
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import trains_base_weights
from peftcli.model.fused import fuse
from peftcli.model.load import CAUSAL_LM, Opened, checkpoint_activations, quantizable
from peftcli.planner import LayerCost, MemoryPlan, choose, layers, peak, smallest
from peftcli.recipe.schema import Recipe
from peftcli.recipe.sizes import parse_size
from peftcli.report.text import size
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


# Of what a step keeps alive, so much more stays with the process: the C library's heap is cut into pieces of many sizes.
_HEAP = 0.15
# What the libraries take once they compute: code, and prepared products.
_COMPUTING = 60 * 2**20
# Rows on which the model in memory and the model read back from disk are compared.
CHECK_ROWS = 16
# Plans that are tried before nothing is said to fit.
_ATTEMPTS = 4
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
        plan: which layers are recomputed.
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
    plan: MemoryPlan = field(default_factory=MemoryPlan)

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
        model = getattr(transformers, task.auto_model).from_config(
            config, dtype=dtype, trust_remote_code=opened.trust_remote_code, **kernel
        )
    fuse(model)
    return model


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
    files: int = 0,
    gguf: bool = False,
) -> Estimate:
    """Apply ``method`` to the fake ``model``, choose what it recomputes, and count.

    Args:
        model: of :func:`fake_model`; changed in place. ``mode``: the one that it was made in.
        task: settled by the rows.
        data, plan: the rows and their order, from which the largest batches are taken.
        dtype: of the computation.
        program: bytes that the process itself takes.
        files: bytes of the weights' files. On the CPU they are mapped while they are read.
        gguf: the weights come from a GGUF file.

    Raises:
        OutOfMemoryError: nothing fits into the recipe's ``train.memory_budget``; says what would.
    """
    on_cpu = device.type == "cpu"
    parameters = sum(p.numel() for p in model.parameters())
    loaded = sum(p.numel() * p.element_size() for p in model.parameters())
    kind = recipe.base_model.quantization
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in quantizable(model)}
    quantized = {id(m.weight) for m in linears.values()} if kind else set()
    ids = tuple(range(len(recipe.base_model.new_tokens)))
    with mode:
        # Any text will do: shapes do not depend on it.
        ctx = Context(recipe.train.seed, ids, kind is not None, encode=lambda _: [0], from_file=True, shapes_only=True)
        model = method.apply(model, ctx)
    weights = 0.0
    for parameter in model.parameters():
        if id(parameter) in quantized:
            per = _PACKED.get((str(kind), recipe.base_model.double_quantization), 1.0)
            weights += parameter.numel() * per
        else:
            weights += parameter.numel() * parameter.element_size()
    weights += sum(m.weight.numel() for m in linears.values() if not m.weight.requires_grad) * COPIES[recipe.train.frozen_products]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mixed = dtype == torch.bfloat16 and trains_base_weights(model)
    heap = _HEAP if on_cpu else 0.0
    dense = max((m.weight.numel() * torch.finfo(dtype).bits // 8 for m in linears.values()), default=0) if kind else 0
    held = Estimate(
        parameters, trainable, "loading", int(weights), optimizer=int(trainable * _STATE[recipe.train.optimizer]), program=program
    )
    if on_cpu:
        held = replace(held, program=program + _COMPUTING)

    def at(moment: str, activations: int, gradients: int = 0, copies: int = 0, slack: float = heap) -> Estimate:
        return replace(held, moment=moment, activations=activations, gradients=gradients, copies=copies, allocator=int(activations * slack))

    reading = int(loaded * _GGUF) if gguf else files if on_cpu else 0
    largest = max((p.numel() * 4 for p in model.parameters() if p.requires_grad), default=0)
    moments = [
        replace(held, weights=loaded, optimizer=0, copies=reading, program=program),
        # On a GPU all parameters are updated at once, which takes a copy of them; on the CPU one after the other.
        at("update", largest if on_cpu else trainable * 4, trainable * 4, slack=0.0),
    ]
    # Without held-out rows some training rows are measured before and after the weights are read back.
    split, most = (data.eval, recipe.eval.batch_size) if data.eval is not None else (data.train, min(CHECK_ROWS, recipe.eval.batch_size))
    longest = sorted(range(len(split.lengths)), key=lambda row: -split.lengths[row])[:most]
    model.eval()
    with torch.no_grad():
        looked = Batch(model, task, split, longest, dtype, mixed, mode, 1 + heap).alive()
    moments.append(at("evaluation", looked.peak[1] + dense))
    model.train()
    # A beginning that rows share is computed once, on the CPU, and where the model and the method allow it.
    share = on_cpu and recipe.train.fast_paths and task.auto_model == CAUSAL_LM
    rows, groups = _largest(plan, task, data.train.widths, grouped=on_cpu and recipe.train.fast_paths)
    batch = Batch(model, task, data.train, rows, dtype, mixed, mode, 1 + heap, share)
    everything = MemoryPlan.of("recomputed" if recipe.train.gradient_checkpointing else "saved", len(layers(model)))
    if recipe.train.gradient_checkpointing and not everything.choices:
        checkpoint_activations(model)
    batch, first = _shared(batch, everything)

    def training(alive: Alive, chosen: MemoryPlan) -> Estimate:
        kept = trainable * 4 if recipe.train.gradient_accumulation_steps > 1 or groups > 1 else alive.peak[0]
        return replace(at("training", alive.peak[1] + dense, kept), plan=chosen)

    if recipe.train.memory_budget is not None:
        budget = parse_size(recipe.train.memory_budget)
        step = _fit(batch, first, training, budget, max(moments, key=lambda moment: moment.total), offload=not on_cpu)
    else:
        step = training(first, everything)
    moments.append(step)
    if method.caps.whole_model and on_cpu:
        # The weights as they are written, and the model as it is read back to be compared.
        moments.append(at("saving", trainable * 4, copies=2 * int(weights), slack=0.0))
    return replace(max(moments, key=lambda moment: moment.total), plan=step.plan)


def _shared(batch: Batch, plan: MemoryPlan) -> tuple[Batch, Alive]:
    """``batch`` as the run will lay it out, and what is alive in it: dropout must not treat a shared beginning alike in all rows, and
    virtual tokens stand in front of rows, not of beginnings."""
    if batch.share:
        with contextlib.suppress(PackingUnsupportedError):
            alive = batch.alive(plan)
            if not alive.draws:
                return batch, alive
        batch = replace(batch, share=False)
    return batch, batch.alive(plan)


def _fit(
    batch: Batch,
    alive: Alive,
    training: Callable[[Alive, MemoryPlan], Estimate],
    budget: int,
    other: Estimate,
    *,
    offload: bool,
) -> Estimate:
    """The need of training with as little recomputation as fits into ``budget`` bytes.

    Args:
        alive: in a pass with every layer saved. ``training``: the need of a pass.
        other: the most demanding moment but training.

    Raises:
        OutOfMemoryError: nothing fits.
    """
    count = len(layers(batch.model))
    everything = MemoryPlan.of("saved", count)
    found = training(alive, everything)
    if found.total <= budget and other.total <= budget:
        return found
    costs, between, below = _costs(alive, batch.alive(MemoryPlan.of("recomputed", count)))
    # Beside the pass itself, and the layers' part of it.
    room = budget - (found.total - alive.highest_weight) - below
    least = MemoryPlan(smallest(costs, between, offload=offload))
    for _ in range(_ATTEMPTS if other.total <= budget else 0):
        choices = choose(costs, between, room, offload=offload)
        if choices is None:
            break
        found = training(batch.alive(MemoryPlan(choices)), MemoryPlan(choices))
        if found.total <= budget:
            return found
        # What a layer takes depends a little on the others: try again with what was too much left out.
        room = min(room, peak(costs, choices, between)) - (found.total - budget)
    need = max(training(batch.alive(least), least), other, key=lambda moment: moment.total)
    enough = math.ceil(need.total / 1e8) / 10
    whatever = (
        f"with the least that layers can keep ({least})" if need.moment == "training" else f"whatever is recomputed, in {need.moment}"
    )
    raise OutOfMemoryError(
        f"train.memory_budget: {size(budget)} is too little: {whatever} the run needs {size(need.total)}",
        hint=f"set train.memory_budget to {enough:g}GB, lower train.batch_size (and raise train.gradient_accumulation_steps) or "
        "dataset.max_length, set base_model.quantization=nf4, or take a smaller model.",
    )


def _costs(saved: Alive, again: Alive) -> tuple[list[LayerCost], float, float]:
    """What each layer takes, what is needed between the last one and its backward pass, and what there was before the first one.

    Args:
        saved, again: the same pass with every layer saved and with every layer recomputed.
    """
    costs: list[LayerCost] = []
    heights = {id(alive): alive.started.get(0, 0.0) for alive in (saved, again)}

    def above(alive: Alive, segment: tuple[str, int]) -> float:
        return max(0.0, alive.highest[segment] - heights[id(alive)])

    for index in range(len(saved.left)):
        forward = max(0.0, saved.highest["forward", index] - saved.started[index])
        for alive in (saved, again):
            heights[id(alive)] += alive.left[index]
        backward = above(saved, ("backward", index)), above(again, ("backward", index))
        costs.append(LayerCost(saved.left[index], again.left[index], forward, *backward, saved.work[index]))
    return costs, max(above(alive, ("between", 0)) for alive in (saved, again)), saved.started.get(0, 0.0)


def _largest(plan: Plan, task: Task[Any], widths: Sequence[Sequence[int]], *, grouped: bool) -> tuple[Sequence[int], int]:
    """The micro batch of the first epoch with the most tokens, or where rows are padded in groups of similar lengths its largest group; and
    how many groups it has."""
    micros = [micro for step in plan.epoch(0) for share in step.shares for micro in share if micro]
    rows = max(micros, key=lambda rows: sum(plan.lengths[r] for r in rows))
    groups = task.groups(rows, widths, Layout(task.auto_model == CAUSAL_LM, 0, grouped=grouped))
    return max(groups, key=lambda group: len(group) * max(sum(width[r] for width in widths) for r in group)), len(groups)
