"""Compare our methods with independent implementations, each in an environment of its own:

    python scripts/check_references.py FOLDER [--write]

makes (or finds) the environments FOLDER/adapters (AdapterHub's `adapters`: Houlsby, Pfeiffer, parallel) and FOLDER/lycoris
(`lycoris-lora`: LoHa, LoKr, IA3), gives both sides the same weights and inputs through safetensors files, and compares outputs,
gradients, merged weights and saved files. `--write` records the result in scripts/results/references.json. The exit code is 1 where a
difference is above its limit.

Needs a package index, so it is no part of `make test`; the tests compare with the same formulas, written out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftcli.interchange import adapter_hub, hf_peft
from peftcli.methods import registry
from peftcli.methods.base import Context
from peftcli.methods.kinds import adapter_layers

HERE = Path(__file__).parent
RESULT = HERE / "results" / "references.json"
PINS = {"adapters": ["torch==2.13.0", "adapters==1.3.0"], "lycoris": ["torch==2.13.0", "lycoris-lora==4.1.3"]}
# Norms compute in float32 in LLaMA's layers, also in a float64 model; the limits are relative to the largest number compared.
LIMITS = {"float64": 1e-7, "float32": 1e-5}
LIMITS_LINEAR = {"float64": 1e-12, "float32": 1e-5}


def run(python: Path, *arguments: str) -> str:
    """What an interpreter of another environment prints."""
    done = subprocess.run([str(python), *arguments], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own scripts
    return done.stdout


def environment(root: Path, name: str) -> Path:
    """The interpreter of ``root/name``, made with the pinned packages where it does not exist."""
    python = root / name / "bin" / "python"
    if not python.is_file():
        venv.create(root / name, with_pip=True)
        for package in PINS[name]:
            run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package)
    return python


def versions(python: Path, names: list[str]) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    found: dict[str, str] = json.loads(run(python, "-c", code))
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number (or of 1)."""
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max()) / max(1.0, float(other.abs().max()))


