"""Fold an adapter into its base and save an ordinary model folder, then prove that it computes the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftcli import quantization
from peftcli.errors import CheckFailed
from peftcli.methods.kinds import AdapterLayer, NewTokens, adapter_layers, mixes_precision
from peftcli.methods.targets import replace
from peftcli.tasks.base import Task

# Text on which base + adapter and the merged model are compared when a run has no held-out rows of its own.
PROBE = (
    "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the Moon; the third stayed in orbit. "
    "def add(a, b): return a + b\n Question: what is 12 times 12? Answer: 144. 今天天气很好。 Bonjour, comment allez-vous ?"
)
# Logits of more positions would take gigabytes with large vocabularies.
_POSITIONS = 1024


@dataclass(frozen=True)
class Parity:
    """How far the merged model is from base + adapter.

    Attributes:
        max_difference: largest absolute difference of two logits.
        kl: mean Kullback-Leibler divergence from base + adapter to merged, nats for each token.
        top1: share of positions whose most likely token is the same.
        positions: how many were compared.
        limits: the thresholds that apply: ``max_difference`` for float32 over a dense base (1e-4 of the largest logit, or of
            1 where all are smaller), else ``kl`` and ``top1``; none where the two are meant to differ.
    """

    max_difference: float
    kl: float
    top1: float
    positions: int
    limits: dict[str, float]

    @property
    def passed(self) -> bool:
        if not self.limits:
            return math.isfinite(self.kl)
        if "max_difference" in self.limits:
            return self.max_difference <= self.limits["max_difference"]
        return self.kl <= self.limits["kl"] and self.top1 >= self.limits["top1"]


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every adapter layer by the plain layer that computes the same, and every quantized layer by its dense one.

    Args:
        model: changed in place.
        dtype: of the folded layers; default: that of the dense weight (bfloat16 for quantized ones computing in it). Base
            weights that were trained in float32 go back to the dtype of those that were not.

    Embeddings and output layers that were tied stay tied where both are folded alike; otherwise they are untied.
    """
    stored = _stored_dtype(model)
    for name, layer in adapter_layers(model).items():
        replace(model, name, _folded(layer, dtype))
    for name, module in list(model.named_modules()):
        if quantization.is_quantized(module):
            weight, bias = quantization.dense_weight(module), getattr(module, "bias", None)
            replace(model, name, _linear(weight, bias, dtype or _compute_dtype(module)))
    _retie(model)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if dtype is None and stored is not None and any(parameter.requires_grad for parameter in own):
            for parameter in own:
                parameter.data = parameter.data.to(stored)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if dtype is not None:
        model.to(dtype)
    return model


def in_float32(model: nn.Module) -> nn.Module:
    """Let ``model`` compute in float32, in place. Quantized layers keep their codes: only what they expand to is wider."""
    for module in model.modules():
        if quantization.is_quantized(module) and hasattr(module, "compute_dtype"):
            cast(Any, module).compute_dtype = torch.float32
    return model.float()


def _stored_dtype(model: nn.Module) -> torch.dtype | None:
    """Of most of the frozen weights in floating point; ``None`` where there are none."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _compute_dtype(module: nn.Module) -> torch.dtype:
    return cast("torch.dtype | None", getattr(module, "compute_dtype", None)) or torch.float32


def _folded(layer: AdapterLayer, dtype: torch.dtype | None) -> nn.Module:
    base = layer.base
    bias = cast("Tensor | None", getattr(base, "bias", None))
    with torch.no_grad():
        if quantization.is_quantized(base):
            weight, bias = layer.fold(quantization.dense_weight(base), bias)
            return _linear(weight, bias, dtype or _compute_dtype(base))
        stored = cast(Tensor, base.weight).detach()
        wide = stored if stored.dtype == torch.float64 else stored.float()
        transposed = type(base).__name__ == "Conv1D"
        weight, bias = layer.fold(wide.t() if transposed else wide, bias)
        if transposed:
            weight = weight.t()
        # A new parameter, never a change in place: another module may share the old one.
        cast(Any, base).weight = nn.Parameter(weight.to(dtype or stored.dtype).contiguous(), requires_grad=False)
        if bias is not None:
            cast(Any, base).bias = nn.Parameter(bias.detach().to(dtype or stored.dtype), requires_grad=False)
    return base


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def _retie(model: Any) -> None:
    """Tie input and output embeddings again where they are equal; say in the config that they are not where they differ."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or head.weight is embedding.weight:
        return
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    else:
        config.tie_word_embeddings = False


def probe_rows(tokenizer: Any, rows: Sequence[np.ndarray[Any, Any]] = ()) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Token rows to compare on: the first of the given ones, about a thousand tokens, or a built-in text."""
    chosen: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for row in rows:
        chosen.append(np.asarray(row, dtype=np.int32)[:_POSITIONS])
        if sum(map(len, chosen)) >= _POSITIONS:
            break
    if chosen:
        return chosen
    ids = tokenizer(PROBE, add_special_tokens=True)["input_ids"]
    return [np.asarray(ids, dtype=np.int32)]


def logits_of(task: Task[Any], model: nn.Module, rows: Sequence[np.ndarray[Any, Any]], device: torch.device) -> Tensor:
    """[positions, outputs] float32 logits on the CPU of every row, one row at a time."""
    model.eval()
    collected = []
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixes_precision(model)):
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None].to(device)
            collected.append(task.probe(model, ids).float().cpu())
    return torch.cat(collected)


def parity(adapted: Tensor, merged: Tensor, *, exact: bool | None) -> Parity:
    """Compare two sets of logits, [positions, vocabulary] each.

    Args:
        exact: both were computed in float32 over a dense base, so they differ by rounding only; ``None``: they are not the same
            model, and how far apart they are is to be known.
    """
    width = min(adapted.shape[1], merged.shape[1])
    p, q = adapted[:, :width].double().log_softmax(-1), merged[:, :width].double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    top1 = float((adapted[:, :width].argmax(-1) == merged[:, :width].argmax(-1)).double().mean())
    difference = float((adapted[:, :width] - merged[:, :width]).abs().max())
    # float32 rounds relative to the size of the logits, which is about 30 in real models.
    size = max(1.0, float(adapted[:, :width].abs().max()))
    limits = {} if exact is None else {"max_difference": 1e-4 * size} if exact else {"kl": 5e-3, "top1": 0.99}
    return Parity(difference, max(kl, 0.0), top1, len(p), limits)


def check(result: Parity, folder: Path) -> None:
    """Raises:
    CheckFailed: the merged model is not what base + adapter computes.
    """
    if not result.passed:
        limits = ", ".join(f"{name} {'>=' if name == 'top1' else '<='} {value:g}" for name, value in result.limits.items())
        raise CheckFailed(
            f"the merged model in {folder} differs from base + adapter: largest difference {result.max_difference:.3g}, "
            f"KL {result.kl:.3g}, same top token {result.top1:.2%} of {result.positions} (allowed: {limits})",
            hint="merge with --dtype float32, or keep the adapter beside the base.",
        )


__all__ = ["NewTokens", "Parity", "check", "in_float32", "logits_of", "merge", "parity", "probe_rows"]
