"""What ``lycoris-lora`` computes with given weights. Runs in an environment of its own (see scripts/check_references.py).

For each case folder: reads ``case.json`` and ``inputs.safetensors`` (a linear layer, factors, an input); writes ``theirs.safetensors``
with the output, the gradients and the merged weight.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        inputs = load_file(folder / "inputs.safetensors")
        weight = inputs["weight"]
        base = torch.nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
        base.load_state_dict({"weight": weight, "bias": inputs["bias"]})
        base.requires_grad_(False)
        module = getattr(importlib.import_module(f"lycoris.modules.{case['module']}"), case["class"])("case", base, **case["options"])
        module = module.to(weight.dtype)
        factors = {key.removeprefix("factor."): value for key, value in inputs.items() if key.startswith("factor.")}
        own = dict(module.named_parameters())
        if set(own) != set(factors):
            raise SystemExit(f"{folder}: lycoris has {sorted(own)}, the case {sorted(factors)}")
        with torch.no_grad():
            for key, value in factors.items():
                own[key].copy_(value)
        module.apply_to()
        x = inputs["x"].clone().requires_grad_()
        out = module(x)
        (out * inputs["weights"]).sum().backward()
        found = {f"gradient.{key}": p.grad for key, p in own.items()}
        eye = torch.eye(weight.shape[1], dtype=weight.dtype)
        with torch.no_grad():
            merged = (module(eye) - module(torch.zeros_like(eye))).t().contiguous()
        tensors: dict[str, Any] = {"output": out.detach(), "gradient.x": x.grad, "merged": merged, **found}
        save_file(tensors, folder / "theirs.safetensors")


if __name__ == "__main__":
    main()
