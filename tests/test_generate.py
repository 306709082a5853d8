"""Greedy answers to many prompts at once are those that each prompt gets alone: every family, every method, virtual tokens or not."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from torch import nn

from peftcli import probe
from peftcli.generate import generate
from peftcli.methods.base import Context

WRITERS = ["llama", "gpt2", "flan-t5"]
LENGTHS = (1, 9, 4, 17, 2, 9, 30)


def family(kind: str) -> str:
    return "t5" if kind == "flan-t5" else kind


GENERATING = [(name, kind) for name, found in probe.stored().items() for kind in WRITERS if found.families[family(kind)] is None]


def writer(name: str, kind: str) -> Any:
    """A tiny random model with a method whose parts are far from their start, in float64 where it is not quantized."""
    quantized = name == "qlora"
    method = helpers.make_method(name, **({"last_layers": 1} if name == "freeze" else {}))
    base = helpers.tiny_model(kind, quantization="nf4" if quantized else None)
    model = method.apply(base, Context(seed=11, frozen_quantized=quantized))
    helpers.stir(model, scale=0.02 if name == "bitfit" else 0.2)  # large biases alone decide what is written
    return model.eval() if quantized else model.eval().double()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 260, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize(("name", "kind"), GENERATING)
def test_answers_do_not_depend_on_who_else_is_asked(name: str, kind: str) -> None:
    """Prompts of different lengths, padded on the left, or on the right for an encoder."""
    model, tokenizer = writer(name, kind), helpers.tiny_tokenizer()
    alone = [generate(model, tokenizer, [prompt], 6, 1, [1])[0] for prompt in prompts()]
    assert len(set(alone)) > 1
    for size in (3, 7):
        assert generate(model, tokenizer, prompts(), 6, size, [1]) == alone


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind in GENERATING if name in ("lora", "prompt_tuning", "prefix_tuning")]
)
def test_only_the_next_token_is_computed(name: str, kind: str) -> None:
    """The output layer, the widest of all, sees one position of each prompt at a time: not the whole prompt on the first pass."""
    model, seen = writer(name, kind), []
    head = next(module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == helpers.VOCABULARY)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    generate(model, helpers.tiny_tokenizer(), prompts(), 3, len(LENGTHS), [1])
    assert seen and set(seen) == {(len(LENGTHS), 1)}
