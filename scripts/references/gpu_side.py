"""One peer on a GPU: LoRA on given rows. Runs in an environment of its own (see scripts/benchmark_gpu.py).

Reads a case (JSON): ``side`` and ``variant``, ``model`` (a folder with random weights), ``rows`` (a JSON list of lists of token ids, all
of one length and all supervised, in the order of training), and the settings. Writes ``result``: what every step took.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPU = torch.cuda.is_available()


class Clock:
    """What every step took. Reading the clock waits for the GPU, once a step, for every side alike."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.mark = 0.0

    def start(self) -> None:
        self.wait()
        self.mark = time.perf_counter()

    def tick(self, loss: float | None = None) -> None:
        self.wait()
        now = time.perf_counter()
        peak = torch.cuda.max_memory_allocated() if GPU else 0
        self.steps.append({"seconds": now - self.mark, "peak_bytes": peak} | ({} if loss is None else {"loss": loss}))
        self.mark = now

    @staticmethod
    def wait() -> None:
        if GPU:
            torch.cuda.synchronize()


def callback(tf: Any, clock: Clock) -> Any:
    class Watch(tf.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not clock.steps:
                clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and clock.steps:
                clock.steps[-1]["loss"] = float(logs["loss"])

    return Watch()


def in_order(kind: Any) -> Any:
    """A Trainer that takes its rows as they come."""

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    return InOrder


def settings(case: dict[str, Any], *, recompute: bool, liger: bool) -> dict[str, Any]:
    """What Trainer and TRL are given alike."""
    return {
        "output_dir": str(Path(case["result"]).with_suffix("")),
        "per_device_train_batch_size": case["batch_size"],
        "max_steps": case["steps"],
        "learning_rate": case["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": not GPU,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": case["seed"],
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
        "use_liger_kernel": liger and GPU,
    }


def quantized(tf: Any, case: dict[str, Any]) -> dict[str, Any]:
    if case["quantization"] is None:
        return {}
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config}


def lora(case: dict[str, Any]) -> Any:
    peft: Any = importlib.import_module("peft")
    return peft.LoraConfig(r=case["rank"], lora_alpha=2 * case["rank"], lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def labelled(case: dict[str, Any]) -> list[dict[str, list[int]]]:
    rows = json.loads(Path(case["rows"]).read_text(encoding="utf-8"))
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]


def trainer(case: dict[str, Any], clock: Clock) -> None:
    """Trainer + peft, with Liger's kernels on a GPU; ``best`` keeps all activations, the default recomputes them."""
    tf: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    model = tf.AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda" if GPU else None, **quantized(tf, case)
    )
    recompute = case["variant"] != "best"
    if recompute:
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, lora(case))
    arguments = tf.TrainingArguments(**settings(case, recompute=recompute, liger=True))
    in_order(tf.Trainer)(
        model, arguments, train_dataset=labelled(case), data_collator=tf.default_data_collator, callbacks=[callback(tf, clock)]
    ).train()


def trl(case: dict[str, Any], clock: Clock) -> None:
    """TRL's SFTTrainer + peft + Liger; ``best`` keeps all activations."""
    tf, library, datasets = (importlib.import_module(name) for name in ("transformers", "trl", "datasets"))
    model = tf.AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda" if GPU else None, **quantized(tf, case)
    )
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in labelled(case)]
    arguments = library.SFTConfig(
        **settings(case, recompute=case["variant"] != "best", liger=True), max_length=case["length"], shuffle_dataset=False
    )
    in_order(library.SFTTrainer)(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=lora(case),
        callbacks=[callback(tf, clock)],
    ).train()


def unsloth(case: dict[str, Any], clock: Clock) -> None:
    """Unsloth in Trainer; its default recomputes with offloading, ``best`` keeps all activations."""
    library: Any = importlib.import_module("unsloth")
    tf: Any = importlib.import_module("transformers")
    model, _ = library.FastLanguageModel.from_pretrained(
        case["model"], max_seq_length=case["length"], dtype=torch.bfloat16, load_in_4bit=case["quantization"] is not None
    )
    model = library.FastLanguageModel.get_peft_model(
        model, r=case["rank"], lora_alpha=2 * case["rank"], lora_dropout=0.0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=False if case["variant"] == "best" else "unsloth", random_state=case["seed"],
    )  # fmt: skip
    arguments = tf.TrainingArguments(**settings(case, recompute=False, liger=False))
    in_order(tf.Trainer)(
        model, arguments, train_dataset=labelled(case), data_collator=tf.default_data_collator, callbacks=[callback(tf, clock)]
    ).train()


def torchtune(case: dict[str, Any], clock: Clock) -> None:
    """torchtune's model and chunked loss in its recipe's step, compiled; ``best`` keeps all activations. Its weights are random ones of
    its own, so its losses say nothing."""
    modules: Any = importlib.import_module("torchtune.modules.peft")
    models: Any = importlib.import_module("torchtune.models.llama3_1")
    losses: Any = importlib.import_module("torchtune.modules.loss")
    training: Any = importlib.import_module("torchtune.training")
    shape, device = case["shape"], torch.device("cuda")
    torch.manual_seed(case["seed"])
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = models.lora_llama3_1(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, apply_lora_to_output=False,
            vocab_size=shape["vocab_size"], num_layers=shape["num_hidden_layers"], num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"], embed_dim=shape["hidden_size"], max_seq_len=case["length"],
            intermediate_dim=shape["intermediate_size"], lora_rank=case["rank"], lora_alpha=2 * case["rank"],
            quantize_base=case["quantization"] is not None,
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    modules.set_trainable_params(model, modules.get_adapter_params(model))
    training.compile_model(model, verbose=False)
    loss_of = losses.CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    if case["variant"] != "best":
        layer: Any = importlib.import_module("torchtune.modules").TransformerSelfAttentionLayer
        training.set_activation_checkpointing(model, auto_wrap_policy={layer})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=case["learning_rate"], fused=True)
    rows = torch.tensor(json.loads(Path(case["rows"]).read_text(encoding="utf-8")))
    clock.start()
    for step in range(case["steps"]):
        tokens = rows[step * case["batch_size"] : (step + 1) * case["batch_size"]].to(device)
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
        loss = loss_of(model(tokens), list(labels.chunk(loss_of.num_output_chunks, 1)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(float(loss.detach()))


SIDES: dict[str, tuple[Callable[[dict[str, Any], Clock], None], tuple[str, ...]]] = {
    "trainer": (trainer, ("torch", "transformers", "peft", "accelerate")),
    "trl": (trl, ("torch", "transformers", "peft", "trl")),
    "unsloth": (unsloth, ("torch", "transformers", "unsloth")),
    "torchtune": (torchtune, ("torch", "torchtune", "torchao")),
}


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(case["seed"])
    clock = Clock()
    run, packages = SIDES[case["side"]]
    run(case, clock)
    versions = {name: getattr(importlib.import_module(name), "__version__", "") for name in packages}
    Path(case["result"]).write_text(json.dumps({"steps": clock.steps, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
