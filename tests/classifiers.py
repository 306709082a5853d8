"""Tiny random classifiers, batches for them, and the loop over labelled rows, shared by the tests of classification."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import processors
from torch import Tensor

from peftcli.data.batching import Plan
from peftcli.data.splits import LabelledSplit, SplitCounts
from peftcli.kernels import attention
from peftcli.methods.base import Context, Method
from peftcli.model.load import quantize
from peftcli.recipe.schema import TrainSection
from peftcli.recipe.tasks import SequenceClassificationTask
from peftcli.report.progress import NullProgress
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Layout
from peftcli.train.loop import Loop
from peftcli.train.optimizers import build_optimizer
from peftcli.train.signals import StopRequest

LABELS = ("bad", "fine", "good")
PAD = 3
TASK: Any = tasks.make(SequenceClassificationTask(problem="single_label", labels=list(LABELS)))
KINDS = ["bert", "gpt2", "llama"]
_SHARED = {"num_labels": len(LABELS), "pad_token_id": PAD}
_ENCODER = {
    "vocab_size": helpers.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def tiny_config(kind: str) -> Any:
    """``bert``, ``gpt2``, ``llama`` (grouped-query attention), ``roberta`` (positions after the padding's id), ``distilbert`` (a head of
    two modules), ``t5`` (an encoder-decoder)."""
    if kind == "bert":
        return transformers.BertConfig(**_ENCODER, **_SHARED)
    if kind == "roberta":
        return transformers.RobertaConfig(**_ENCODER, **_SHARED, type_vocab_size=1)
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=helpers.VOCABULARY, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=256, initializer_range=0.1,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, **_SHARED,
        )  # fmt: skip
    if kind == "t5":
        return transformers.T5Config(
            vocab_size=helpers.VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=PAD, eos_token_id=1, **_SHARED,
        )  # fmt: skip
    config = helpers.tiny_config(kind)
    config.num_labels, config.pad_token_id = len(LABELS), PAD
    return config


@lru_cache(maxsize=8)
def _model(kind: str, attends: str | None) -> Any:
    torch.manual_seed(7)
    return transformers.AutoModelForSequenceClassification.from_config(tiny_config(kind), attn_implementation=attends).eval()


def tiny_classifier(kind: str, dtype: torch.dtype = torch.float32, quantization: str | None = None, *, plain: bool = False) -> Any:
    """A fresh copy of the one random classifier of its kind, in evaluation mode; ``plain``: as transformers alone makes it."""
    attends = None if plain or not _takes_prefixes(kind) else attention.register()
    model = copy.deepcopy(_model(kind, attends)).to(dtype)
    if plain:
        model.set_attn_implementation("eager")
    if quantization is not None:
        quantize(model, quantization, double=True, compute_dtype=dtype, device=torch.device("cpu"))
    return model


def _takes_prefixes(kind: str) -> bool:
    config = type(tiny_config(kind))
    return bool(transformers.AutoModelForSequenceClassification._model_mapping[config]._supports_attention_backend)


def adapted(
    name: str, kind: str = "bert", dtype: torch.dtype = torch.float32, quantization: str | None = None, **options: Any
) -> tuple[Any, Method[Any]]:
    """A tiny classifier with a method applied."""
    method = helpers.make_method(name, **options)
    model = method.apply(tiny_classifier(kind, dtype, quantization), Context(seed=11, frozen_quantized=quantization is not None))
    if dtype == torch.float64:
        model.double()
    return model, method


def labelled_split(lengths: Sequence[int] = (7, 9, 4, 12, 6, 8, 5, 10, 11, 7, 6, 9, 3), seed: int = 0) -> LabelledSplit:
    """Rows whose label is told by most of their tokens, and pairs for the token types."""
    generator = np.random.Generator(np.random.PCG64(seed))
    targets = np.asarray([[i % len(LABELS)] for i in range(len(lengths))], dtype=np.float64)
    ids, segments = [], []
    for n, (target,) in zip(lengths, targets, strict=True):
        row = generator.integers(4, 260, n)
        row[: max(1, 2 * n // 3)] = 20 + 50 * int(target)
        row[-1] = 1  # T5 judges a row by its end token
        ids.append(row.astype(np.int32))
        segments.append((np.arange(n) >= n // 2).astype(np.int32))
    counts = SplitCounts(len(ids), sum(lengths), len(ids), 0, 0, max(lengths))
    return LabelledSplit([f"rows.jsonl:{i + 1}" for i in range(len(ids))], counts, [], ids, segments, targets)


def batch_of(split: LabelledSplit, rows: Sequence[int] | None = None) -> Any:
    return TASK.batch(split, list(range(len(split.origins))) if rows is None else rows, Layout(False, PAD))


def judged(model: Any, split: LabelledSplit | None = None, rows: Sequence[int] | None = None) -> Tensor:
    """[rows, labels] logits in evaluation."""
    model.eval()
    with torch.no_grad():
        found: Tensor = TASK.module(model).logits(batch_of(split or labelled_split(), rows))
    return found


def loop(
    model: Any, method: Method[Any], split: LabelledSplit, folder: Path, *, steps: int, evaluate: Callable[[], Any] = lambda: None, **settings: Any
) -> Loop:  # fmt: skip
    """A loop over a tiny classifier, on the CPU, in this process."""
    values = {"scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": None, "learning_rate": 1e-2, "logging_steps": 1, **settings}
    section = TrainSection.model_validate(values)
    plan = Plan(
        lengths=split.lengths, batch_size=section.batch_size, batch_tokens=section.batch_tokens,
        accumulation=section.gradient_accumulation_steps, processes=1, seed=section.seed,
    )  # fmt: skip
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    groups = method.param_groups(model, section.learning_rate, section.weight_decay)
    return Loop(
        accelerator=accelerator, method=method, task=TASK, module=TASK.module(model), model=model,
        optimizer=build_optimizer(groups, section, accelerator.device), split=split, plan=plan, settings=section, total_steps=steps,
        layout=Layout(False, PAD), evaluate=evaluate, metrics=None, display=NullProgress(), folder=folder / "checkpoints", identity={},
        stop=StopRequest(),
    )  # fmt: skip


def tokenizer(kind: str = "bert") -> Any:
    """The tests' byte-level tokenizer; encoders' puts marks around a text and between two, and says which of two a token is of."""
    fast = helpers.tiny_tokenizer()
    if kind in ("gpt2", "llama"):
        return fast
    marks = [("<s>", 0), ("<|im_end|>", 1)]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", pair="<s> $A <|im_end|> $B:1 <|im_end|>:1", special_tokens=marks
    )
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return fast


def save_folder(folder: Path, kind: str = "bert") -> Path:
    """The body of a tiny classifier, without a head, as a plain ``from_pretrained`` folder."""
    tiny_classifier(kind, plain=True).base_model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
