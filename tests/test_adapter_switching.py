"""Named adapters on one base: each computes what it computes alone, and the base comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapter_cases import base_of, folder_adapter, write
from torch import Tensor

from peftcli.adapters import Adapters, names_of, open_adapters
from peftcli.errors import CheckpointError, ModelError, UsageError
from peftcli.interchange import hf_peft
from peftcli.methods import registry
from peftcli.methods.base import Context
from peftcli.quantization import is_quantized
from peftcli.result import open_result

METHODS = [name for name in registry.names() if not registry.get(name).caps.whole_model]


def bits(model: Any) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def check_all(adapters: Adapters, files: dict[str, hf_peft.AdapterFile], kind: str, dtype: torch.dtype, quantization: str | None) -> None:
    fresh = helpers.tiny_model(kind, dtype, quantization).requires_grad_(False)
    expected: dict[str | None, Tensor] = {None: helpers.logits(fresh)}
    for name, file in files.items():
        alone = hf_peft.apply_adapter(
            helpers.tiny_model(kind, dtype, quantization), file, Context(frozen_quantized=quantization is not None)
        )
        expected[name] = autocast_logits(alone)
        assert float((expected[name] - expected[None]).abs().max()) > 1e-4, "the adapter must matter"
    before = bits(fresh)
    for name in [None, *files, None, *reversed(files), *files, None]:
        assert torch.equal(autocast_logits(adapters.use(name)), expected[name]), name
        assert adapters.active == name
        if name is None:
            after = bits(adapters.model)
            assert after.keys() == before.keys()
            assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in before)
            assert not any(p.requires_grad for p in adapters.model.parameters())
            assert adapters.model.config.tie_word_embeddings == fresh.config.tie_word_embeddings
            tied = adapters.model.get_input_embeddings().weight is adapters.model.get_output_embeddings().weight
            assert tied == fresh.config.tie_word_embeddings


def autocast_logits(model: Any) -> Tensor:
    from peftcli.methods.kinds import mixes_precision

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixes_precision(model)):
        return helpers.logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_every_method_beside_all_others(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All methods on one base, prompts and trained base weights among them."""
    files = {}
    for index, name in enumerate(METHODS):
        try:
            helpers.adapted(name, kind)
        except UsageError:  # nothing to train in this kind of model
            continue
        if name != "qlora":
            files[name] = write(tmp_path / name, name, kind, seed=index)
    assert len(files) >= 13
    adapters = Adapters(base_of(helpers.tiny_model(kind, dtype).requires_grad_(False)))
    for name, file in files.items():
        adapters.add(name, file)
        assert adapters.active is None
    assert adapters.names == list(files)
    check_all(adapters, files, kind, dtype, None)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_a_quantized_base(quantization: str, tmp_path: Path) -> None:
    names = [name for name in METHODS if registry.get(name).caps.quantized_base and not (name == "qlora" and quantization == "int8")]
    kind = "gpt2"  # has biases, so bitfit has something to move
    files = {name: write(tmp_path / name, name, kind, seed=i, quantization=quantization) for i, name in enumerate(names)}
    assert "bitfit" in files
    adapters = Adapters(base_of(helpers.tiny_model(kind, quantization=quantization).requires_grad_(False), quantization))
    codes = {name: module.weight.data_ptr() for name, module in adapters.model.named_modules() if is_quantized(module)}
    for name, file in files.items():
        adapters.add(name, file)
    check_all(adapters, files, kind, torch.float32, quantization)
    if quantization == "nf4":  # bitsandbytes moves int8 codes about by itself
        now = {name: module.weight.data_ptr() for name, module in adapters.model.named_modules() if is_quantized(module)}
        assert now == codes


def test_switching_copies_no_weight(tmp_path: Path) -> None:
    model = helpers.tiny_model("llama").requires_grad_(False)
    own = {key: p.data_ptr() for key, p in model.named_parameters()}
    adapters = Adapters(base_of(model))
    for seed in (1, 2):
        adapters.add(f"a{seed}", write(tmp_path / str(seed), "ia3", "llama", seed))
    for name in ("a1", "a2", None, "a1"):
        found = {key.replace(".base.", "."): p.data_ptr() for key, p in adapters.use(name).named_parameters() if "ia3_l" not in key}
        assert found == own


