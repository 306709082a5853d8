"""Trials of what a model can do, on the first layers that show every kind of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import pytest
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peftcli.kernels import attention
from peftcli.methods import registry
from peftcli.methods.base import Context
from peftcli.tasks.causal_lm import supports_packing, supports_sharing
from peftcli.tasks.trials import on_first_layers


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=helpers.VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, bos_token_id=0
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).eval()


def tried(model: Any, *answers: bool) -> tuple[bool, list[int]]:
    """What the trial comes to when it gives these answers one after another, and on how many layers it ran each time."""
    depths, left = [], list(answers)

    def trial() -> bool:
        depths.append(len(model.model.layers))
        return left.pop(0)

    return on_first_layers(model, trial), depths


def drop_in(layer: Any) -> None:
    layer.self_attn.attention_dropout = 0.1


def hook_into(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


def replace_in(layer: Any) -> None:
    layer.mlp.act_fn = nn.GELU()


def call_instead(layer: Any) -> None:
    layer.forward = lambda *inputs, **more: type(layer).forward(layer, *inputs, **more)


def without_weight(layer: Any) -> None:
    layer.input_layernorm.weight = None


def test_equal_layers_are_tried_by_one(model: Any) -> None:
    layers = model.model.layers
    assert tried(model, True) == (True, [1])
    assert model.model.layers is layers


def test_only_the_whole_model_says_no(model: Any) -> None:
    assert tried(model, False, False) == (False, [1, 5])
    assert tried(model, False, True) == (True, [1, 5])


@pytest.mark.parametrize("change", [drop_in, hook_into, replace_in, call_instead, without_weight], ids=lambda change: change.__name__)
def test_a_layer_of_another_kind_is_among_them(model: Any, change: Callable[[Any], None]) -> None:
    change(model.model.layers[2])
    assert tried(model, True) == (True, [3])


def test_layers_that_the_config_tells_apart_are_of_two_kinds(model: Any) -> None:
    model.config.layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert tried(model, True) == (True, [4])


def test_what_a_shortened_model_cannot_do_is_asked_of_the_whole(model: Any) -> None:
    layers, depths = model.model.layers, []

    def trial() -> bool:
        depths.append(len(model.model.layers))
        return bool(model.model.layers[4] is not None)

    assert on_first_layers(model, trial)
    assert depths == [1, 5]
    assert model.model.layers is layers


def test_a_model_without_one_list_of_layers_is_tried_whole(model: Any) -> None:
    model.config.num_hidden_layers = 4
    assert tried(model, True) == (True, [5])
    seen: list[bool] = []
    assert on_first_layers(nn.Linear(2, 2), lambda: not seen.append(True))
    assert seen == [True]


def test_dropout_behind_the_first_layers_still_forbids_a_shared_beginning(model: Any) -> None:
    cls = registry.get("lora")
    adapted = cls(cls.Config(name="lora", target_modules="all-linear")).apply(model, Context(0))
    assert supports_packing(adapted, helpers.VOCABULARY)
    assert supports_sharing(adapted, helpers.VOCABULARY)
    adapted.model.layers[3].mlp.up_proj.dropout = nn.Dropout(0.1)
    assert not supports_sharing(adapted, helpers.VOCABULARY)
    assert len(adapted.model.layers) == 5


def test_a_leak_behind_the_first_layers_still_forbids_packing(model: Any) -> None:
    def leak(_module: Any, _inputs: Any, out: Any) -> Any:
        return out + out.mean(1, keepdim=True)

    model.model.layers[4].mlp.register_forward_hook(leak)
    assert not supports_packing(model, helpers.VOCABULARY)
