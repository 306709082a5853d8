"""Frozen products in 8 bits: the rounding, the products beside their plain reference, what they cost in loss, and who is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import helpers
import pytest
import torch
from torch import Tensor, nn

from peftcli.errors import RecipeError, UsageError
from peftcli.forecast import forecast
from peftcli.kernels import eight_bit, fast, native
from peftcli.kernels.eight_bit import EightBit, EightBitLinear, Float8, Int8, evening, reference_multiply, reference_quantize, unfit
from peftcli.model.eight_bit import multiply_in_8_bits
from peftcli.recipe.load import parse_recipe

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
KINDS = {"fp8": Float8, "int8": Int8}
# Relative error that rounding both sides of a product leaves: 2**-4 at most for each number of e4m3, 1/254 of the row's largest in int8.
ERROR = {"fp8": 0.045, "int8": 0.015}
NAME = "frozen products in 8 bits"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def look(model: Any) -> None:
    model(input_ids=torch.arange(40)[None])


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_rounding_is_to_the_nearest_and_each_row_uses_the_whole_range(dtype: torch.dtype) -> None:
    rows, factors = draw(6, 40) * torch.tensor([[1e-6], [1e-3], [1.0], [1e3], [1e6], [0.0]]).bfloat16(), torch.rand(40) + 0.5
    for by in (None, factors):
        codes, scales = reference_quantize(rows, by, dtype)
        wide = rows.double() if by is None else rows.double() * by.double()
        back = codes.double() * scales.double().unsqueeze(1)
        top = wide.abs().amax(1, keepdim=True)
        step = top / 254 if dtype == torch.int8 else torch.maximum(wide.abs() / 16, top / 448 * 2.0**-10)
        assert bool(((back - wide).abs() <= step * (1 + 1e-5)).all())
        assert codes[:5].float().abs().amax(1).tolist() == [448.0 if dtype == torch.float8_e4m3fn else 127.0] * 5
        assert codes[5].float().abs().max() == 0
        assert bool(torch.isfinite(scales).all())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(dtype: torch.dtype, broken: float) -> None:
    product = eight_bit.KINDS["int8" if dtype == torch.int8 else "fp8"](draw(32, 16))
    rows = draw(20, 16)
    rows[3, 5] = broken
    for out in (product.times(rows, None), product.back(torch.cat([rows, rows], 1))):
        assert not bool(torch.isfinite(out[3]).any())
        assert bool(torch.isfinite(out[[0, 1, 2, 4]]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_equal_the_plain_reference_and_are_near_the_dense_ones(kind: str) -> None:
    weight, rows, grad, bias = draw(48, 64, seed=1), draw(40, 64, seed=2), draw(40, 48, seed=3), draw(48, seed=4)
    product = KINDS[kind](weight)
    found = []
    for plain in (False, True):
        fast.switch(on=not plain)
        try:
            found.append((product.times(rows, None), product.back(grad), product.times(rows, bias)))
            assert (NAME in fast.taken()) is not plain
        finally:
            fast.switch(on=True)
    for ours, reference in zip(*found, strict=True):
        assert error(ours, reference) <= 4e-3  # both end in bfloat16
    exact = rows.double() @ weight.double().t(), grad.double() @ weight.double()
    for ours, wanted in zip(found[0], (*exact, exact[0] + bias.double()), strict=True):
        assert 1e-3 < error(ours, wanted) <= ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_depends_on_those_beside_it(kind: str) -> None:
    product, rows = KINDS[kind](draw(48, 64, seed=1)), draw(40, 64, seed=2)
    apart = [product.times(rows[i : i + 20], None) for i in (0, 20)]
    rows[25] *= 1000
    together = product.times(rows, None)
    assert error(together[:20], apart[0]) <= 4e-3
    assert error(together[26:], apart[1][6:]) <= 4e-3


def test_columns_that_stand_out_are_evened_out_in_the_forward_product() -> None:
    weight, rows, grad = draw(48, 64, seed=1), draw(40, 64, seed=2), draw(40, 48, seed=3)
    rows[:, [5, 40]] *= 100
    product, plain = Int8(weight), Int8(weight)
    product.settle(weight, evening(rows.float().abs().amax(0)))
    exact = rows.double() @ weight.double().t()
    for on in (True, False):
        with contextlib.nullcontext() if on else fast.plain():
            before, after = (error(each.times(rows, None), exact) for each in (plain, product))
            assert after < 0.5 * before, (before, after)
            assert torch.equal(product.back(grad), plain.back(grad))
    # Layers of one input share the factors, and so its rounding; another's are not taken for them.
    EightBit.last = None
    assert not torch.equal(plain.times(rows, None), product.times(rows, None))
    assert torch.equal(product.times(rows, None), product.times(rows.clone(), None))
    assert bool(torch.isfinite(evening(torch.zeros(8))).all())


@pytest.mark.parametrize("kind", KINDS)
def test_added_onto_what_is_there(kind: str) -> None:
    product, grad, there = KINDS[kind](draw(48, 64, seed=1)), draw(40, 48, seed=3), draw(40, 64, seed=4)
    for on in (True, False):
        with contextlib.nullcontext() if on else fast.plain():
            onto = there.clone()
            assert product.back(grad, onto=onto) is onto
            assert error(onto, there.double() + product.back(grad).double()) <= 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_round_it_once_and_never_use_what_it_was_before(kind: str) -> None:
    one, two, rows = KINDS[kind](draw(48, 64, seed=1)), KINDS[kind](draw(16, 64, seed=5)), draw(40, 64, seed=2)
    with mock.patch.object(KINDS[kind], "_quantize", autospec=True, side_effect=KINDS[kind]._quantize) as rounded:
        one.times(rows, None)
        before = two.times(rows, None)
        assert rounded.call_count == 1
        rows[3] *= 2
        after = two.times(rows, None)
        assert rounded.call_count == 2
        assert torch.equal(two.times(rows.clone(), None), after)
        assert rounded.call_count == 3
    assert torch.equal(after[3], before[3] * 2)


def test_compiled_rounding_equals_the_plain_one_to_the_last_bit() -> None:
    rows, factors = draw(33, 70) * draw(33, 1, seed=1), torch.rand(70) + 0.5
    if not native.usable(rows):
        return  # no compiler: nothing to compare
    product = Int8(draw(16, 16))
    for by in (None, factors):
        codes, scales = product._quantize(rows, by)
        reference, wanted = reference_quantize(rows, by, torch.int8)
        assert torch.equal(codes, reference)
        assert torch.equal(scales, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer(kind: str) -> None:
    """In training 8 bits, in evaluation and in other dtypes the dense layer; the low-rank update goes on top of either."""
    linear = nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    layer, x = EightBitLinear(linear, kind), draw(2, 20, 64, seed=2).requires_grad_()
    assert layer.weight is linear.weight
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    dense = linear(x)
    layer.train()
    out = layer(x)
    assert 1e-3 < error(out.detach(), dense.detach()) <= ERROR[kind]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not kept, "nothing is kept for the way back"
    weight = draw(2, 20, 48, seed=3)
    (gradient,) = torch.autograd.grad(out, x, weight)
    assert error(gradient, torch.autograd.grad(dense, x, weight)[0]) <= ERROR[kind]
    with torch.no_grad():
        assert torch.equal(layer(x), dense)
    assert torch.equal(layer.eval()(x), dense)
    with mock.patch.dict(eight_bit._WORTHWHILE, cpu=1 << 40):
        assert torch.equal(layer.train()(x), dense), "too little work to gain"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix_tuning", "adalora", "vera"])
def test_every_method_takes_it_through_the_interface(method: str, kind: str) -> None:
    split, found = helpers.make_split([16, 21, 19]), []
    for eight in (False, True):
        options = {"num_virtual_tokens": 3} if method == "prefix_tuning" else {}
        model, _ = helpers.adapted(method, dtype=torch.bfloat16, **options)
        helpers.stir(model)
        model.train()
        fast.switch(on=True)
        if eight:
            assert multiply_in_8_bits(model, kind, look) == 14
            assert type(model.get_output_embeddings()) is nn.Linear
        loss = helpers.loss_of(model, split)
        loss.backward()
        assert (NAME in fast.taken()) is eight
        assert torch.isfinite(loss)
        found.append((float(loss.detach()), helpers.gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    for key, gradient in found[0][1].items():
        close = torch.nn.functional.cosine_similarity(gradient.flatten().float(), found[1][1][key].flatten().float(), dim=0)
        assert float(close) >= 0.9, key


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_where_it_ends_in_bfloat16(kind: str, tmp_path: Path) -> None:
    losses = {}
    for name in ("bfloat16", kind):
        model, method = helpers.adapted("lora", dtype=torch.bfloat16, rank=4, target_modules="all-linear")
        if name == kind:
            multiply_in_8_bits(model, kind, look)
        seen: list[float] = []
        loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path / name, steps=20, batch_size=8, logging_steps=1)
        loop.display.step = lambda record, seen=seen: seen.append(record["loss"])  # type: ignore[method-assign]
        loop.run()
        losses[name] = seen
    assert losses["bfloat16"][-1] < 0.5 * losses["bfloat16"][0]
    gap = [abs(a - b) for a, b in zip(losses["bfloat16"], losses[kind], strict=True)]
    assert max(gap) <= 0.03 * losses["bfloat16"][0]


@pytest.mark.parametrize("kind", ["fp8", *(() if unfit("int8", torch.device("cpu")) else ("int8",))])
def test_a_run_from_a_recipe(kind: str, tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")
    report = helpers.run(text, "base_model.dtype=bfloat16", f"train.frozen_products={kind}")
    assert NAME in report.train.fast_paths
    assert report.status == "completed"  # the saved adapter gives the loss of the trained one, both over the dense base
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert record["loss"] > 0


def test_the_memory_estimate_knows_the_copies(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")
    weights = {}
    for kind in ("null", "int8", "fp8"):
        loaded = parse_recipe(text, "recipe.yaml", ["base_model.dtype=bfloat16", f"train.frozen_products={kind}"])
        weights[kind] = forecast(loaded).need(loaded.recipe).weights
    linear = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert weights["int8"] - weights["null"] == 2 * linear
    assert weights["fp8"] - weights["null"] == 2 * linear


def test_refusals(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")
    with pytest.raises(UsageError, match="bfloat16; this one is in float32"):
        helpers.run(text, "train.frozen_products=fp8")
    with pytest.raises(RecipeError, match="dense weights; these are quantized"):
        parse_recipe(text, "recipe.yaml", ["train.frozen_products=fp8", "base_model.quantization=nf4"])
    model, _ = helpers.adapted("full", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="no frozen linear layer"):
        multiply_in_8_bits(model, "fp8", look)
    device: Any = mock.Mock(type="cuda")
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)):
        with mock.patch.multiple(torch.cuda, get_device_capability=lambda _, c=capability: c, get_device_name=lambda _: "a GPU"):
            reason = unfit("fp8", device)
        assert (reason is not None) is refused
        assert reason is None or f"compute capability is 8.{capability[1]}, 8.9 is needed" in reason
    assert unfit("int8", device) is not None
    with mock.patch.object(torch.cpu, "_is_vnni_supported", lambda: False):
        assert "no instructions" in (unfit("int8", torch.device("cpu")) or "")


def test_integers_on_the_way_back_only_leave_the_loss_as_it_is() -> None:
    split, found = helpers.make_split([16, 21, 19]), {}
    for kind in (None, "int8_backward", "int8"):
        model, _ = helpers.adapted("lora", dtype=torch.bfloat16, target_modules="all-linear")
        helpers.stir(model)
        model.train()
        if kind is not None:
            multiply_in_8_bits(model, kind, look)
        loss = helpers.loss_of(model, split)
        loss.backward()
        found[kind] = float(loss.detach()), torch.cat([g.flatten() for g in helpers.gradients(model).values()])
    assert found["int8_backward"][0] == found[None][0]
    cosines = {
        kind: float(torch.nn.functional.cosine_similarity(found[kind][1], found[None][1], dim=0)) for kind in ("int8", "int8_backward")
    }
    assert 0.999 <= cosines["int8_backward"] < 1.0
    assert cosines["int8"] < cosines["int8_backward"]


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("shape", [(4096, 4096, 4096), (1000, 2048, 512)])
def test_on_a_gpu_the_product_equals_the_plain_reference(shape: tuple[int, int, int]) -> None:
    if unfit("fp8", torch.device("cuda")):
        pytest.skip("no FP8 on this GPU")
    n, k, m = shape
    weight, rows, grad = draw(m, k, seed=1).cuda(), draw(n, k, seed=2).cuda(), draw(n, m, seed=3).cuda()
    product = Float8(weight)
    fast.switch(on=True)
    for ours, turned, by, given in (
        (product.times(rows, None), product.codes, product.scales, (rows, None)),
        (product.back(grad), product.codes.t(), None, (grad, product.scales)),
    ):
        codes, scales = reference_quantize(*given, torch.float8_e4m3fn)
        assert error(ours, reference_multiply(codes, scales, turned, by, torch.bfloat16)) <= 4e-3
