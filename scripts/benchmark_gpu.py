"""peftcli beside its peers on a GPU, on random weights of real shapes: tokens/s, and the smallest memory.

    python scripts/benchmark_gpu.py --steps 12                       # speed and memory cases, every peer
    python scripts/benchmark_gpu.py --only 8b-bf16 8b-fp8 --peers unsloth
    python scripts/benchmark_gpu.py --tiny                           # the same on a tiny shape, on any machine: does it run to the end?

LoRA of rank 16 on all linear layers; rows of full length, every token supervised; all sides get the same rows in the same order. Every run
is a process of its own, and the first two steps, which warm up and compile, are not counted. A figure is only ever of the machine that is
named beside it. Every peer runs in an environment of its own, which the script makes and pins (``--peer NAME=PYTHON`` takes one that
is there), at its default and at its best setting: with all activations kept. Ours runs in the variants that a recipe can ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import ROOT, apart, peer_environment, run_script

RESULTS = ROOT / "scripts" / "results"
PEER = ROOT / "scripts" / "references" / "gpu_side.py"
OURS = "peftcli"
SEED, WARM = 42, 2
_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "tie_word_embeddings": True},
    "8b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {**_LLAMA, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip
# What a peer's environment holds: those of our own packages that it takes at our versions, and what is its own.
PEERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trainer": (("torch", "transformers", "peft", "accelerate", "bitsandbytes"), ("liger-kernel==0.8.5",)),
    "trl": (("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"), ("liger-kernel==0.8.5", "trl==1.16.0")),
    "unsloth": ((), ("unsloth==2026.10.9",)),
    "torchtune": (("torch",), ("torchtune==0.6.1", "torchao==0.18.0")),
}


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        shape: of :data:`SHAPES`. ``kind``: ``bf16``, ``nf4`` or ``fp8`` (ours alone: the frozen products).
        length, batch_size: tokens of a row, rows of a step.
        recompute: ours recomputes activations. ``goal``: what is to be reached: tokens/s at least, or bytes at most with ``memory``.
        memory: the peak matters, not the time; ours runs alone.
    """

    shape: str
    kind: str
    length: int
    batch_size: int
    steps: int
    recompute: bool = False
    rank: int = 16
    learning_rate: float = 2e-4
    goal: float | None = None
    memory: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.kind}{'-memory' if self.memory else ''}"


def cases(steps: int, *, tiny: bool) -> list[Case]:
    """Everything that is measured, with the goals for one H200."""
    if tiny:
        speed = [Case("tiny", kind, 64, 2, steps) for kind in ("bf16", "nf4", "fp8")]
        return [*speed, Case("tiny", "nf4", 64, 1, steps, recompute=True, memory=True, goal=6.0e9)]
    goals = {"bf16": 17_000.0, "nf4": 15_000.0, "fp8": 22_000.0}
    return [
        *(Case("8b", kind, 4096, 2, steps, goal=goal) for kind, goal in goals.items()),
        *(Case("1b", kind, 4096, 4, steps) for kind in goals),
        Case("8b", "nf4", 2048, 1, steps, recompute=True, memory=True, goal=6.0e9),
        Case("70b", "nf4", 2048, 1, steps, recompute=True, memory=True, goal=40.0e9),
    ]


