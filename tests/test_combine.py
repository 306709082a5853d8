"""Combined adapters: the rules against stock PEFT's and against written-out ones, and the combination against the sum of what each
adapter does to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from adapter_cases import base_of, write
from peft.utils import merge_utils
from torch import Tensor

from peftcli.adapters import Adapters
from peftcli.combine import Rule, combinations, combine, dropped, low_rank, ties, trimmed, truncated
from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.interchange.low_rank import apply_factors
from peftcli.merge import logits_of, merge, parity
from peftcli.methods import registry
from peftcli.methods.base import Context

MERGEABLE = [n for n in registry.names() if registry.get(n).caps.mergeable and n not in ("qlora", "full")]
CPU = torch.device("cpu")


def rows() -> list[Any]:
    return [row.numpy() for row in helpers.some_ids(6, 30)]


def some(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def adapters_of(
    tmp_path: Path, methods: dict[str, str], kind: str = "llama", dtype: torch.dtype = torch.float32, quantization: str | None = None
) -> Adapters:
    """Named adapters of tiny models with random weights."""
    adapters = Adapters(base_of(helpers.tiny_model(kind, dtype, quantization).requires_grad_(False), quantization))
    for seed, (name, method) in enumerate(methods.items()):
        adapters.add(name, write(tmp_path / name, method, kind, seed, quantization))
    return adapters


def lora_file(folder: Path, seed: int, kind: str = "llama", **options: Any) -> hf_peft.AdapterFile:
    model, method = helpers.adapted("lora", kind, **options)
    helpers.stir(model, seed=seed, scale=0.2)
    hf_peft.save_adapter(folder, model, method, base_model="base", revision=None)
    return hf_peft.read_adapter(folder)


TWO: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    {"rank": 6, "alpha": 6, "target_modules": ["q_proj", "v_proj"]},
]


def two_loras(tmp_path: Path) -> Adapters:
    adapters = Adapters(base_of(helpers.tiny_model("llama").requires_grad_(False)))
    for seed, options in enumerate(TWO):
        adapters.add("ab"[seed], lora_file(tmp_path / "ab"[seed], seed, **options))
    return adapters


def stock(tmp_path: Path, rule: str, weights: list[float], **options: Any) -> Any:
    """The same two adapters, combined by stock PEFT."""
    model = peft.PeftModel.from_pretrained(helpers.tiny_model("llama"), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "c", combination_type=rule, **options)
    model.set_adapter("c")
    return model


def stock_deltas(model: Any) -> dict[str, Tensor]:
    from peft.tuners.lora import LoraLayer

    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer) and "c" in m.lora_A}
    return {name: layer.get_delta_weight("c").detach() for name, layer in layers.items()}


def test_linear_as_an_adapter_is_peft_s_cat_to_the_bit(tmp_path: Path) -> None:
    adapters = two_loras(tmp_path)
    theirs = stock(tmp_path, "cat", [0.7, -0.3])
    found = low_rank(combine(adapters, [0.7, -0.3], Rule("linear")), None, exact=True)
    assert found.exact
    assert len(found.factors) == 6
    for name, (narrow, wide) in found.factors.items():
        layer = theirs.base_model.model.get_submodule(name)
        rank = narrow.shape[0]
        assert torch.equal(layer.lora_A["c"].weight[:rank], narrow)
        assert torch.equal(layer.lora_B["c"].weight[:, :rank], wide)
        assert not layer.lora_B["c"].weight[:, rank:].any()
    # And stock PEFT loads what we write, and computes what it computes with its own.
    model, method = apply_factors(adapters.use(None), found.factors, quantized=False)
    hf_peft.save_adapter(tmp_path / "c", model, method, base_model="base", revision=None)
    again = peft.PeftModel.from_pretrained(helpers.tiny_model("llama"), tmp_path / "c").eval()
    assert helpers.same(helpers.logits(again), helpers.logits(theirs))
    assert helpers.same(helpers.logits(again), helpers.logits(model))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (Rule("linear"), "svd", {}),
        (Rule("ties", density=0.4), "ties_svd", {"density": 0.4}),
        (Rule("ties", density=1.0), "ties_svd", {"density": 1.0}),
        (Rule("dare", density=1.0), "dare_linear_svd", {"density": 1.0}),
    ],
    ids=["svd", "ties", "ties of all entries", "dare of all entries"],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_the_rules_cut_to_a_rank_are_peft_s(ours: Rule, theirs: str, options: dict[str, Any], tmp_path: Path) -> None:
    adapters = two_loras(tmp_path)
    reference = stock_deltas(stock(tmp_path, theirs, [0.7, 0.5], svd_rank=5, **options))
    found = low_rank(combine(adapters, [0.7, 0.5], ours), 5, exact=False)
    assert found.factors.keys() == reference.keys()
    for name, (narrow, wide) in found.factors.items():
        assert narrow.shape[0] <= 5  # a layer that one of them leaves alone may need less
        assert float((wide @ narrow - reference[name]).abs().max()) < 1e-5 * float(reference[name].abs().max())


def test_peft_s_linear_is_another_rule(tmp_path: Path) -> None:
    """It takes sqrt(weight) of A and of B, so the sum has products of one adapter's A with the other's B."""
    options = {"rank": 4, "alpha": 8, "target_modules": ["q_proj"]}
    adapters = Adapters(base_of(helpers.tiny_model("llama").requires_grad_(False)))
    for seed, name in enumerate("ab"):
        adapters.add(name, lora_file(tmp_path / name, seed, **options))
    theirs = stock_deltas(stock(tmp_path, "linear", [0.5, 0.5]))
    for name, (narrow, wide) in low_rank(combine(adapters, [0.5, 0.5], Rule("linear")), None, exact=True).factors.items():
        assert float((wide @ narrow - theirs[name]).norm() / theirs[name].norm()) > 0.3


def test_ties_by_hand() -> None:
    one = torch.tensor([4.0, -3.0, 0.5, 2.0, -1.0])
    two = torch.tensor([-1.0, -5.0, 3.0, 2.0, 0.25])
    kept = [trimmed(delta, 0.6) for delta in (one, two)]
    assert kept[0].tolist() == [4.0, -3.0, 0.0, 2.0, 0.0]
    assert kept[1].tolist() == [0.0, -5.0, 3.0, 2.0, 0.0]
    assert ties(kept, [1.0, 1.0]).tolist() == [4.0, -4.0, 3.0, 2.0, 0.0]
    # A place with both signs goes to the heavier one, and the mean is of those that agree.
    assert ties([torch.tensor([4.0]), torch.tensor([-1.0]), torch.tensor([2.0])], [1.0, 1.0, 0.5]).tolist() == [2.5]


@pytest.mark.parametrize("density", [0.1, 0.37, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_is_peft_s(density: float) -> None:
    deltas = some(3, 13, 17)
    reference = merge_utils.ties(deltas, torch.tensor([0.5, 1.5, -0.3]), density)
    assert torch.allclose(Rule("ties", density)(dict(enumerate(deltas)), [0.5, 1.5, -0.3], "w"), reference, atol=1e-6)


def test_dare_with_the_same_masks_is_peft_s(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, weights = some(3, 13, 17), [0.5, 1.5, -0.3]
    rule = Rule("dare", density=0.3, seed=7)
    ours = rule(dict(enumerate(deltas)), weights, "w")
    masks = iter([rule({i: torch.ones(13, 17)}, [1.0] * 3, "w") > 0 for i in range(3)])
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda p: next(masks).to(p))
    assert torch.allclose(merge_utils.dare_linear(deltas, torch.tensor(weights), 0.3), ours, atol=1e-6)


def test_dare_keeps_a_share_and_the_mean() -> None:
    delta = torch.ones(400, 500)
    kept = dropped(delta, 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    # 200,000 draws: the share's standard deviation is 0.001.
    assert abs(float((kept > 0).double().mean()) - 0.25) < 5e-3
    assert abs(float(kept.mean()) - 1.0) < 2e-2


def test_dare_depends_on_seed_tensor_and_place_alone() -> None:
    deltas = dict(enumerate(some(2, 20, 20)))
    first = Rule("dare", 0.5, seed=1)(deltas, [1.0, 1.0], "w")
    torch.manual_seed(99)
    assert torch.equal(first, Rule("dare", 0.5, seed=1)(deltas, [1.0, 1.0], "w"))
    assert not torch.equal(first, Rule("dare", 0.5, seed=2)(deltas, [1.0, 1.0], "w"))
    assert not torch.equal(first, Rule("dare", 0.5, seed=1)(deltas, [1.0, 1.0], "v"))
    alone = Rule("dare", 0.5, seed=1)({1: deltas[1]}, [1.0, 1.0], "w")
    both = Rule("dare", 0.5, seed=1)({0: torch.zeros(20, 20), 1: deltas[1]}, [1.0, 1.0], "w")
    assert torch.equal(alone, both), "another adapter's presence changes no mask"


@pytest.mark.parametrize("rank", [1, 3, 5, 40])
def test_the_best_approximation(rank: int) -> None:
    narrow, wide = some(1, 5, 30)[0], some(1, 20, 5)[0]
    product = wide @ narrow
    values = torch.linalg.svdvals(product.double())
    for found in (truncated(product, rank), truncated((narrow, wide), rank)):
        left = (product - found.wide @ found.narrow).double().square().sum()
        assert float(left) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-3)
        assert found.lost == pytest.approx(float(left), rel=1e-3, abs=1e-3)
        assert found.energy == pytest.approx(float(product.double().square().sum()), rel=1e-5)


def effective(model: Any) -> dict[str, Tensor]:
    """Every weight of a merged model by name, an untied output layer's too."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["lm_head.weight"] = model.lm_head.weight.detach().clone()
    return weights


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_all_methods_at_once_are_the_sum_of_their_deltas(kind: str, tmp_path: Path) -> None:
    """Independent of the combination: each adapter is merged by itself, and the weights are subtracted."""
    methods = {}
    for name in MERGEABLE:
        try:
            helpers.adapted(name, kind)
            methods[name] = name
        except UsageError:  # bitfit in a model without biases
            assert (name, kind) == ("bitfit", "llama-tied")
    weights = [0.3 - 0.05 * i for i in range(len(methods))]
    adapters = adapters_of(tmp_path, methods, kind)
    plain = effective(helpers.tiny_model(kind))
    total = {key: tensor.double() for key, tensor in plain.items()}
    for weight, name in zip(weights, methods, strict=True):
        alone = merge(hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / name)))
        for key, tensor in effective(alone).items():
            total[key] += weight * (tensor.double() - plain[key].double())
    model = combine(adapters, weights, Rule("linear"))
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)  # from the adapters' own forward passes
    merged = merge(model)
    found = effective(merged)
    assert found.keys() == total.keys()
    assert max(float((found[key].double() - total[key]).abs().max()) for key in total) < 2e-6
    assert parity(before, logits_of(helpers.CAUSAL_LM, merged, rows(), CPU), exact=True).passed
    assert float((helpers.logits(merged) - helpers.logits(helpers.tiny_model(kind))).abs().max()) > 1e-2
    assert not merged.config.tie_word_embeddings, "head_only and freeze move the output layer alone"


