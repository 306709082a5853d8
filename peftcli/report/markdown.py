"""``report.md``: the report as a person pastes it into a pull request."""

from __future__ import annotations

import re

from peftcli.report.gates import gate_table
from peftcli.report.schema import LiveAdapterCheck, Report, SplitInfo
from peftcli.report.text import Comparison, change, comparisons, duration, metric, number, p_value, percent, plural, shorten, size, verdict

EXAMPLES = 3
CELL = 300


def cell(text: str, limit: int = CELL) -> str:
    """User text on one line of a Markdown table, with everything that Markdown or HTML would act on escaped."""
    text = shorten(text, limit).replace("\\", "\\\\")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([|`*_\[\]#~])", r"\\\1", text)
    return re.sub(r"\r\n|\r|\n", "<br>", text).replace("\t", " ").strip()


def fence(text: str, language: str) -> str:
    """``text`` in a code fence that is longer than any fence inside it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    ticks = "`" * (longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def render_markdown(report: Report, recipe_text: str, *, title: str) -> str:
    """The report in GitHub's Markdown.

    Args:
        report: the run.
        recipe_text: the resolved recipe, YAML; folded away at the end.
        title: the run's name.
    """
    judged = verdict(report)
    parts = [f"# {cell(title)}", f"**{cell(judged.text)}**" + (f"  \n{cell(judged.detail, 2000)}" if judged.detail else "")]
    if report.gates:
        parts.append(f"## Gates\n\n{gate_table(report.gates)}")
    parts.append(_facts(report))
    if found := comparisons(report):
        parts.append(_table(found))
    if report.examples:
        parts.append(_examples(report))
    parts.append(_data(report))
    parts.append(_checks(report))
    if report.notes:
        parts.append("\n".join(["## Notes", "", *(f"- {cell(note, 1000)}" for note in report.notes)]))
    env = report.environment
    packages = ", ".join(
        f"{name} {getattr(env, name)}" for name in ("torch", "transformers", "accelerate", "bitsandbytes") if getattr(env, name)
    )
    device = env.device_name or env.device
    parts.append(
        f"peftcli {cell(env.peftcli)} · Python {cell(env.python)} · {cell(packages)} · {cell(device)} · {plural(env.threads, 'thread')}"
    )
    parts.append(f"<details><summary>Recipe</summary>\n\n{fence(recipe_text, 'yaml')}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _facts(report: Report) -> str:
    model, train = report.model, report.train
    share = f" ({percent(model.trainable_parameters / model.parameters)})" if 0 < model.trainable_parameters <= model.parameters else ""
    precision = f"{model.dtype}, {model.quantization}" if model.quantization else model.dtype
    return "\n".join(
        [
            f"- Model: {cell(model.name)} ({model.parameters:,} parameters, {cell(precision)})",
            f"- Method: {cell(report.method.name)}, {model.trainable_parameters:,} trainable parameters{share}",
            (
                f"- Training: {plural(train.steps, 'step')}, {train.epochs:.4g} epochs, {train.supervised_tokens:,} supervised tokens "
                f"in {duration(train.seconds)} ({train.tokens_per_second:,.0f} tokens/s), peak memory {size(train.peak_memory_bytes)}"
            ),
            f"- Training loss: {number(train.loss_first)} → {number(train.loss_last)}",
        ]
    )


def _table(found: list[Comparison]) -> str:
    def shown(item: Comparison, value: float | None, interval: tuple[float, float] | None) -> str:
        plain = metric(item.name, value)
        return f"{plain} [{metric(item.name, interval[0])}, {metric(item.name, interval[1])}]" if value is not None and interval else plain

    def difference(item: Comparison) -> str:
        if item.test is None:
            return "–"
        low, high = (change(item.name, end) for end in item.test.interval)
        return f"{change(item.name, item.test.difference)} [{low}, {high}], {p_value(item.test)}"

    tested = any(item.test is not None for item in found)
    lines = [f"| Held-out rows | Base | Tuned |{' Difference |' if tested else ''}", f"| --- | ---: | ---: |{' ---: |' if tested else ''}"]
    lines += [
        f"| {item.label} | {shown(item, item.before, item.interval_before)} | {shown(item, item.after, item.interval_after)} |"
        + (f" {difference(item)} |" if tested else "")
        for item in found
    ]
    notes = ["Brackets: 95 % intervals."] if any(item.interval_before or item.interval_after for item in found) else []
    notes += ["p: paired test over the same rows."] if tested else []
    return "\n".join(lines) + (f"\n\n{' '.join(notes)}" if notes else "")


def _examples(report: Report) -> str:
    def answer(text: str | None, correct: bool | None) -> str:
        mark = {True: "✓ ", False: "✗ ", None: ""}[correct]
        return "–" if text is None else mark + (cell(text) or "(empty)")

    lines = ["## Examples", "", "| Request | Expected | Base | Tuned |", "| --- | --- | --- | --- |"]
    for item in report.examples[:EXAMPLES]:
        before, after = answer(item.before, item.correct_before), answer(item.after, item.correct_after)
        lines.append(f"| {cell(item.prompt)} | {cell(item.reference)} | {before} | {after} |")
    return "\n".join(lines)


def _data(report: Report) -> str:
    def row(name: str, split: SplitInfo) -> str:
        counts = (split.rows, split.tokens, split.supervised_tokens, split.truncated, split.dropped, split.longest)
        return f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |"

    lines = ["## Data", "", "| Split | Rows | Tokens | Supervised | Truncated | Dropped | Longest |", "| --- |" + " ---: |" * 6]
    lines.append(row("Training", report.data.train))
    if report.data.eval is not None:
        lines.append(row("Held-out", report.data.eval))
    return "\n".join(lines)


def live_adapter_line(check: LiveAdapterCheck) -> str:
    """The live-adapter check in one line, its faults counted."""
    faults = [f"{len(names)} {word}" for word in ("missing", "unexpected", "non_finite", "unmoved") if (names := getattr(check, word))]
    text = f"{plural(check.keys, 'tensor')} read back from disk" + (
        f": {', '.join(faults).replace('_', '-')}" if faults else ", none missing or unexpected"
    )
    if check.loss_before_save is not None and check.loss_after_reload is not None:
        text += f"; loss {number(check.loss_before_save, 6)} before the save, {number(check.loss_after_reload, 6)} after the reload"
    return text


def _checks(report: Report) -> str:
    lines = ["## Checks", ""]
    audit = report.checks.label_audit
    counts = ", ".join(
        f"{key.replace('_', ' ')} {value:,}" for key, value in audit.items() if isinstance(value, int) and not isinstance(value, bool)
    )
    lines.append(f"- Label audit: {cell(counts or 'passed')}" if audit else "- Label audit: not run")
    live = report.checks.live_adapter
    if live is None:
        lines.append("- Live adapter: not run, nothing was saved")
    else:
        note = f". {live.note}" if live.note else ""
        lines.append(f"- Live adapter: {'✓ passed' if live.passed else '✗ FAILED'}: {cell(live_adapter_line(live) + note, 1000)}")
    return "\n".join(lines)
