"""Tiny random models, a tiny tokenizer, rows and whole runs, shared by the tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from peftcli import output
from peftcli.data.batching import Plan, collate
from peftcli.data.splits import PairSplit, SplitCounts, TextSplit
from peftcli.interchange import hf_peft
from peftcli.kernels import attention
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.model.load import Base, quantize
from peftcli.model.source import Source
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.schema import Recipe, TrainSection
from peftcli.recipe.tasks import CausalLMTask, Seq2SeqTask
from peftcli.report.progress import NullProgress
from peftcli.report.schema import Report
from peftcli.run import Options, train
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Layout
from peftcli.tasks.causal_lm import CausalLM
from peftcli.train.loop import Loop
from peftcli.train.optimizers import build_optimizer
from peftcli.train.signals import StopRequest

VOCABULARY = 264
CAUSAL_LM = tasks.make(CausalLMTask())
SEQ2SEQ = tasks.make(Seq2SeqTask())
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with a chat template whose end of turn is its EOS; 260 tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "<|im_end|>", "<|im_start|>", "<pad>"]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *bytes_])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(kind: str) -> Any:
    """``llama`` (grouped-query attention), ``llama-bias`` (the same with biases), ``llama-mha``, ``llama-tied``, ``gpt2`` (tied, Conv1D)."""
    if kind in ("t5", "flan-t5"):
        return T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=3, eos_token_id=1, decoder_start_token_id=3, tie_word_embeddings=kind == "t5",
            feed_forward_proj="relu" if kind == "t5" else "gated-gelu",
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    family = Qwen2Config if kind == "qwen2" else LlamaConfig
    return family(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 if kind == "llama-mha" else 2, max_position_embeddings=256, tie_word_embeddings=kind in ("llama-tied", "qwen2"),
        bos_token_id=0, eos_token_id=1, pad_token_id=3, initializer_range=0.1, attention_bias=kind == "llama-bias", mlp_bias=kind == "llama-bias",
    )  # fmt: skip


@lru_cache(maxsize=8)
def _model(kind: str) -> Any:
    torch.manual_seed(7)
    if kind in ("t5", "flan-t5"):
        model = AutoModelForSeq2SeqLM.from_config(tiny_config(kind)).eval()
        if kind == "flan-t5":  # transformers ties every new T5; published ones of the second version are not
            model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 64) * 0.1)
        return model
    return AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation=attention.register()).eval()


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, quantization: str | None = None) -> Any:
    """A fresh copy of the one random model of its kind, in evaluation mode."""
    model = copy.deepcopy(_model(kind)).to(dtype)
    if quantization is not None:
        quantize(model, quantization, double=True, compute_dtype=dtype, device=torch.device("cpu"))
    return model


def make_method(name: str, **options: Any) -> Method[Any]:
    cls = registry.get(name)
    return cls(cls.Config.model_validate({"name": name, **options}))


def adapted(
    name: str, kind: str = "llama", dtype: torch.dtype = torch.float32, *, quantization: str | None = None, **options: Any
) -> tuple[Any, Method[Any]]:
    """A tiny model with a method applied; dense models are cast to ``dtype`` with their adapters."""
    method = make_method(name, **options)
    model = method.apply(tiny_model(kind, dtype, quantization), Context(seed=11, frozen_quantized=quantization is not None))
    if dtype == torch.float64:
        model.double()
    return model, method


def write_adapter(folder: Path, kind: str, options: dict[str, Any], new_ids: tuple[int, ...] = ()) -> tuple[Any, Method[Any]]:
    """A LoRA adapter with random weights in ``folder``, and the model that it belongs to."""
    method = make_method("lora", **options)
    model = method.apply(tiny_model(kind), Context(seed=11, new_token_ids=new_ids))
    stir(model)
    hf_peft.save_adapter(folder, model, method, base_model="some/base", revision=None)
    return model, method


def same(one: Tensor, other: Tensor) -> bool:
    """Equal logits up to float32 rounding: 1e-6 of the largest one, or of 1."""
    return float((one - other).abs().max()) <= 1e-6 * max(1.0, float(other.abs().max()))


def stir(model: nn.Module, seed: int = 3, scale: float = 0.05) -> None:
    """Move every trainable parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def some_ids(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    ids = some_ids() if ids is None else ids
    more = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {}
    model.eval()
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **more).logits
    return result


def make_split(lengths: Sequence[int], seed: int = 0, prompt: int = 1) -> TextSplit:
    """Rows of random tokens; all but the first ``prompt`` tokens of a row carry loss, in some rows fewer."""
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = [generator.integers(4, 260, n).astype(np.int32) for n in lengths]
    masks = []
    for index, n in enumerate(lengths):
        mask = np.ones(n, dtype=np.bool_)
        mask[: prompt + (index % 3 if n > prompt + 3 else 0)] = False
        masks.append(mask)
    counts = SplitCounts(len(ids), sum(lengths), int(sum(m.sum() for m in masks)), 0, 0, max(lengths))
    return TextSplit([f"rows.jsonl:{i + 1}" for i in range(len(ids))], counts, [], ids, masks, stop_ids=(1,))


