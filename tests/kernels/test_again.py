"""What costs little is computed again, not kept: the same gradients to the last bit, fewer bytes kept."""

from __future__ import annotations

import contextlib

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peftcli.data.batching import collate
from peftcli.kernels import again, elementwise, fast, native
from peftcli.liveness import Alive
from peftcli.model.fused import fuse
from peftcli.tasks.causal_lm import CausalLM

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(native.library(torch.float32) is None, reason="no compiler on this machine"),
]
ROWS, WIDTH = 50, 32


class Layer(nn.Module):
    """A norm, a gated unit, and products that need their inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = elementwise.rms_norm(x, self.norm, 1e-6)
        down: Tensor = self.down(elementwise.swiglu(self.gate(h), self.up(h)))
        return x + down


def run(sparing: bool) -> tuple[int, list[Tensor]]:
    """(bytes alive behind the forward pass, all gradients)"""
    layer, x = Layer(), torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    alive = Alive({known.untyped_storage()._cdata for known in (x, *layer.parameters())}, 1.0)
    with alive, again.sparing() if sparing else contextlib.nullcontext():
        out = layer(x)
    kept = alive.now
    out.square().sum().backward()
    return kept, [p.grad for p in layer.parameters() if p.grad is not None]


def test_the_same_gradients_from_fewer_bytes() -> None:
    (kept, gradients), (spared, again_gradients) = run(sparing=False), run(sparing=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again_gradients, strict=True))
    # The norm's output and the gated unit's.
    assert kept - spared == ROWS * 3 * WIDTH * 4


def test_turned_off_with_the_other_fast_paths() -> None:
    with fast.plain():
        assert run(sparing=True)[0] == run(sparing=False)[0]


def test_a_change_in_place_of_what_it_is_computed_from_is_an_error() -> None:
    x = torch.randn(4, WIDTH, requires_grad=True) * 1.0
    weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    with again.sparing():
        out = elementwise.swiglu(x, x) @ weight
    with torch.no_grad():
        x.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_memory_used_anew_is_not_taken_for_what_lay_there_before() -> None:
    x, weight = torch.randn(4, WIDTH), nn.Parameter(torch.ones(WIDTH, WIDTH))
    with again.sparing():
        for _ in range(20):
            place = elementwise.swiglu(x, x).data_ptr()
        other = torch.randn(4, WIDTH)
        out = other @ weight
    out.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, other.sum(0)[:, None].expand(WIDTH, WIDTH)), f"taken for what lay at {place}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "full", "ia3", "adapter", "prefix_tuning"])
def test_a_model_with_a_method(method: str, checkpointing: bool) -> None:
    options = {"target_modules": "all-linear"} if method == "lora" else {}
    ids = [np.arange(start, start + 9, dtype=np.int32) for start in (3, 20, 31)]
    batch = collate(ids, [np.ones(9, dtype=np.bool_)] * 3, packed=True)
    found = []
    for sparing in (False, True):
        model, made = helpers.adapted(method, "llama", **options)
        helpers.stir(model)
        fuse(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = CausalLM(model)
        loss = made.loss(module, batch).total if sparing else module.forward(batch).total
        loss.backward()
        found.append(helpers.gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
