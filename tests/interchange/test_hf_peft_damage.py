"""Damaged and hostile adapter folders: a :class:`CheckpointError` with the cause, and nothing else."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftcli.errors import CheckpointError
from peftcli.interchange import hf_peft

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    helpers.write_adapter(folder, "llama", {"rank": 4, "alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"1.self_attn.q_proj": 2}})
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def load(folder: Path) -> None:
    hf_peft.apply_adapter(helpers.tiny_model("llama"), hf_peft.read_adapter(folder))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / hf_peft.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf_peft.WEIGHTS, metadata={"format": "pt"})


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / hf_peft.WEIGHTS
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + size])
    change(fields)
    text = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def config(folder: Path, **fields: Any) -> None:
    path = folder / hf_peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / hf_peft.CONFIG).unlink(), "holds no adapter"),
    "no weights": (lambda f: (f / hf_peft.WEIGHTS).unlink(), "is missing"),
    "pickled": (lambda f: (f / hf_peft.WEIGHTS).rename(f / "adapter_model.bin"), "pickle"),
    "empty file": (lambda f: (f / hf_peft.WEIGHTS).write_bytes(b""), "header claims 0"),
    "header too long": (lambda f: (f / hf_peft.WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "header claims"),
    "header no JSON": (lambda f: (f / hf_peft.WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"abcdefgh"), "damaged"),
    "header a list": (lambda f: (f / hf_peft.WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"[]"), "damaged"),
    "header deep": (lambda f: (f / hf_peft.WEIGHTS).write_bytes(struct.pack("<Q", 200000) + b"[" * 200000), "damaged"),
    "truncated": (lambda f: (f / hf_peft.WEIGHTS).write_bytes((f / hf_peft.WEIGHTS).read_bytes()[:-7]), "damaged"),
    "bytes too many": (lambda f: (f / hf_peft.WEIGHTS).write_bytes((f / hf_peft.WEIGHTS).read_bytes() + b"\0" * 9), "damaged"),
    "offsets": (lambda f: header(f, lambda h: h[KEY].update(data_offsets=[0, 1 << 40])), "damaged"),
    "no shape": (lambda f: header(f, lambda h: h[KEY].pop("shape")), "damaged"),
    "entry no object": (lambda f: header(f, lambda h: h.update({KEY: 3})), "damaged"),
    "huge shape": (lambda f: header(f, lambda h: h[KEY].update(shape=[1 << 40, 1 << 40])), "damaged"),
    "NaN": (lambda f: edit(f, lambda t: t[KEY].fill_(float("nan"))), "NaN or infinity"),
    "infinity": (lambda f: edit(f, lambda t: t[KEY][0, 0].fill_(float("inf"))), "NaN or infinity"),
    "integers": (lambda f: edit(f, lambda t: t.update({KEY: t[KEY].to(torch.int32)})), "has dtype I32"),
    "empty tensor": (lambda f: edit(f, lambda t: t.update({KEY: torch.zeros(0, 64)})), "is empty"),
    "wrong shape": (lambda f: edit(f, lambda t: t.update({KEY: torch.zeros(4, 63)})), r"\(4, 63\), the model needs \(4, 64\)"),
    "missing key": (lambda f: edit(f, lambda t: t.pop(KEY)), "1 missing such as .*q_proj.lora_A"),
    "extra key": (lambda f: edit(f, lambda t: t.update({KEY + "x": torch.ones(1)})), "1 not expected such as"),
    "compiled": (lambda f: edit(f, lambda t: t.update({KEY.replace("model.layers", "_orig_mod.layers"): t.pop(KEY)})), "1 missing .* 1 not expected"),
    "config no JSON": (lambda f: (f / hf_peft.CONFIG).write_text("{"), "cannot be read"),
    "config binary": (lambda f: (f / hf_peft.CONFIG).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "config a list": (lambda f: (f / hf_peft.CONFIG).write_text("[]"), "no JSON object"),
    "config deep": (lambda f: (f / hf_peft.CONFIG).write_text("[" * 100000), "cannot be read"),
    "config too large": (lambda f: (f / hf_peft.CONFIG).write_text(" " * (1 << 21) + "{}"), "larger than"),
    "config a folder": (lambda f: ((f / hf_peft.CONFIG).unlink(), (f / hf_peft.CONFIG).mkdir()), "cannot be read"),
    "unknown method": (lambda f: config(f, peft_type="OTHER"), "'OTHER' is not known here"),
    "method no text": (lambda f: config(f, peft_type=["LORA"]), "is not known here"),
    "rank of text": (lambda f: config(f, r="many"), "rank"),
    "rank negative": (lambda f: config(f, r=-1), "rank"),
    "rank enormous": (lambda f: config(f, r=16000), "states the rank 16000"),
    "pattern enormous": (lambda f: config(f, rank_pattern={"q_proj": 10**9}), "states the rank 1000000000"),
    "rank another": (lambda f: config(f, r=5), r"the model needs \(5, 64\)"),
    "pattern no expression": (lambda f: config(f, rank_pattern={"(": 2}), "not sound.*no regular expression"),
    "targets mixed": (lambda f: config(f, target_modules=["q_proj", 3]), "not sound"),
    "targets absent": (lambda f: config(f, target_modules=["nothing"]), "nothing is left to adapt"),
    "targets no expression": (lambda f: config(f, target_modules="("), "does not fit the model"),
    "layers of text": (lambda f: config(f, layers_to_transform="x"), "not sound|does not fit|nothing"),
    "tokens outside": (lambda f: config(f, trainable_token_indices=[10**6]), "outside the model's vocabulary"),
    "tokens of text": (lambda f: config(f, trainable_token_indices={"embed_tokens": ["a"]}), "lists of token ids"),
    "tokens differ": (lambda f: config(f, trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}), "the same"),
    "module to run": (lambda f: config(f, peft_type="LORA", auto_mapping={"parent_library": "os"}, megatron_config={"a": 1}), "megatron_config"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, folder: Path) -> None:
    load(folder)
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["q_proj", "lm_head", "norm", "(", ".*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["q_proj", "("]), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "trainable_token_indices", "layers_to_transform", "peft_type", "task_type", "base_model_name_or_path", "revision", "use_dora", "bias",
]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_mutated_configs_end_in_no_traceback(changes: dict[str, Any], good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    config(folder, **changes)
    try:
        adapter = hf_peft.read_adapter(folder)
        assert adapter.base_model is None or isinstance(adapter.base_model, str)
        hf_peft.apply_adapter(helpers.tiny_model("llama"), adapter)
    except CheckpointError as error:
        assert str(folder) in error.message or "adapter" in error.message


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_weight_files_end_in_no_traceback(data: st.DataObject, good: Path, tmp_path: Path) -> None:
    content = bytearray((good / hf_peft.WEIGHTS).read_bytes())
    size = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, size - 1) | st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path = tmp_path / hf_peft.WEIGHTS
    path.write_bytes(bytes(content))
    try:
        tensors = hf_peft.read_tensors(path)
    except CheckpointError as error:
        assert str(path) in error.message
    else:
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