def test_new_tokens_are_each_adapter_s_own(tmp_path: Path) -> None:
    files = {name: write(tmp_path / name, "lora", "llama-tied", seed, new_ids=(261, 262)) for seed, name in enumerate(("a", "b"))}
    adapters = Adapters(base_of(helpers.tiny_model("llama-tied").requires_grad_(False)))
    for name, file in files.items():
        adapters.add(name, file)
    ids = torch.tensor([[5, 261, 262, 7]])
    for name, file in [*files.items(), *files.items()]:
        alone = hf_peft.apply_adapter(helpers.tiny_model("llama-tied"), file)
        assert torch.equal(helpers.logits(adapters.use(name), ids), helpers.logits(alone, ids))


def test_an_embedding_stored_in_the_file_leaves_the_base_alone(tmp_path: Path) -> None:
    """PEFT stores resized embeddings beside an adapter; they go into the model, and out of it again."""
    from safetensors.torch import load_file, save_file

    file = write(tmp_path / "a", "ia3", "llama", 1)
    weights = load_file(file.folder / hf_peft.WEIGHTS)
    weights["base_model.model.model.embed_tokens.weight"] = torch.randn(264, 64, generator=torch.Generator().manual_seed(0))
    save_file(weights, file.folder / hf_peft.WEIGHTS)
    file = hf_peft.read_adapter(file.folder)
    adapters = Adapters(base_of(helpers.tiny_model("llama").requires_grad_(False)))
    adapters.add("a", file)
    check_all(adapters, {"a": file}, "llama", torch.float32, None)


def test_whole_models_stand_in_for_the_base() -> None:
    other = helpers.tiny_model("llama-tied")
    helpers.stir(other.requires_grad_(True))
    adapters = Adapters(base_of(helpers.tiny_model("llama-tied").requires_grad_(False)))
    adapters.add("full", other, method=helpers.make_method("full"))
    before = helpers.logits(adapters.model)
    assert torch.equal(helpers.logits(adapters.use("full")), helpers.logits(other))
    assert torch.equal(helpers.logits(adapters.use(None)), before)
    with pytest.raises(CheckpointError, match="other names or shapes"):
        adapters.add("gpt", helpers.tiny_model("gpt2"))
    assert torch.equal(helpers.logits(adapters.model), before)
    quantized = Adapters(base_of(helpers.tiny_model("llama", quantization="nf4"), "nf4"))
    with pytest.raises(UsageError, match="the base is quantized"):
        quantized.add("full", helpers.tiny_model("llama"))


def test_an_adapter_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    good = write(tmp_path / "good", "lora", "llama", 1)
    wrong = write(tmp_path / "wrong", "lora", "gpt2", 2)
    adapters = Adapters(base_of(helpers.tiny_model("llama").requires_grad_(False)))
    adapters.add("good", good)
    adapters.use("good")
    before = helpers.logits(adapters.model)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        adapters.add("wrong", wrong)
    assert adapters.names == ["good"]
    assert torch.equal(helpers.logits(adapters.model), before), "the active adapter stays the active one"
    check_all(adapters, {"good": good}, "llama", torch.float32, None)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..\\x", "é", "x" * 65, "a\n"])
def test_names_are_checked(name: str, tmp_path: Path) -> None:
    adapters = Adapters(base_of(helpers.tiny_model("llama")))
    with pytest.raises(UsageError, match="cannot be an adapter's name"):
        adapters.add(name, write(tmp_path / "x", "ia3", "llama", 1))


def test_names_are_unique_and_near_ones_are_offered(tmp_path: Path) -> None:
    file = write(tmp_path / "x", "ia3", "llama", 1)
    adapters = Adapters(base_of(helpers.tiny_model("llama")))
    with pytest.raises(UsageError, match="no adapter is called 'poet'; there are: none"):
        adapters.use("poet")
    adapters.add("x" * 64, file)
    adapters.add("poet", file)
    with pytest.raises(UsageError, match="two adapters are called 'poet'"):
        adapters.add("poet", file)
    with pytest.raises(UsageError, match="no adapter is called 'pote'") as caught:
        adapters.use("pote")
    assert caught.value.hint == "did you mean 'poet'?"


