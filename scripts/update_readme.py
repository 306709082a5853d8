"""Fill the generated parts of README.md from the code, so that they cannot fall behind it.

    python scripts/update_readme.py            # write
    python scripts/update_readme.py --check    # exit 1 if a part is out of date

A part stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_summary
import compare_classifiers
import measure_tasks
from compare_methods import RESULTS, table
from pydantic import BaseModel

from peftcli.commands.methods import among, facts, families, merges
from peftcli.data.templates import shipped
from peftcli.errors import RecipeError
from peftcli.probe import FAMILIES, stored
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.render import reference_markdown
from peftcli.report.schema import Report
from peftcli.report.text import percent

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def methods() -> str:
    """A table of the methods, from the registry and from what a probe found."""
    own = list(stored())
    lines = [
        "| method | what it does | trains | merges | NF4 base | families | PEFT type | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in own:
        row = facts(name, stored()[name])
        cells = (
            f"`{name}`",
            row["summary"],
            percent(row["trainable_share"]),
            merges(row),
            among(row["nf4"], row["families"]),
            families(row),
        )
        paper = f"[{row['paper'].rpartition('/')[2]}]({row['paper']})"
        lines.append("| " + " | ".join((*cells, f"`{row['peft']}`" if row["peft"] else "none", paper)) + " |")
    titles = ", ".join(family.title for family in FAMILIES.values())
    counted = dict.fromkeys(stored()[name].counted_on for name in own)
    note = (
        f"Found by trying each method with its default options on tiny models (families: {titles}), and by counting on the shape of "
        f"{' or, without biases there, of '.join(counted)}; `peftcli methods --probe` tries again."
    )
    return "\n".join([*lines, "", note])


def templates() -> str:
    """The names of the shipped chat templates."""
    return "Shipped chat templates: " + ", ".join(f"`{name}`" for name in shipped()) + "."


def report() -> str:
    """The fields of report.json, from its schema."""
    return "\n".join(["| field | meaning |", "| --- | --- |", *_fields(Report, "")])


def _fields(part: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        inner = _part(field.annotation)
        meaning = field.description or (_first_sentence(inner.__doc__) if inner is not None else "")
        if inner is not None and not path:
            names = ", ".join(f"`{key}`" for key in inner.model_fields)
            yield f"| `{name}` | {meaning} {'Each has' if 'list' in str(field.annotation) else 'Fields:'} {names}. |"
        else:
            yield f"| `{path}{name}` | {meaning or _choices(field.annotation)} |"


def _part(annotation: Any) -> type[BaseModel] | None:
    """The part inside ``Part``, ``Part | None`` or ``list[Part]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in getattr(annotation, "__args__", ()) if (found := _part(inner)) is not None), None)


def _choices(annotation: Any) -> str:
    return ", ".join(f"`{choice}`" for choice in getattr(annotation, "__args__", ()))


def _first_sentence(text: str | None) -> str:
    flat = re.sub(r" \([^()]*https?://[^()]*\)", "", " ".join((text or "").split())).replace("``", "`")
    return re.split(r"[.;] ", flat)[0].rstrip(".") + "." if flat else ""


def layout() -> str:
    """The files of the package, one line each: the first sentence of its docstring."""
    lines = ["```", "peftcli/"]
    for path in sorted((ROOT / "peftcli").rglob("*.py"), key=_depth_last):
        inside = path.relative_to(ROOT / "peftcli")
        sentence = _first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
        if path.name == "__init__.py":
            if len(inside.parts) > 1:
                lines.append(f"  {inside.parent}/".ljust(28) + sentence)
        else:
            lines.append("    " * (len(inside.parts) - 1) + f"  {path.name}".ljust(28 - 4 * (len(inside.parts) - 1)) + sentence)
    return "\n".join([*lines, "```"])


def _depth_last(path: Path) -> tuple[object, ...]:
    """Files of the package itself first, then folder by folder, each led by its ``__init__``."""
    inside = path.relative_to(ROOT / "peftcli")
    return len(inside.parts) > 1, str(inside.parent), path.name != "__init__.py", path.name


def measured() -> str:
    """The figures of the recorded quickstart run."""
    run = Report.model_validate_json((ROOT / "scripts/results/quickstart.json").read_text(encoding="utf-8"))
    if run.eval is None or run.eval_before is None:
        raise SystemExit("scripts/results/quickstart.json has no evaluation; make figures")
    lines = ["| 64 held-out rows | base model | tuned | 95 % interval of tuned |", "| --- | --- | --- | --- |"]
    for name, form in (("exact_match", "{:.1%}"), ("token_accuracy", "{:.1%}"), ("loss", "{:.4f}"), ("perplexity", "{:.3f}")):
        before, after = run.eval_before.figure(name), run.eval.figure(name)
        low, high = run.eval.intervals[name]
        cells = (name.replace("_", " "), form.format(before), form.format(after), f"{form.format(low)} to {form.format(high)}")
        lines.append("| " + " | ".join(cells) + " |")
    train, where, model = run.train, run.environment, run.model
    return "\n".join(lines) + (
        f"\n\n{run.method.name} on {model.parameters / 1e6:.0f} million parameters ({model.trainable_parameters / 1e6:.1f} million "
        f"trained), {train.steps} steps, {train.tokens:,} tokens in {train.seconds:.0f} s: {train.tokens_per_second:.0f} tokens/s, "
        f"{train.peak_memory_bytes / 2**30:.1f} GiB resident at the peak. {where.device_name}, {where.threads} threads, "
        f"{where.cpu_capability}, {model.dtype}, torch {where.torch}, transformers {where.transformers}. "
        "No GPU figure has been measured yet."
    )


