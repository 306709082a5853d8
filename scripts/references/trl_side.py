"""What TRL's trainers compute on given rows and weights. Runs in an environment of its own (see scripts/check_preferences.py).

Reads ``FOLDER/cases.json``, ``base`` and ``policy`` (causal models), ``scorer`` (a model with one output) and ``tokenizer``; writes
``FOLDER/<case>.safetensors`` with the loss, the gradients of all parameters and the logged rewards.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors.torch import save_file


def trainer_for(folder: Path, case: dict[str, Any], output: Path) -> Any:
    """TRL's own trainer over the case's rows."""
    module = importlib.import_module(case["module"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    settings = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": [], "disable_dropout": True}
    settings |= {"output_dir": str(output), "per_device_train_batch_size": case["batch"], "dataloader_pin_memory": False}
    config = getattr(module, f"{case['trainer']}Config")(**settings, **case["options"])
    extra: dict[str, Any] = {}
    if case["trainer"] == "Reward":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "scorer")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy")
        if case["reference"]:
            extra = {"ref_model": transformers.AutoModelForCausalLM.from_pretrained(folder / "base")}
    trainer = getattr(module, f"{case['trainer']}Trainer")
    return trainer(model=model, args=config, train_dataset=Dataset.from_list(case["rows"]), processing_class=tokenizer, **extra)


def main() -> None:
    """Every case of the folder."""
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    for name, case in cases.items():
        trainer = trainer_for(folder, case, folder / "trl")
        model = trainer.model
        model.train()
        total = torch.zeros(())
        rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for batch in trainer.get_train_dataloader():
            if hasattr(trainer, "get_batch_loss_metrics"):
                loss, metrics = trainer.get_batch_loss_metrics(model, batch, "train")
                logged = {kind: float(metrics[f"rewards/{kind}"]) for kind in rewards}
            else:
                loss = trainer.compute_loss(model, batch)
                seen = trainer._metrics["train"]
                logged = {kind: seen[f"rewards/{kind}"][-1] for kind in rewards if f"rewards/{kind}" in seen}
            loss = loss * case["batch"] / len(case["rows"])
            loss.backward()
            total += loss.detach()
            for kind, value in logged.items():
                rewards[kind].append(value)
        found = {f"gradient.{key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
        found |= {f"reward.{kind}": torch.tensor(values).mean() for kind, values in rewards.items() if values}
        save_file({"loss": total, **{key: value.contiguous() for key, value in found.items()}}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
