"""What a run will need, found without weights: model and method are built from fake tensors (shapes without numbers), and
one forward pass of the largest batch counts what the backward pass keeps. No layer or method is known by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftcli.data.batching import Plan, collate
from peftcli.data.prepare import Split
from peftcli.kernels import attention
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import trains_base_weights
from peftcli.methods.targets import output_layer_name
from peftcli.model.source import Source
from peftcli.model.task import CausalLM
from peftcli.recipe.schema import Recipe

# Bytes of optimizer state for each trained parameter.
_STATE = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "sgd": 0.0, "adafactor": 0.1}
# Bytes for each weight: the codes, and one scale for 64 (4 bits; one byte of it where quantized again) or for each row (8 bits).
_PACKED = {
    ("nf4", True): 0.5 + 1 / 64 + 4 / 16384,
    ("nf4", False): 0.5 + 4 / 64,
    ("fp4", True): 0.5 + 1 / 64 + 4 / 16384,
    ("fp4", False): 0.5 + 4 / 64,
}


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of training, by cause, and the parameter counts.

    Attributes:
        weights: frozen and trained weights as stored.
        gradients, optimizer: float32 gradients and the optimizer's state of the trained parameters.
        activations: what the largest micro batch keeps for its backward pass, logits included.
        workspace: the largest temporary: a dequantized layer, or the gradient of the logits.
        program: Python, torch and the libraries themselves (on the CPU, where memory is counted for the process).
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    program: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace + self.program


def fake_model(source: Source, revision: str | None, dtype: torch.dtype, mode: FakeTensorMode, *, trust_remote_code: bool = False) -> Any:
    """The model of fake tensors: its shapes, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    config = AutoConfig.from_pretrained(source.location, revision=revision or "main", trust_remote_code=trust_remote_code, **extra)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with mode:
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.register(), trust_remote_code=trust_remote_code
        )


def estimate(
    model: Any, method: Method[Any], recipe: Recipe, split: Split, plan: Plan, dtype: torch.dtype, mode: FakeTensorMode, *, program: int
) -> Estimate:
    """Apply ``method`` to the fake ``model`` and count.

    Args:
        model: of :func:`fake_model`; changed in place. ``mode``: the one that it was made in.
        split, plan: the training rows and their order, from which the largest micro batch is taken.
        dtype: of the computation.
        program: bytes that the process itself takes.
    """
    parameters = sum(p.numel() for p in model.parameters())
    kind = recipe.base_model.quantization
    head = output_layer_name(model)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name != head}
    quantized = {id(m.weight) for m in linears.values()} if kind else set()
    ids = tuple(range(len(recipe.base_model.new_tokens)))
    with mode:
        # Any text will do: shapes do not depend on it.
        model = method.apply(model, Context(recipe.train.seed, ids, kind is not None, encode=lambda _: [0]))
    weights = 0.0
    for parameter in model.parameters():
        if id(parameter) in quantized:
            per = _PACKED.get((str(kind), recipe.base_model.double_quantization), 1.0)
            weights += parameter.numel() * per
        else:
            weights += parameter.numel() * parameter.element_size()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    rows = _largest(plan)
    mixed = dtype == torch.bfloat16 and trains_base_weights(model)
    kept, logits = _kept(model, [split.input_ids[r] for r in rows], [split.supervised[r] for r in rows], dtype, mixed, mode)
    dense = max((m.weight.numel() * torch.finfo(dtype).bits // 8 for m in linears.values()), default=0) if kind else 0
    state = _STATE[recipe.train.optimizer]
    return Estimate(parameters, trainable, int(weights), trainable * 4, int(trainable * state), kept, max(dense, logits), program)


def _largest(plan: Plan) -> Sequence[int]:
    """The micro batch of the first epoch with the most tokens."""
    micros = [micro for step in plan.epoch(0) for share in step.shares for micro in share if micro]
    return max(micros, key=lambda rows: sum(plan.lengths[r] for r in rows))


def _kept(model: Any, ids: Any, masks: Any, dtype: torch.dtype, mixed: bool, mode: FakeTensorMode) -> tuple[int, int]:
    """(bytes kept for the backward pass, bytes of the logits' gradient), by a forward pass without numbers."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, int] = {}
    # Storages must live until the end, or a later one could get an earlier one's identity.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    batch = _fake(collate([np.asarray(i) for i in ids], masks, packed=True), mode)
    autocast = torch.autocast("cpu", dtype=dtype, enabled=mixed)
    with mode, autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = CausalLM(model)(batch)
    del loss
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return sum(seen.values()), len(batch.targets) * vocabulary * torch.finfo(dtype).bits // 8


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
