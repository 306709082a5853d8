"""Adapters against the papers' formulas, written out over the plain model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.methods.adapter import BottleneckLayer
from peftcli.methods.base import Context
from peftcli.methods.kinds import adapter_layers, trainable_state

VARIANTS = ["houlsby", "pfeiffer", "parallel"]
# The blocks of a layer, and the non-linearity and factor, that each paper states.
BLOCKS = {
    ("houlsby", "llama"): ["self_attn", "mlp"], ("houlsby", "gpt2"): ["attn", "mlp"],
    ("pfeiffer", "llama"): ["mlp"], ("pfeiffer", "gpt2"): ["mlp"],
    ("parallel", "llama"): ["mlp"], ("parallel", "gpt2"): ["mlp"],
}  # fmt: skip
FORMULA: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "houlsby": (F.silu, 1.0),
    "pfeiffer": (F.relu, 1.0),
    "parallel": (F.relu, 4.0),
}


def written_out(kind: str, variant: str, weights: dict[str, Tensor]) -> Any:
    """The plain model with the formula hooked behind each whole block: nothing of ours takes part.

    Args:
        weights: by the file's keys; leaves that require gradients.
    """
    model = helpers.tiny_model(kind, torch.float64)
    act, scale = FORMULA[variant]
    prefix = "base_model.model."
    for end in BLOCKS[variant, kind.removesuffix("-tied")]:
        for name, block in model.named_modules():
            if not name.endswith(f".{end}"):
                continue
            inside = sorted(key for key in weights if key.startswith(f"{prefix}{name}."))
            assert len(inside) == 4, name
            up_b, up_w = (weights[key] for key in inside if ".adapter_up." in key)
            down_b, down_w = (weights[key] for key in inside if ".adapter_down." in key)

            stream: dict[str, Tensor] = {}
            if variant != "houlsby":
                norm = model.get_submodule(
                    name.removesuffix(end) + {"llama": "post_attention_layernorm", "gpt2": "ln_2"}[kind.removesuffix("-tied")]
                )
                norm.register_forward_pre_hook(lambda _, args, stream=stream: stream.update(x=args[0]))

            def hook(
                _module: nn.Module, args: Any, kwargs: Any, output: Any, stream: dict[str, Tensor] = stream,
                dw: Tensor = down_w, db: Tensor = down_b, uw: Tensor = up_w, ub: Tensor = up_b,
            ) -> Any:  # fmt: skip
                y = output[0] if isinstance(output, tuple) else output
                h = {"houlsby": lambda: y, "pfeiffer": lambda: stream["x"] + y, "parallel": lambda: stream["x"]}[variant]()
                new = y + scale * (act(h @ dw.t() + db) @ uw.t() + ub)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            block.register_forward_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_written_formula(variant: str, kind: str) -> None:
    model, method = helpers.adapted("adapter", kind, torch.float64, variant=variant)
    helpers.stir(model, scale=0.1)
    weights = {hf_peft.file_key(model, method, n): p.detach().clone().requires_grad_() for n, p in trainable_state(model).items()}
    other = written_out(kind, variant, weights)
    split = helpers.make_split([7, 12, 5])
    losses = [helpers.loss_of(one, split, packed=packed) for one, packed in ((model, True), (other, False))]
    for loss in losses:
        loss.backward()
    assert abs(float((losses[0] - losses[1]).detach())) <= 1e-9 * float(losses[1].detach())
    assert float((helpers.logits(model) - helpers.logits(other)).abs().max()) <= 1e-9
    assert float((helpers.logits(model) - helpers.logits(helpers.tiny_model(kind, torch.float64))).abs().max()) > 1e-2
    for name, parameter in trainable_state(model).items():
        there = weights[hf_peft.file_key(model, method, name)].grad
        assert parameter.grad is not None
        assert there is not None
        assert float((parameter.grad - there).abs().max()) <= 1e-9 * max(1.0, float(there.abs().max())), name


@pytest.mark.parametrize(
    ("options", "narrow"),
    [({}, 4), ({"reduction_factor": 8}, 8), ({"bottleneck_size": 5}, 5), ({"reduction_factor": 1000}, 1), ({"variant": "parallel"}, 32)],
)
def test_width_of_the_bottleneck(options: dict[str, Any], narrow: int) -> None:
    model, _ = helpers.adapted("adapter", **options)
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, BottleneckLayer)]
    assert {tuple(layer.adapter_down.shape) for layer in layers} == {(narrow, 64)}
    assert {tuple(layer.adapter_up.shape) for layer in layers} == {(64, narrow)}
    with pytest.raises(ValueError, match="choose one"):
        helpers.make_method("adapter", reduction_factor=4, bottleneck_size=8)


def test_options_override_the_papers_choices() -> None:
    for name, act in {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}.items():
        model, _ = helpers.adapted("adapter", non_linearity=name, scaling=2.5, dropout=0.5)
        layer = next(layer for layer in adapter_layers(model).values() if isinstance(layer, BottleneckLayer))
        helpers.stir(model)
        y = torch.randn(3, 64)
        x = torch.randn(3, layer.base.in_features)  # type: ignore[arg-type]
        y = layer.base(x)
        expected = y + 2.5 * (act(y @ layer.adapter_down.t() + layer.adapter_down_bias) @ layer.adapter_up.t() + layer.adapter_up_bias)
        assert torch.allclose(layer.eval()(x), expected, atol=1e-5)
        assert not torch.allclose(layer.train()(x), expected, atol=1e-5), "dropout acts in training"


def test_near_identity_at_the_start() -> None:
    base = helpers.logits(helpers.tiny_model())
    near = helpers.logits(helpers.adapted("adapter", init_weights="near_identity")[0])
    assert not torch.equal(near, base)
    assert float((near - base).abs().max()) < 0.01 * float(base.abs().max())
    state = trainable_state(helpers.adapted("adapter", init_weights="near_identity")[0])
    for name, parameter in state.items():
        assert float(parameter.detach().abs().max()) <= 2e-2
        assert bool(parameter.any()) != name.endswith("_bias")


def tiny(family: str) -> Any:
    if family == "bert":
        return BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("family", "variant", "expected"),
    [
        ("bert", "houlsby", ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"]),
        ("bert", "pfeiffer", ["encoder.layer.0.output.LayerNorm"]),
        ("bert", "parallel", ["encoder.layer.0.output"]),
        ("t5", "pfeiffer", ["encoder.block.0.layer.1", "decoder.block.0.layer.2"]),
        ("t5", "parallel", ["encoder.block.0.layer.1", "decoder.block.0.layer.2"]),
    ],
)
def test_places_in_other_families(family: str, variant: str, expected: list[str]) -> None:
    model = helpers.make_method("adapter", variant=variant, bottleneck_size=3).apply(tiny(family).eval(), Context())
    assert list(adapter_layers(model)) == expected
    ids = torch.randint(0, 40, (2, 5))
    inputs = {"input_ids": ids} if family == "bert" else {"input_ids": ids, "decoder_input_ids": ids}
    base = tiny(family).eval()
    base.load_state_dict({key.replace(".base.", "."): t for key, t in model.state_dict().items() if ".adapter_" not in key})
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], base(**inputs)[0])


def test_faults() -> None:
    with pytest.raises(UsageError, match="no known names"):
        helpers.make_method("adapter").apply(nn.Sequential(nn.Linear(4, 4)), Context())
    with pytest.raises(UsageError, match="near: o_proj"):
        helpers.adapted("adapter", target_modules=["o_porj"])
    with pytest.raises(UsageError, match=r"method\.target_modules: no module is called 'mpl'"):
        helpers.adapted("adapter", variant="parallel", target_modules=["mpl"])
    with pytest.raises(UsageError, match="holds no linear layer"):
        helpers.adapted("adapter", variant="parallel", target_modules=["input_layernorm"])


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_and_its_names(variant: str, quantization: str | None, tmp_path: Path) -> None:
    options = {
        "variant": variant,
        "bottleneck_size": 3,
        "exclude_modules": ["0.mlp.down_proj" if variant == "houlsby" else "layers.0.mlp"],
    }
    for turn in ("one", "two"):
        model, method = helpers.adapted("adapter", quantization=quantization, **options)
        helpers.stir(model)
        hf_peft.save_adapter(tmp_path / turn, model, method, base_model="some/base", revision=None)
    assert helpers.folder_bytes(tmp_path / "one") == helpers.folder_bytes(tmp_path / "two")
    places = sorted(name for name, layer in adapter_layers(model).items() if isinstance(layer, BottleneckLayer))
    keys = {f"base_model.model.{place}.adapter_{part}.{kind}" for place in places for part in ("down", "up") for kind in ("weight", "bias")}
    assert set(load_file(tmp_path / "one" / hf_peft.WEIGHTS)) == keys
    fields = json.loads((tmp_path / "one" / hf_peft.CONFIG).read_text(encoding="utf-8"))
    assert fields["peft_type"] == "PEFTCLI_ADAPTER"
    assert fields["target_modules"] == places
    again = hf_peft.apply_adapter(helpers.tiny_model(quantization=quantization), hf_peft.read_adapter(tmp_path / "one"), Context())
    assert torch.equal(helpers.logits(again), helpers.logits(model))


def test_merging_is_refused_with_the_reason(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    from peftcli.commands import merge
    from peftcli.recipe.load import parse_recipe

    model, method = helpers.adapted("adapter")
    recipe = parse_recipe(helpers.recipe_for(tiny_folders["llama"], tmp_path, tmp_path, method="adapter"), "r.yaml").recipe

    saved = helpers.save_result(tmp_path, model, method, recipe)
    with pytest.raises(UsageError, match=r"adapter cannot be folded into the base: .*non-linearity"):
        merge.run(saved, tmp_path / "merged", dtype=None, base_model=None, overwrite=False, json=False, trust_remote_code=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(variant: str) -> None:
    found = []
    for checkpointed in (False, True):
        model, _ = helpers.adapted("adapter", variant=variant, dtype=torch.float64)
        helpers.stir(model)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        helpers.loss_of(model, helpers.make_split([7, 12, 5])).backward()
        found.append(helpers.gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
