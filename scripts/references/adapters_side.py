"""What the ``adapters`` library computes with given weights. Runs in an environment of its own (see scripts/check_references.py).

For each case folder: reads ``base/`` (a model folder), ``ours/`` (an adapter file that peftcli wrote in the library's layout) and
``inputs.safetensors``; writes ``theirs.safetensors`` (outputs and gradients) and ``theirs/`` (the same adapter, saved by the library).
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    library: Any = importlib.import_module("adapters")
    transformers: Any = importlib.import_module("transformers")
    for folder in map(Path, sys.argv[1:]):
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        dtype = getattr(torch, case["dtype"])
        model = getattr(transformers, case["class"]).from_pretrained(folder / "base", attn_implementation="sdpa").eval()
        library.init(model)
        info: dict[str, Any] = {}
        name = model.load_adapter(str(folder / "ours"), use_safetensors=True, loading_info=info, set_active=True)
        model.train_adapter(name)
        model.to(dtype).eval()
        inputs = load_file(folder / "inputs.safetensors")
        out = model(input_ids=inputs["ids"], attention_mask=torch.ones_like(inputs["ids"]))[0]
        (out * inputs["weights"].to(dtype)).sum().backward()
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad and f".adapters.{name}." in key}
        found = {f"gradient.{key}": p.grad for key, p in trained.items() if p.grad is not None}
        save_file({"output": out.detach().contiguous(), **found}, folder / "theirs.safetensors")
        model.float()
        (folder / "theirs").mkdir(exist_ok=True)
        model.save_adapter(str(folder / "theirs"), name, use_safetensors=True)
        (folder / "info.json").write_text(json.dumps({key: sorted(info.get(key, [])) for key in ("missing_keys", "unexpected_keys")}))


if __name__ == "__main__":
    main()