def rows_of(case: Case) -> list[list[int]]:
    """The case's tokens, the same for every side."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(SEED))
    drawn = generator.integers(4, SHAPES[case.shape]["vocab_size"], (case.steps * case.batch_size, case.length))
    return [[int(token) for token in row] for row in drawn]


# ---------------------------------------------------------------- in processes of their own


def random_model(case: Case, device: Any) -> Any:
    """A model of the case's shape with random weights, made layer by layer: no dense copy of a quantized one ever exists."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from peftcli.kernels import attention
    from peftcli.methods.targets import replace
    from peftcli.model.fused import fuse
    from peftcli.model.load import quantizable
    from peftcli.quantization import quantize_linear

    config = LlamaConfig(**SHAPES[case.shape], bos_token_id=0, eos_token_id=1, pad_token_id=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.register())
    generator = torch.Generator(device).manual_seed(SEED)
    quantized = set(quantizable(model)) if case.kind == "nf4" else set()
    done: dict[int, Any] = {}
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                if parameter.dim() > 1:
                    value.normal_(0.0, 0.02, generator=generator)
                done[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
            setattr(module, key, done[id(parameter)])
        if name in quantized:
            done.clear()  # a quantized weight is shared by nobody, and its dense one goes
            replace(model, name, quantize_linear(module, "nf4", double=True, compute_dtype=torch.bfloat16))
    if config.tie_word_embeddings:
        model.tie_weights()
    # Its tables are made when it is made, and these were made without memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    fuse(model)
    return model.eval()


def write_model(case: Case, folder: Path) -> None:
    """The same weights as a folder, for the peers."""
    import torch

    model = random_model(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)


def ours(case: Case, work: Path, result: Path) -> None:
    """The training loop of ``peftcli train`` over the random model."""
    import numpy as np
    import torch
    from accelerate import Accelerator

    from peftcli.data.batching import Plan
    from peftcli.data.splits import SplitCounts, TextSplit
    from peftcli.environment import make_repeatable
    from peftcli.kernels import fast
    from peftcli.methods import registry
    from peftcli.methods.base import Context
    from peftcli.model.eight_bit import multiply_in_8_bits, refuse
    from peftcli.model.load import checkpoint_activations
    from peftcli.recipe.schema import TrainSection
    from peftcli.recipe.tasks import CausalLMTask
    from peftcli.report.progress import NullProgress
    from peftcli.tasks import registry as tasks
    from peftcli.tasks.base import Layout
    from peftcli.train.loop import Loop
    from peftcli.train.optimizers import build_optimizer
    from peftcli.train.signals import StopRequest

    gpu = torch.cuda.is_available()
    make_repeatable(SEED, deterministic=False)
    fast.switch(on=True)
    accelerator = Accelerator(cpu=not gpu)
    device = accelerator.device
    model = random_model(case, device)
    kind = registry.get("lora")
    options = {"name": "lora", "rank": case.rank, "alpha": 2 * case.rank, "dropout": 0.0, "target_modules": "all-linear"}
    method = kind(kind.Config.model_validate(options))
    model = method.apply(model, Context(SEED, frozen_quantized=case.kind == "nf4"))
    if case.kind == "fp8":
        refuse("fp8", torch.bfloat16, device)
        multiply_in_8_bits(model, "fp8")
    if case.recompute:
        checkpoint_activations(model)
    rows = json.loads((work / "rows.json").read_text(encoding="utf-8"))
    ids = [np.asarray(row, dtype=np.int32) for row in rows]
    learned = [np.asarray([False] + [True] * (case.length - 1)) for _ in ids]
    counts = SplitCounts(len(ids), len(ids) * case.length, len(ids) * (case.length - 1), 0, 0, case.length)
    split = TextSplit([f"random:{i + 1}" for i in range(len(ids))], counts, [], ids, learned, stop_ids=(1,))
    values = {"batch_size": case.batch_size, "learning_rate": case.learning_rate, "scheduler": "constant", "warmup_ratio": 0.0}
    section = TrainSection.model_validate({**values, "max_steps": case.steps, "logging_steps": 1, "max_grad_norm": 1.0})
    plan = Plan(lengths=split.lengths, batch_size=case.batch_size, batch_tokens=None, accumulation=1, processes=1, seed=SEED, shuffle=False)
    task = tasks.make(CausalLMTask())
    steps: list[dict[str, float]] = []

    class Clock(NullProgress):
        mark = 0.0

        def start(self, total_steps: int, initial_step: int = 0) -> None:
            Clock.mark = _now()

        def step(self, record: dict[str, Any]) -> None:
            now = _now()
            peak = torch.cuda.max_memory_allocated() if gpu else 0
            steps.append({"seconds": now - Clock.mark, "peak_bytes": peak, "loss": record["loss"]})
            Clock.mark = now

    def _now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    with StopRequest() as stop:
        Loop(
            accelerator=accelerator, method=method, task=task, module=task.module(model), model=model,
            optimizer=build_optimizer(method.param_groups(model, case.learning_rate, 0.0), section, device), split=split, plan=plan,
            settings=section, total_steps=case.steps, layout=Layout(True, 3, device), evaluate=lambda: None, metrics=None, display=Clock(),
            folder=work / "checkpoints", identity={}, stop=stop,
        ).run()  # fmt: skip
    result.write_text(json.dumps({"steps": steps, "fast_paths": fast.taken()}), encoding="utf-8")


# ---------------------------------------------------------------- the comparison


def run_peer(python: Path, side: str, variant: str, case: Case, work: Path, result: Path) -> None:
    description = {
        **asdict(case), "side": side, "variant": variant, "model": str(work / "model"), "rows": str(work / "rows.json"), "seed": SEED,
        "quantization": "nf4" if case.kind == "nf4" else None, "shape": SHAPES[case.shape], "result": str(result),
    }  # fmt: skip
    run_script(python, PEER, description, work, result)


def measure(case: Case, side: str, variant: str, work: Path, python: Path | None) -> dict[str, Any]:
    """One run: its rate after the warm-up and its peak, or why there are none."""
    result = work / f"{side}-{variant or 'ours'}.json"
    result.unlink(missing_ok=True)
    head = {"case": asdict(case) | {"name": case.name}, "side": side, "variant": variant}
    try:
        if python is None:
            apart(ours, case, work, result)
        else:
            run_peer(python, side, variant, case, work, result)
    except RuntimeError as error:
        return {**head, "failed": str(error)}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    seconds = statistics.median(step["seconds"] for step in found["steps"][WARM:])
    rate, peak = case.batch_size * case.length / seconds, max(step["peak_bytes"] for step in found["steps"])
    return {**head, "tokens_per_second": rate, "peak_bytes": peak, **found}


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as Markdown, with how many times faster ours is than each side in the same work."""
    head = ["case", "side", "variant", "tok/s", "peak GB", "last loss", "ours is faster", "goal"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    own = {run["case"]["name"]: run for run in runs if run["side"] == OURS and "failed" not in run}
    for run in runs:
        case, cells = run["case"], [run["case"]["name"], run["side"], run["variant"]]
        if "failed" in run:
            lines.append("| " + " | ".join([*cells, f"failed: {run['failed'][:100].replace('|', '/')}", *[""] * 4]) + " |")
            continue
        cells += [f"{run['tokens_per_second']:.0f}", f"{run['peak_bytes'] / 1e9:.2f}", f"{run['steps'][-1].get('loss', float('nan')):.4f}"]
        beside = own.get(case["name"])
        cells.append(f"{beside['tokens_per_second'] / run['tokens_per_second']:.2f}x" if beside and run["side"] != OURS else "")
        goal = case["goal"]
        if goal is None or run["side"] != OURS:
            cells.append("")
        elif case["memory"]:
            cells.append(f"at most {goal / 1e9:.1f} GB: " + ("not measured" if not run["peak_bytes"] else _yes(run["peak_bytes"] <= goal)))
        else:
            cells.append(f"at least {goal:.0f} tok/s: {_yes(run['tokens_per_second'] >= goal)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _yes(reached: bool) -> str:
    return "reached" if reached else "not reached"


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    from peftcli.environment import describe

    return describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"), deterministic=False).model_dump()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on any machine; says nothing about speed")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="names such as 8b-bf16, 8b-nf4-memory; default: all")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--variants", nargs="+", choices=("default", "best"), default=["default", "best"])
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=PYTHON", help="an interpreter that has this peer already")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv" / "gpu-peers", help="the peers', made where missing")
    parser.add_argument("--steps", type=int, default=12, help=f"of which the first {WARM} are not counted")
    parser.add_argument("--work", type=Path, help="folder for models and runs; default: a temporary one")
    parser.add_argument("--results", type=Path, help="JSON file; the table lies beside it; default: scripts/results/<machine>.json")
    args = parser.parse_args()
    if args.steps <= WARM:
        parser.error(f"--steps has to be above {WARM}")
    return args


def main() -> None:
    import torch

    args = arguments()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        raise SystemExit("no CUDA device: figures of a GPU are measured on one. --tiny runs the script to its end on any machine.")
    todo = [case for case in cases(args.steps, tiny=args.tiny) if not args.only or case.name in args.only]
    if not todo:
        raise SystemExit(f"--only: no such case; there are {', '.join(case.name for case in cases(args.steps, tiny=args.tiny))}")
    ready = dict(item.split("=", 1) for item in args.peer)
    pythons = {
        name: Path(ready[name]) if name in ready else peer_environment(args.environments / name, name, *PEERS[name]) for name in args.peers
    }
    facts, runs = machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        for case in todo:
            work = (args.work or Path(temporary)) / case.name
            work.mkdir(parents=True, exist_ok=True)
            (work / "rows.json").write_text(json.dumps(rows_of(case)), encoding="utf-8")
            # Frozen products in FP8 are ours alone: the peers' rates on the same work are those of the bf16 case.
            sides = [] if case.memory or case.kind == "fp8" else [(name, variant) for name in pythons for variant in args.variants]
            if sides and not (work / "model").exists():
                dense = Case(case.shape, "bf16", case.length, case.batch_size, case.steps)
                apart(write_model, dense, work / "model")
            for side, variant in [(OURS, ""), *sides]:
                runs.append(measure(case, side, variant, work, pythons.get(side)))
                print(json.dumps({key: value for key, value in runs[-1].items() if key not in ("steps", "case")}), file=sys.stderr)
    name = re.sub(r"[^a-z0-9]+", "-", str(facts.get("device_name") or platform.machine()).lower()).strip("-")
    out = args.results or RESULTS / f"{name}.json"
    if args.tiny and args.results is None:
        print(table(runs))
        return
    out.write_text(json.dumps({"machine": facts, "runs": runs}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(runs) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
