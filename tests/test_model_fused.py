"""Models whose code is LLaMA's get the compiled forms; their results stay, and so does everything that is not LLaMA's."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import helpers
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peftcli.kernels import fast
from peftcli.kernels.dropout import Dropout
from peftcli.model import fused


def compiled(test: Any) -> Any:
    """A test of what a C compiler makes."""
    return pytest.mark.machine(pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")(test))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_model(dtype: torch.dtype) -> None:
    plain = helpers.tiny_model("llama").to(dtype)
    model = copy.deepcopy(plain)
    fused.fuse(model)
    fused.fuse(model)  # a second time changes nothing
    ids = torch.randint(0, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    results = []
    for each in (plain, model):
        fast.switch(on=True)
        each.requires_grad_(True)
        out = each(input_ids=ids).logits
        out.float().square().mean().backward()
        results.append([out.float(), *(p.grad.float() for p in each.parameters())])
        taken = fast.taken()
    assert fused._NAME in taken
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).norm()) <= limit * float(theirs.norm()) + 1e-12


@compiled
def test_the_switch_gives_the_model_s_own_computation_back() -> None:
    model, ids = helpers.tiny_model("llama"), torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    fused.fuse(model)
    with fast.plain():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_classes_keep_their_names_and_copies_work() -> None:
    model = helpers.tiny_model("llama")
    names = [type(m).__name__ for m in model.modules()]
    fused.fuse(model)
    assert [type(m).__name__ for m in model.modules()] == names
    assert any(isinstance(m, LlamaRMSNorm) and type(m) is not LlamaRMSNorm for m in model.modules())
    assert any(isinstance(m, LlamaMLP) and type(m) is not LlamaMLP for m in model.modules())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    ids = torch.arange(12)[None]
    assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_other_code_is_left_alone() -> None:
    class Norm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return (1.0 + self.weight) * hidden_states

    for model in (nn.Sequential(Norm(8)), helpers.tiny_model("gpt2"), helpers.tiny_model("flan-t5")):
        kinds = [Dropout if type(m) is nn.Dropout else type(m) for m in model.modules()]
        fused.fuse(model)
        assert [type(m) for m in model.modules()] == kinds
