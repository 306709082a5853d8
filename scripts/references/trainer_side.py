"""Hugging Face's Trainer with ``peft`` on given rows. Runs in an environment of its own (see scripts/benchmark.py).

Reads a case (JSON): ``model``, what moves, ``rows`` (JSON lines of ``input_ids`` and ``supervised``, or ``label``, in the order of
training), and the settings. Writes ``result``: what every step took. What moves is an adapter of peft's (``adapter``, a folder with its
initial values), or weights of the model: all of them (``whole``), or those in the file ``weights``, which holds their initial values.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler


def adapted(model: Any, folder: Path, steps: int) -> Any:
    """``model`` with the adapter in ``folder``, ready for training."""
    peft: Any = importlib.import_module("peft")
    config = peft.PeftConfig.from_pretrained(folder)
    if hasattr(config, "total_step"):
        config.total_step = steps  # AdaLoRA's schedule: no file knows it before the run
    if not config.is_prompt_learning:
        return peft.PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
    # peft loads virtual tokens for inference only; for training they are put into a new adapter.
    config.inference_mode = False
    model = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    if (folder / "encoder.safetensors").exists():  # p-tuning's files hold what the encoder makes
        model.prompt_encoder["default"].load_state_dict(load_file(folder / "encoder.safetensors"))
    return model


def take(model: Any, weights: Path) -> None:
    """Give the parameters in ``weights`` their values there, in float32, and let them move."""
    for name, value in load_file(weights).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        # A parameter of its own: an output layer that is tied to the embedding moves alone.
        setattr(owner, attribute, torch.nn.Parameter(value))
        for vector in owner.parameters(recurse=False):
            if vector.ndim < 2:  # norms take no scale and bias of two dtypes
                vector.data = vector.data.float()


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tf: Any = importlib.import_module("transformers")
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    flat = case["variant"] == "padding-free"
    tokenizer = tf.AutoTokenizer.from_pretrained(case["model"])
    whole = case["whole"]
    extra: dict[str, Any] = {}
    if case["quantization"] is not None:
        extra["quantization_config"] = tf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=case["quantization"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    # A model that moves as a whole keeps float32 weights and computes in bfloat16, like ours.
    classes = case["task"] == "sequence_classification"
    kind = tf.AutoModelForSequenceClassification if classes else tf.AutoModelForCausalLM
    model = kind.from_pretrained(
        case["model"], dtype=torch.float32 if whole or case["dtype"] == "float32" else torch.bfloat16, attn_implementation="sdpa", **extra
    )
    if case["adapter"] is not None:
        model = adapted(model, Path(case["adapter"]), case["steps"])
    else:
        model.requires_grad_(whole)
        take(model, Path(case["weights"]))
    rows = []
    for line in Path(case["rows"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if classes:
            rows.append({"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": row["label"]})
            continue
        labels = [token if learned else -100 for token, learned in zip(row["input_ids"], row["supervised"], strict=True)]
        mask = {} if flat else {"attention_mask": [1] * len(labels)}
        rows.append({"input_ids": row["input_ids"], "labels": labels, **mask})
    steps: list[dict[str, float]] = []

    class Clock(tf.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not steps:
                self.mark = time.perf_counter(), os.times()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if case["adapter"] is not None and hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(state.global_step)  # AdaLoRA leaves this to the training loop

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                steps[-1]["loss"] = float(logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now, before = (time.perf_counter(), os.times()), self.mark
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            cpu = now[1].user + now[1].system - before[1].user - before[1].system
            steps.append({"seconds": now[0] - before[0], "cpu_seconds": cpu, "peak_bytes": peak})
            self.mark = now

    class InOrder(tf.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(rows)

    padding = tf.DataCollatorWithPadding(tokenizer) if classes else tf.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    collator = tf.DataCollatorWithFlattening() if flat else padding
    arguments = tf.TrainingArguments(
        output_dir=str(Path(case["result"]).with_suffix("")),
        per_device_train_batch_size=case["batch_size"],
        max_steps=case["steps"],
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=case["dtype"] == "bfloat16",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    InOrder(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()]).train()
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "peft", "accelerate")}
    Path(case["result"]).write_text(json.dumps({"steps": steps, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