def test_names_of_folders(tmp_path: Path) -> None:
    run = tmp_path / "poet"
    (run / "adapter").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    odd = tmp_path / "two words é"
    odd.mkdir()
    assert list(names_of([run, run / "adapter", odd, tmp_path / ("y" * 80)])) == ["poet", "poet-2", "two_words__", "y" * 60]


def test_opened_together_equal_to_opened_alone(tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folders["llama"].parent)
    paths = {
        "one": folder_adapter(tmp_path / "one", tiny_folders["llama"], 1),
        "two": folder_adapter(tmp_path / "two", Path("llama"), 2),  # the same folder by another name
    }
    adapters, places = open_adapters(paths)
    assert [place.weights for place in places] == list(paths.values())
    for name, path in paths.items():
        assert torch.equal(helpers.logits(adapters.use(name)), helpers.logits(open_result(path).model))
    plain = open_result(paths["one"], with_adapter=False)
    assert torch.equal(helpers.logits(adapters.use(None)), helpers.logits(plain.model))


def test_other_bases_are_refused(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    one = folder_adapter(tmp_path / "one", tiny_folders["llama"], 1)
    other = folder_adapter(tmp_path / "other", tiny_folders["llama-tied"], 2)
    with pytest.raises(UsageError, match=r"different bases: one is for .*llama, other is for .*llama-tied") as caught:
        open_adapters({"one": one, "other": other})
    assert caught.value.hint is not None
    assert "--base-model" in caught.value.hint
    pinned = folder_adapter(tmp_path / "pinned", tiny_folders["llama"], 3, revision="abc")
    with pytest.raises(UsageError, match=r"pinned is for .*llama at abc"):
        open_adapters({"one": one, "pinned": pinned})
    adapters, _ = open_adapters({"one": one, "pinned": pinned}, base_model=str(tiny_folders["llama"]))
    assert adapters.names == ["one", "pinned"]
    gone = folder_adapter(tmp_path / "gone", tmp_path / "nowhere", 4)
    with pytest.raises(ModelError, match="nowhere"):
        open_adapters({"one": one, "gone": gone})


def test_a_copy_of_the_base_is_the_base(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    copy = helpers.save_folder(tmp_path / "copy", "llama")
    paths = {"a": folder_adapter(tmp_path / "a", tiny_folders["llama"], 1), "b": folder_adapter(tmp_path / "b", copy, 2)}
    assert open_adapters(paths)[0].names == ["a", "b"]


def test_a_longer_vocabulary_is_refused(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    one = folder_adapter(tmp_path / "one", tiny_folders["llama"], 1)
    more = folder_adapter(tmp_path / "more", tiny_folders["llama"], 2)
    tokenizer = helpers.tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(10)])
    tokenizer.save_pretrained(more)
    with pytest.raises(UsageError, match="different vocabularies .one: 260 tokens, more: 270 tokens"):
        open_adapters({"one": one, "more": more})


def test_a_whole_model_has_to_say_its_base(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    one = folder_adapter(tmp_path / "one", tiny_folders["llama"], 1)
    other = helpers.tiny_model("llama")
    helpers.stir(other.requires_grad_(True))
    other.save_pretrained(tmp_path / "whole")
    helpers.tiny_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(UsageError, match="whole model that does not say which base"):
        open_adapters({"one": one, "whole": tmp_path / "whole"})
    adapters, _ = open_adapters({"one": one, "whole": tmp_path / "whole"}, base_model=str(tiny_folders["llama"]))
    assert torch.equal(helpers.logits(adapters.use("whole")), helpers.logits(open_result(tmp_path / "whole").model))
    assert torch.equal(helpers.logits(adapters.use(None)), helpers.logits(open_result(one, with_adapter=False).model))