FAULTY = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
method: {name: lora, rnk: 16}
dataset: {train: rows.jsonl, format: mesages}
train: {epochs: 2, learning_rate: fast}
"""


def faults() -> str:
    """What a recipe with three mistakes is answered with."""
    try:
        parse_recipe(FAULTY, "recipe.yaml")
    except RecipeError as error:
        return f"```\nerror: {error.message}\n```"
    raise SystemExit("the faulty recipe has no fault")


def classifiers() -> str:
    """The comparison of methods on a classifier."""
    return compare_classifiers.table(json.loads(compare_classifiers.RESULTS.read_text(encoding="utf-8")))


def tasks() -> str:
    """Every task on real data, as recorded."""
    return measure_tasks.table()


def compared() -> str:
    """All methods at an equal budget, as recorded."""
    return table(json.loads(RESULTS.read_text(encoding="utf-8")))


def soak() -> str:
    """What `make soak` has counted, and how far a run moves in another environment."""
    found = json.loads((ROOT / "scripts/results/soak.json").read_text(encoding="utf-8"))
    lines = [
        "| killed runs of | kills | in a save | writing weights, reports or trace | runs | identical |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, family in found["kills"].items():
        methods = ", ".join(f"`{method}`" for method in family["methods"])
        cells = (family["kills"], family["inside_a_save"], family["inside_the_result"], family["runs"], family["identical"])
        lines.append(f"| {name}: {methods} | " + " | ".join(str(cell) for cell in cells) + " |")
    recipes, adapters, corrupted = (found[name] for name in ("recipes", "adapters", "checkpoints"))
    tracebacks = sum(part["tracebacks"] for part in (recipes, adapters, corrupted))
    note = (
        "*Runs*: that ended in spite of the kills; *identical*: in the same bytes as the run that was never killed. Besides: "
        f"{recipes['generated']:,} generated recipes ({recipes['valid']:,} valid, the others refused with places), {adapters['mutated']:,} "
        f"mutated adapters ({adapters['loaded']:,} loaded whole and finite, the others refused), {corrupted['corrupted']:,} corrupted "
        f"checkpoints ({corrupted['silent_loads']} loaded): {tracebacks} tracebacks."
    )
    return "\n".join([*lines, "", note])


def repeat() -> str:
    """How far a run's trace moves in another environment, as recorded."""
    found = json.loads((ROOT / "scripts/results/repeat.json").read_text(encoding="utf-8"))
    lines = [
        "| largest difference of a loss or gradient norm | steps | " + " | ".join(next(iter(found.values()))["largest_difference"]) + " |"
    ]
    lines.append("| --- | --- |" + " --- |" * (lines[0].count("|") - 3))
    for name, row in found.items():
        lines.append(f"| {name} | {row['steps']} | " + " | ".join(f"{value:.1g}" for value in row["largest_difference"].values()) + " |")
    return "\n".join(lines)


def speed() -> str:
    """Speed and memory beside the peers, as recorded: one table for each machine."""
    machines: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, dict[str, str]]]] = {}
    for path in sorted((ROOT / "scripts/results").glob("benchmark-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        where = found["machine"]
        about = f"{where['device_name']}, {where['cpu_capability']}, {where['threads']} thread{'s' * (where['threads'] > 1)}"
        about += ", float32" if any(run["case"]["dtype"] == "float32" for run in found["runs"]) else ""
        about += f", peftcli {where['peftcli']}"
        lines, runs, missing = machines.setdefault(about, ([], [], {}))
        lines += found["summary"]
        runs += found["runs"]
        missing |= found.get("without_twin", {})
    parts = []
    for about, (lines, runs, missing) in machines.items():
        versions: dict[str, str] = next((run["versions"] for run in runs if "versions" in run), {})
        means = benchmark_summary.means_in_words(lines, missing)
        where = "; ".join([about, ", ".join(f"{name} {version}" for name, version in versions.items())])
        parts += [benchmark_summary.compact(lines), "", means, "", f"{where}.", ""]
    return "\n".join(parts).rstrip()


def memory() -> str:
    """Predicted and measured peaks, as recorded."""
    found = json.loads((ROOT / "scripts/results/memory.json").read_text(encoding="utf-8"))
    lines = ["| run | predicted | measured | difference |", "| --- | --- | --- | --- |"]
    for run in found["runs"]:
        predicted, peak = (f"{run[name] / 2**20:,.0f} MiB" for name in ("predicted_bytes", "peak_bytes"))
        lines.append(f"| {run['case']} | {predicted} | {peak} | {run['difference']:+.1%} |")
    within = sum(abs(run["difference"]) <= 0.1 for run in found["runs"])
    where = found["machine"]
    about = f"{where['device_name']}, {where['cpu_capability']}, torch {where['torch']}, peftcli {where['peftcli']}"
    return "\n".join([*lines, "", f"{within} of {len(found['runs'])} within 10 %. {about}."])


PARTS = {
    "speed": speed,
    "memory": memory,
    "faults": faults,
    "measured": measured,
    "methods": methods,
    "compared": compared,
    "classifiers": classifiers,
    "tasks": tasks,
    "soak": soak,
    "repeat": repeat,
    "reference": reference_markdown,
    "templates": templates,
    "report": report,
    "layout": layout,
}


def filled(text: str) -> str:
    """``text`` with every generated part renewed.

    Raises:
        SystemExit: a part's markers are missing.
    """
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"README.md needs {begin} and {end}, each once")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make().strip()}\n{end}{rest.split(end)[1]}"
    return text


def main(arguments: list[str]) -> int:
    """Exit code 1 says that README.md is (with ``--check``) out of date."""
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in arguments:
        if new != old:
            print("README.md is out of date: make readme")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
