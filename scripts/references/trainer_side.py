"""Hugging Face's Trainer with ``peft`` on given rows. Runs in an environment of its own (see scripts/benchmark.py).

Reads a case (JSON): ``model`` and, unless every weight moves, ``adapter`` (a folder with the initial adapter), ``rows`` (JSON lines of
``input_ids`` and ``supervised``, or ``label``, in the order of training), and the settings. Writes ``result``: what every step took.
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
from torch.utils.data import SequentialSampler


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tf: Any = importlib.import_module("transformers")
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    flat = case["variant"] == "padding-free"
    tokenizer = tf.AutoTokenizer.from_pretrained(case["model"])
    whole = case["adapter"] is None
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
    model = kind.from_pretrained(case["model"], dtype=torch.float32 if whole else torch.bfloat16, attn_implementation="sdpa", **extra)
    if not whole:
        model = importlib.import_module("peft").PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)
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
        bf16=True,
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