def test_tied_stays_tied_where_both_ends_change_alike(tmp_path: Path) -> None:
    adapters = Adapters(base_of(helpers.tiny_model("llama-tied").requires_grad_(False)))
    for seed, name in enumerate("ab"):
        other = helpers.tiny_model("llama-tied")
        helpers.stir(other.requires_grad_(True), seed=seed)
        adapters.add(name, other, method=helpers.make_method("full"))
    for rule in (Rule("linear"), Rule("dare", 0.5), Rule("ties", 0.5)):
        merged = merge(combine(adapters, [0.5, 0.5], rule))
        assert merged.config.tie_word_embeddings
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        adapters.use(None)


def test_whole_models_are_task_arithmetic(tmp_path: Path) -> None:
    base, tuned = helpers.tiny_model("gpt2"), helpers.tiny_model("gpt2")
    helpers.stir(tuned.requires_grad_(True))
    adapters = Adapters(base_of(helpers.tiny_model("gpt2").requires_grad_(False)))
    adapters.add("full", tuned, method=helpers.make_method("full"))
    adapters.add("lora", write(tmp_path / "lora", "ia3", "gpt2", 1))
    merged = merge(combine(adapters, [0.5, 0.0], Rule("linear")))
    for (name, one), two, both in zip(base.named_parameters(), tuned.parameters(), merged.parameters(), strict=True):
        assert torch.allclose(both, (one + two) / 2, atol=1e-6), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_a_quantized_base_the_sum_goes_into_the_dequantized_one(quantization: str, tmp_path: Path) -> None:
    methods = {name: name for name in ("lora", "lokr", "ia3", "bitfit")}
    adapters = adapters_of(tmp_path, methods, "gpt2", quantization=quantization)
    model = combine(adapters, [0.4, 0.3, 0.2, 0.5], Rule("linear"))
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    merged = merge(model)
    found = parity(before, logits_of(helpers.CAUSAL_LM, merged, rows(), CPU), exact=False)
    assert found.kl <= (1e-6 if quantization == "nf4" else 5e-3), found
    assert not any("bitsandbytes" in type(module).__module__ for module in merged.modules())


