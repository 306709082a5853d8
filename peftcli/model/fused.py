"""Give a model's layers the fast forms of what stands between their products.

A class whose code is LLaMA's, instruction for instruction, computes what LLaMA's computes, whatever it is called; no other is touched.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.kernels import elementwise, fast, native
from peftcli.kernels.dropout import Dropout
from peftcli.methods.siblings import LLAMA, same_code

_NAME = "RMSNorm, SwiGLU and rotary positions in compiled code"


def fuse(model: nn.Module) -> None:
    """Let the layers of ``model`` take the fast forms where their inputs allow it; otherwise they compute as before.

    A layer's class is replaced by a subclass of it with the same name, so that copies, state and checks by class stay as they are.
    """
    llama: Any = importlib.import_module(LLAMA)
    for module in model.modules():
        kind = type(module)
        if kind in _made.values():
            continue
        if same_code(kind.forward, llama.LlamaRMSNorm.forward):
            module.__class__ = _subclass(kind, _normalize)
        elif same_code(kind.forward, llama.LlamaMLP.forward) and type(getattr(module, "act_fn", None)) in (nn.SiLU, _silu()):
            module.__class__ = _subclass(kind, _gate)
        elif kind is nn.Dropout:
            module.__class__ = Dropout
        elif same_code(kind.forward, llama.LlamaAttention.forward):
            _patch_rotation(sys.modules[kind.__module__], llama)


_made: dict[tuple[type[nn.Module], Callable[..., Tensor]], type[nn.Module]] = {}


def _subclass(kind: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    if (kind, forward) not in _made:
        plain = kind.forward

        @functools.wraps(plain)
        def method(self: Any, x: Tensor) -> Tensor:
            return forward(self, plain, x)

        _made[kind, forward] = type(kind.__name__, (kind,), {"forward": method, "__module__": kind.__module__})
    return _made[kind, forward]


@functools.cache
def _silu() -> type[nn.Module]:
    return type(importlib.import_module("transformers.activations").ACT2FN["silu"])


def _normalize(self: Any, plain: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    if native.usable(hidden_states, self.weight) and fast.take(_NAME):
        return elementwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)
    return plain(self, hidden_states)


def _gate(self: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not native.usable(x) or not fast.take(_NAME):
        return plain(self, x)
    gate, up = self.gate_proj(x), self.up_proj(x)
    down: Tensor = self.down_proj(elementwise.swiglu(gate, up) if native.usable(gate, up) else self.act_fn(gate) * up)
    return down


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the compiled rotation takes these: all of one dtype, or what autocast makes of them, which attention rounds to its dtype."""
    device = q.device.type
    if q.dtype == cos.dtype:
        return native.usable(q, k, cos, sin)
    mixed = device == "cpu" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == q.dtype
    return mixed and cos.dtype == torch.float32 and native.usable(q, k) and native.usable(cos, sin)


def _patch_rotation(module: Any, llama: Any) -> None:
    """Attention calls its rotation through its Python module, which several models may share."""
    plain = getattr(module, "apply_rotary_pos_emb", None)
    if plain is None or hasattr(plain, "peftcli_plain") or not same_code(plain, llama.apply_rotary_pos_emb):
        return

    @functools.wraps(plain)
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        whole = unsqueeze_dim == 1 and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3]) and cos.is_contiguous()
        if whole and sin.is_contiguous() and _turns(q, k, cos, sin) and fast.take(_NAME):
            return elementwise.rotate(q, cos, sin), elementwise.rotate(k, cos, sin)
        both: tuple[Tensor, Tensor] = plain(q, k, cos, sin, unsqueeze_dim)
        return both

    rotated.peftcli_plain = plain  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = rotated