def pattern_split(rows: int = 16, length: int = 10) -> TextSplit:
    """A task that any adapter learns: the row repeats one of four tokens."""
    ids = [np.full(length, 10 + i % 4, dtype=np.int32) for i in range(rows)]
    masks = [np.asarray([False] + [True] * (length - 1)) for _ in ids]
    counts = SplitCounts(rows, rows * length, rows * (length - 1), 0, 0, length)
    return TextSplit([f"rows.jsonl:{i + 1}" for i in range(rows)], counts, [], ids, masks, stop_ids=(1,))


def make_pairs(lengths: Sequence[tuple[int, int]], seed: int = 0) -> PairSplit:
    """Pairs of random tokens, each of (tokens of the source, of the target); both end with EOS."""
    generator = np.random.Generator(np.random.PCG64(seed))
    sides = [[np.append(generator.integers(4, 260, pair[side] - 1), 1).astype(np.int32) for pair in lengths] for side in (0, 1)]
    return _pairs(*sides)


def pattern_pairs(rows: int = 16, length: int = 8) -> PairSplit:
    """A task that any adapter learns: the target repeats one of four tokens."""
    generator = np.random.Generator(np.random.PCG64(0))
    sources = [np.append(generator.integers(4, 260, length - i % 3), 1).astype(np.int32) for i in range(rows)]
    return _pairs(sources, [np.full(length - i % 2, 10 + i % 4, dtype=np.int32) for i in range(rows)])


def _pairs(sources: list[Any], targets: list[Any]) -> PairSplit:
    total, learned = sum(map(len, [*sources, *targets])), sum(map(len, targets))
    counts = SplitCounts(len(sources), total, learned, 0, 0, max(len(s) + len(t) for s, t in zip(sources, targets, strict=True)))
    return PairSplit([f"rows.jsonl:{i + 1}" for i in range(len(sources))], counts, [], sources, targets, stop_ids=(1,))


def make_loop(
    model: Any, method: Method[Any], split: TextSplit | PairSplit, folder: Path, *, steps: int, packed: bool = True,
    evaluate: Callable[[], dict[str, float] | None] = lambda: None, metrics: Any = None, identity: dict[str, Any] | None = None, **settings: Any,
) -> Loop:  # fmt: skip
    """A loop over a tiny model, on the CPU, in this process."""
    task = SEQ2SEQ if isinstance(split, PairSplit) else CAUSAL_LM
    values = {"scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": None, "learning_rate": 1e-2, **settings}
    section = TrainSection.model_validate(values)
    plan = Plan(
        lengths=split.lengths, batch_size=section.batch_size, batch_tokens=section.batch_tokens,
        accumulation=section.gradient_accumulation_steps, processes=1, seed=section.seed,
    )  # fmt: skip
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    optimizer = build_optimizer(method.param_groups(model, section.learning_rate, section.weight_decay), section, accelerator.device)
    return Loop(
        accelerator=accelerator, method=method, task=task, module=task.module(model), model=model, optimizer=optimizer, split=split, plan=plan,
        settings=section, total_steps=steps, layout=Layout(packed, 3), evaluate=evaluate, metrics=metrics, display=NullProgress(),
        folder=folder / "checkpoints", identity=identity or {}, stop=StopRequest(),
    )  # fmt: skip


def loss_of(model: Any, split: TextSplit, *, packed: bool = True) -> Tensor:
    """Summed loss of all rows in one batch."""
    total: Tensor = CausalLM(model)(collate(split.input_ids, split.supervised, packed=packed, pad_id=3)).total
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def write_rows(path: Path, count: int, offset: int = 0) -> Path:
    """Rows of different lengths with a rule that a tiny model can begin to learn."""
    words = ["red", "green", "blue", "gold", "grey"]
    lines = []
    for index in range(offset, offset + count):
        word = words[index % len(words)]
        lines.append({"prompt": f"{index} {word}" + " please" * (index % 4), "completion": f"{word}!" * (1 + index % 3)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def save_folder(folder: Path, kind: str) -> Path:
    """A tiny model as a plain ``from_pretrained`` folder."""
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe_for(model: Path, data: Path, output: Path, *, method: str = "{name: lora, rank: 4, alpha: 8, dropout: 0.1}") -> str:
    return (
        f"base_model: {{name: {model}, dtype: float32}}\nmethod: {method}\n"
        f"dataset: {{train: {data / 'train.jsonl'}, eval: {data / 'eval.jsonl'}, max_length: 128}}\n"
        "train: {epochs: 2, batch_size: 4, learning_rate: 1e-2, logging_steps: 1}\n"
        f"output_dir: {output}\n"
    )


def run(
    text: str, *overrides: str, resume: bool = False, overwrite: bool = False, init_adapter: Path | None = None, display: Any = None
) -> Report:
    """Train a recipe in this process, as the command line does."""
    AcceleratorState._reset_state(True)
    return train(parse_recipe(text, "recipe.yaml", overrides), display or NullProgress(), Options(resume, overwrite, init_adapter))


def trace(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` without what depends on the clock and the machine."""
    clock = ("seconds", "tokens_per_second", "peak_memory_bytes")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def save_result(folder: Path, model: Any, method: Method[Any], recipe: Recipe) -> Path:
    """The result of a run over a tiny model, as the run writes it."""
    source = Source("tiny", "tiny", None, True)
    base = Base(model, tiny_tokenizer(), source, torch.float32, recipe.base_model.quantization, None, (), 0)
    return output.save_result(folder, model, method, tasks.make(recipe.task), base, recipe)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