@pytest.mark.parametrize("rule", [Rule("linear"), Rule("ties", 0.3), Rule("dare", 0.3), Rule("svd", rank=2)], ids=lambda rule: rule.name)
def test_merging_leaves_the_adapters_as_they_are(rule: Rule, tmp_path: Path) -> None:
    adapters = adapters_of(tmp_path, {"a": "lokr", "b": "loha"}, dtype=torch.bfloat16)
    before = {name: helpers.logits(adapters.use(name)) for name in (None, "a", "b")}
    first = helpers.logits(merge(combine(adapters, [0.6, 0.4], rule)))
    for name, expected in before.items():
        assert torch.equal(helpers.logits(adapters.use(name)), expected)
    assert torch.equal(helpers.logits(merge(combine(adapters, [0.6, 0.4], rule))), first), "the same again"


def test_svd_without_a_rank_takes_the_largest(tmp_path: Path) -> None:
    adapters = two_loras(tmp_path)
    model = combine(adapters, [1.0, 1.0], Rule("svd"))
    assert {layer.rule.rank for layer in combinations(model).values()} == {6}
    base = helpers.tiny_model("llama")
    merged = merge(model)
    ranks = {
        n: int(torch.linalg.matrix_rank(merged.get_submodule(n).weight - base.get_submodule(n).weight, rtol=1e-4))
        for n in combinations_of(TWO)
    }
    assert ranks == {name: 4 if "down" in name else 6 for name in ranks}
    adapters.use(None)
    mixed = adapters_of(tmp_path / "mixed", {"a": "lora", "b": "lokr"})
    with pytest.raises(UsageError, match="no rank to go by"):
        combine(mixed, [1.0, 1.0], Rule("svd"))