def stir(tensors: Mapping[str, nn.Parameter]) -> None:
    """Give every parameter a random value that float32 holds exactly."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(tensors.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tiny(family: str) -> Any:
    torch.manual_seed(7)
    if family == "bert":
        return BertModel(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapters_cases(root: Path) -> list[dict[str, Any]]:
    """Houlsby, Pfeiffer and parallel on three families: outputs, gradients, and files both ways."""
    python, rows = environment(root, "adapters"), []
    cases = [(v, f, d) for v in ("houlsby", "pfeiffer", "parallel") for f in ("bert", "gpt2", "llama") for d in LIMITS]
    folders = [root / "cases" / "adapters" / "-".join(case) for case in cases]
    cls = registry.get("adapter")
    ours: list[dict[str, Tensor]] = []
    for (variant, family, dtype), folder in zip(cases, folders, strict=True):
        base = tiny(family)
        base.save_pretrained(folder / "base")
        method = cls(cls.Config.model_validate({"name": "adapter", "variant": variant, "bottleneck_size": 5}))
        model: Any = method.apply(base, Context())
        stir({name: p for name, p in model.named_parameters() if p.requires_grad})
        hf_peft.save_adapter(folder / "mine", model, method, base_model="tiny", revision=None)
        mine = hf_peft.read_adapter(folder / "mine")
        adapter_hub.write(folder / "ours", mine, model_type=family, hidden_size=32, model_class=type(tiny(family)).__name__, name="task")
        ids = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(1))
        model.to(getattr(torch, dtype))
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) / out.numel() ** 0.5
        (out * weights.to(out.dtype)).sum().backward()
        gradients = {hf_peft.file_key(model, method, n): p.grad for n, p in model.named_parameters() if p.requires_grad}
        ours.append({"output": out.detach(), **gradients})
        save_file({"ids": ids, "weights": weights}, folder / "inputs.safetensors")
        (folder / "case.json").write_text(json.dumps({"dtype": dtype, "class": type(tiny(family)).__name__}), encoding="utf-8")
    run(python, str(HERE / "references" / "adapters_side.py"), *map(str, folders))
    for (variant, family, dtype), folder, mine_tensors in zip(cases, folders, ours, strict=True):
        theirs = load_file(folder / "theirs.safetensors")
        gradients = {key.removeprefix("gradient."): value for key, value in theirs.items() if key.startswith("gradient.")}
        # Their gradients by our keys: the reader translates names, whatever the tensors hold.
        save_file(gradients, folder / "named.safetensors")
        (folder / "named").mkdir(exist_ok=True)
        (folder / "named" / adapter_hub.CONFIG).write_bytes((folder / "theirs" / adapter_hub.CONFIG).read_bytes())
        (folder / "named.safetensors").replace(folder / "named" / adapter_hub.WEIGHTS)
        named = adapter_hub.read(folder / "named").tensors
        read, mine = adapter_hub.read(folder / "theirs"), hf_peft.read_adapter(folder / "mine")
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        again = hf_peft.apply_adapter(tiny(family), read)
        loaded = hf_peft.apply_adapter(tiny(family), mine)
        ids = load_file(folder / "inputs.safetensors")["ids"]
        with torch.no_grad():
            same_logits = torch.equal(again(input_ids=ids)[0], loaded(input_ids=ids)[0])
        keys = {key for key in mine_tensors if key != "output"}
        row = {
            "method": f"adapter ({variant})", "on": family, "dtype": dtype, "limit": LIMITS[dtype],
            "output": difference(mine_tensors["output"], theirs["output"]),
            "gradients": max((difference(mine_tensors[k], named[k]) for k in keys), default=1.0) if named.keys() == keys else float("inf"),
            "files both ways": not any(info.values()) and same_logits and read.tensors.keys() == mine.tensors.keys()
            and all(torch.equal(read.tensors[k], mine.tensors[k]) for k in read.tensors),
        }  # fmt: skip
        rows.append(row)
    return rows


def lycoris_cases(root: Path) -> list[dict[str, Any]]:
    """LoHa, LoKr and IA3 on one linear layer: output, gradients and the merged weight."""
    python, rows = environment(root, "lycoris"), []
    both = {"decompose_both": True}
    kinds: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("loha", "LohaModule", {"rank": 4, "alpha": 6}, {"lora_dim": 4, "alpha": 6}),
        ("lokr", "LokrModule", {"rank": 2, "alpha": 3}, {"lora_dim": 2, "alpha": 3}),
        ("lokr", "LokrModule", {"rank": 1, "alpha": 3, "decompose_factor": 4, **both}, {"lora_dim": 1, "alpha": 3, "factor": 4, **both}),
        ("lokr", "LokrModule", {"rank": 64, "alpha": 64}, {"lora_dim": 64, "alpha": 64}),
        # Its other mode leaves the bias unscaled; the paper's models have none there.
        ("ia3", "IA3Module", {"feedforward_modules": []}, {"bypass_mode": True}),
        ("ia3", "IA3Module", {"feedforward_modules": ["layer"]}, {"train_on_input": True}),
    ]
    cases = [(index, dtype) for index in range(len(kinds)) for dtype in LIMITS_LINEAR]
    folders = [root / "cases" / "lycoris" / f"{index}-{dtype}" for index, dtype in cases]
    ours: list[dict[str, Any]] = []
    for (index, dtype), folder in zip(cases, folders, strict=True):
        name, lycoris_class, options, there = kinds[index]
        torch.manual_seed(5)
        linear = nn.Linear(48, 32)
        model = nn.ModuleDict({"layer": linear})
        weight, bias = (p.detach().to(getattr(torch, dtype)) for p in (linear.weight, linear.bias))
        cls = registry.get(name)
        method = cls(cls.Config.model_validate({"name": name, "target_modules": ["layer"], **options}))
        layer: Any = adapter_layers(method.apply(model, Context()))["layer"]
        own = dict(layer.named_parameters(recurse=False))
        stir(own)
        model.to(getattr(torch, dtype))
        generator = torch.Generator().manual_seed(1)
        x, weights = (torch.randn(5, n, generator=generator, dtype=weight.dtype) for n in (48, 32))
        x.requires_grad_()
        out = layer(x)
        (out * weights).sum().backward()
        merged = layer.fold(weight, bias)[0].detach()
        # LyCORIS stores a scale as its distance from one, flat.
        flat = name == "ia3"
        factors = {"weight": own["ia3_l"].detach().flatten() - 1} if flat else {key: p.detach() for key, p in own.items()}
        found = {f"gradient.{'weight' if flat else key}": p.grad.flatten() if flat else p.grad for key, p in own.items()}
        ours.append({"output": out.detach(), "gradient.x": x.grad, "merged": merged, **found})
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": weight, "bias": bias, "x": x.detach(), "weights": weights, **{f"factor.{k}": v for k, v in factors.items()}}
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "inputs.safetensors")
        (folder / "case.json").write_text(json.dumps({"module": name, "class": lycoris_class, "options": there}), encoding="utf-8")
    run(python, str(HERE / "references" / "lycoris_side.py"), *map(str, folders))
    for (index, dtype), folder, mine in zip(cases, folders, ours, strict=True):
        theirs = load_file(folder / "theirs.safetensors")
        same = theirs.keys() == mine.keys()
        gradients = [difference(mine[k], theirs[k]) for k in theirs if k.startswith("gradient.")] if same else [float("inf")]
        row = {
            "method": kinds[index][0], "on": f"linear 48 -> 32, {json.dumps(kinds[index][3])}",
            "dtype": dtype, "limit": LIMITS_LINEAR[dtype],
            "output": difference(mine["output"], theirs["output"]), "gradients": max(gradients),
            "merged": difference(mine["merged"], theirs["merged"]),
        }  # fmt: skip
        rows.append(row)
    return rows


def passed(row: Mapping[str, Any]) -> bool:
    numbers = [value for key, value in row.items() if isinstance(value, float) and key != "limit"]
    return all(value <= row["limit"] for value in numbers) and row.get("files both ways", True)


def main() -> int:
    """Compare, print a table, and say whether all differences are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the environments and the cases are kept")
    parser.add_argument("--write", action="store_true", help=f"record the result in {RESULT.relative_to(HERE.parent)}")
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    rows = [*adapters_cases(root), *lycoris_cases(root)]
    for row in rows:
        shown = [f"{key} {value:.1e}" for key, value in row.items() if isinstance(value, float) and key != "limit"]
        files = f", files {row['files both ways']}" if "files both ways" in row else ""
        print(f"{'ok  ' if passed(row) else 'FAIL'} {row['method']}, {row['on']}, {row['dtype']}: {', '.join(shown)}{files}")
    result = {
        "ours": {"torch": torch.__version__, "transformers": transformers.__version__},
        "references": {
            "adapters": versions(root / "adapters" / "bin" / "python", ["adapters", "torch", "transformers"]),
            "lycoris": versions(root / "lycoris" / "bin" / "python", ["lycoris-lora", "torch"]),
        },
        "meaning": "largest difference, in units of the largest number compared or of 1; `files both ways`: each side loads what the "
        "other saved, tensors bitwise, no key missing or unexpected",
        "rows": [{**row, "passed": passed(row)} for row in rows],
    }
    if arguments.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(passed(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