def combinations_of(options: list[dict[str, Any]]) -> list[str]:
    ends = {end for option in options for end in option["target_modules"]}
    return [name for name, _ in helpers.tiny_model("llama").named_modules() if name.rpartition(".")[2] in ends]


def test_a_mixture_cut_to_a_rank_says_what_it_loses(tmp_path: Path) -> None:
    adapters = adapters_of(tmp_path, {"a": "lora", "b": "lokr", "c": "vera"})
    model = combine(adapters, [0.5, 1.0, 1.0], Rule("linear"))
    whole = low_rank(model, 64, exact=False)
    assert whole.discarded < 1e-9
    assert not whole.exact
    cut = low_rank(model, 4, exact=True)
    assert not cut.exact, "a LoKr is no product of two thin factors"
    assert 0.05 < cut.discarded < cut.worst < 1.0
    assert cut.worst_layer in cut.factors
    expected = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    tuned, _ = apply_factors(adapters.use(None), whole.factors, quantized=False)
    assert parity(expected, logits_of(helpers.CAUSAL_LM, tuned, rows(), CPU), exact=True).passed


@pytest.mark.parametrize("method", ["lora", "ia3", "head_only", "freeze", "adalora", "delta_lora"])
def test_one_adapter_with_weight_one_is_itself(method: str, tmp_path: Path) -> None:
    adapters = adapters_of(tmp_path, {"a": method})
    expected = logits_of(helpers.CAUSAL_LM, adapters.use("a"), rows(), CPU)
    model = combine(adapters, [1.0], Rule("linear"))
    assert parity(expected, logits_of(helpers.CAUSAL_LM, model, rows(), CPU), exact=True).passed
    assert parity(expected, logits_of(helpers.CAUSAL_LM, merge(model), rows(), CPU), exact=True).passed


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_variants_of_lora(options: dict[str, Any], tmp_path: Path) -> None:
    adapters = Adapters(base_of(helpers.tiny_model("gpt2").requires_grad_(False)))
    for seed, name in enumerate("ab"):
        adapters.add(name, lora_file(tmp_path / name, seed, "gpt2", rank=4, **options))
    model = combine(adapters, [0.7, 0.3], Rule("linear"))
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    additive = "use_dora" not in options and "bias" not in options
    if additive:
        assert low_rank(model, None, exact=True).exact
    elif "bias" in options:
        with pytest.raises(UsageError, match=r"changes, and an adapter's file holds"):
            low_rank(model, 8, exact=True)
    else:
        assert not low_rank(model, 8, exact=True).exact
    merged = merge(model)
    assert parity(before, logits_of(helpers.CAUSAL_LM, merged, rows(), CPU), exact=True).passed
    plain, total = effective(helpers.tiny_model("gpt2")), effective(helpers.tiny_model("gpt2"))
    for weight, name in ((0.7, "a"), (0.3, "b")):
        alone = effective(merge(hf_peft.apply_adapter(helpers.tiny_model("gpt2"), hf_peft.read_adapter(tmp_path / name))))
        total = {key: value + weight * (alone[key] - plain[key]) for key, value in total.items()}
    assert max(float((value - total[key]).abs().max()) for key, value in effective(merged).items()) < 1e-5


def test_new_tokens_are_averaged_over_one_vocabulary(tmp_path: Path) -> None:
    adapters = Adapters(base_of(helpers.tiny_model("llama-tied").requires_grad_(False)))
    for seed, name in enumerate("ab"):
        adapters.add(name, write(tmp_path / name, "ia3", "llama-tied", seed, new_ids=(261, 262)))
    deltas = {}
    for name in "ab":
        model = adapters.use(name)
        deltas[name] = model.get_input_embeddings().trainable_tokens_delta.detach().clone()
    merged = merge(combine(adapters, [0.25, 0.75], Rule("linear")))
    rows_now = merged.get_input_embeddings().weight[[261, 262]]
    assert torch.allclose(rows_now, 0.25 * deltas["a"] + 0.75 * deltas["b"], atol=1e-6)
    assert merged.config.tie_word_embeddings
    adapters.use(None)
    with pytest.raises(UsageError, match=r"embed_tokens .Embedding. changes"):
        low_rank(combine(adapters, [1.0, 1.0], Rule("linear")), 4, exact=True)


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    adapters = adapters_of(tmp_path, {"a": "lora", "b": "prompt_tuning"})
    with pytest.raises(UsageError, match="b is a result of prompt_tuning, which cannot be folded"):
        combine(adapters, [1.0, 1.0], Rule("linear"))
    other = Adapters(base_of(helpers.tiny_model("llama").requires_grad_(False)))
    tokenizer = helpers.tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    other.add("a", hf_peft.read_adapter(tmp_path / "a"))
    other.add("c", hf_peft.read_adapter(tmp_path / "a"), tokenizer)
    with pytest.raises(UsageError, match=r"different vocabularies .1 tokens, such as '<tool>'"):
        combine(other, [1.0, 1.0], Rule("linear"))
    huge = adapters_of(tmp_path / "huge", {"a": "lora", "b": "lora"})
    with pytest.raises(UsageError, match="not finite"):
        merge(combine(huge, [1e40, 1.0], Rule("ties", 1.0)))


def test_context_is_that_of_the_base(tmp_path: Path) -> None:
    """DoRA over NF4 takes its lengths from the dequantized weight, so its fold needs the same base."""
    adapters = Adapters(base_of(helpers.tiny_model("llama", quantization="nf4").requires_grad_(False), "nf4"))
    for seed, name in enumerate("ab"):
        method = helpers.make_method("lora", rank=4, use_dora=True)
        model = method.apply(helpers.tiny_model("llama", quantization="nf4"), Context(frozen_quantized=True))
        helpers.stir(model, seed=seed, scale=0.02)
        hf_peft.save_adapter(tmp_path / name, model, method, base_model="base", revision=None)
        adapters.add(name, hf_peft.read_adapter(tmp_path / name))
    model = combine(adapters, [0.5, 0.5], Rule("linear"))
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    assert parity(before, logits_of(helpers.CAUSAL_LM, merge(model), rows(), CPU), exact=False).kl < 1e-6
