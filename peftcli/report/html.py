"""``report.html``: one self-contained page. No script, no outside resource; light and dark; prints well."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from peftcli.report.bars import bars
from peftcli.report.catalogue import figure
from peftcli.report.curves import training_section
from peftcli.report.highlight import highlight_yaml
from peftcli.report.markdown import live_adapter_line
from peftcli.report.markup import badge, data, facts, section, table, text, user_text
from peftcli.report.schema import Example, Gate, LiveAdapterCheck, Report, SplitInfo
from peftcli.report.text import (
    Comparison,
    change,
    comparisons,
    duration,
    metric,
    number,
    p_value,
    percent,
    plural,
    short_count,
    size,
    verdict,
)

AUDIT_CHARACTERS = 8_000
_TESTS = {"mcnemar": "McNemar's exact test", "bootstrap": "paired bootstrap"}
_STATUS = {
    "completed": ("completed", "good", "✓"),
    "stopped_early": ("stopped early", "good", "✓"),
    "interrupted": ("interrupted", "neutral", "◼"),
    "failed": ("failed", "bad", "✗"),
}


def render_html(report: Report, metrics: Sequence[dict[str, Any]], recipe_text: str, *, title: str) -> str:
    """The whole page.

    Args:
        report: the run.
        metrics: records of ``metrics.jsonl``; may be empty.
        recipe_text: the resolved recipe, YAML.
        title: the run's name.
    """
    css = resources.files("peftcli.report").joinpath("report.css").read_text(encoding="utf-8")
    sections = [
        _results(report),
        training_section(report, metrics),
        _examples(report),
        _data(report),
        _checks(report),
        _details(report, recipe_text),
    ]
    # The policy is a second wall behind the escaping: a browser runs and loads nothing from this page.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)} · peftcli report</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"{_header(report, title)}\n<main>\n"
        + "\n".join(part for part in sections if part)
        + f"\n</main>\n{_footer(report)}\n</body>\n</html>\n"
    )


def _header(report: Report, title: str) -> str:
    judged = verdict(report)
    model, train = report.model, report.train
    detail = f'<p class="detail {judged.tone}">{text(judged.detail)}</p>' if judged.detail else ""
    precision = f"{model.dtype} · {model.quantization}" if model.quantization else model.dtype
    share = f" ({percent(model.trainable_parameters / model.parameters)})" if 0 < model.trainable_parameters <= model.parameters else ""
    headline = text(judged.text).replace(" %", "&nbsp;%")
    total = data(model.parameters, short_count(model.parameters))
    trained = data(model.trainable_parameters, short_count(model.trainable_parameters))
    steps = data(train.steps, plural(train.steps, "step"))
    pairs = [
        (
            "Base model",
            f"<bdi>{text(model.name)}</bdi><small>{total} parameters · {text(precision)}</small>",
        ),
        (
            "Method",
            f"{text(report.method.name)}<small>{trained} trainable{share}</small>",
        ),
        (
            "Training",
            f"{data(train.seconds, duration(train.seconds))}<small>{steps} · {train.epochs:.4g} epochs</small>",
        ),
        ("Peak memory", f"{data(train.peak_memory_bytes, size(train.peak_memory_bytes))}<small>{_memory_kind(report)}</small>"),
    ]
    return (
        f'<header><p class="kicker"><bdi>{text(title)}</bdi> {badge(*_STATUS[report.status])}</p>'
        f'<h1 class="{judged.tone}">{headline}</h1>{detail}{facts(pairs)}</header>'
    )


def _memory_kind(report: Report) -> str:
    return "resident, this process" if report.train.peak_memory_kind == "resident" else "allocated on the GPU"


def _results(report: Report) -> str:
    cards = "".join(_card(item, lead=index == 0) for index, item in enumerate(comparisons(report)))
    if not cards:
        return (
            section("results", "Before and after", '<p class="empty">No held-out rows were measured.</p>')
            if report.status != "failed"
            else ""
        )
    measured = report.eval or report.eval_before
    assert measured is not None
    count = f"{plural(measured.rows, 'held-out row')}, {plural(measured.supervised_tokens, 'supervised token')}"
    if measured.generated is not None:
        count += f"; answers generated for {measured.generated:,}"
    known = any(info is not None and info.intervals for info in (report.eval_before, report.eval))
    whiskers = " Whiskers are 95 % intervals." if known else ""
    return section("results", "Before and after", f'<p class="lede">{count}.{whiskers}</p><div class="cards">{cards}</div>')


def _card(item: Comparison, *, lead: bool) -> str:
    def shown(value: float) -> str:
        return metric(item.name, value)

    sides = [("Base", "before", item.before, item.interval_before), ("Tuned", "after", item.after, item.interval_after)]
    rows = [(name, style, value, interval) for name, style, value, interval in sides if value is not None]
    numbers = '<span class="arrow" aria-label="to">→</span>'.join(
        f'<span class="{style}">{data(value, shown(value))}</span>' for _, style, value, _ in rows
    )
    ranges = [f"{name.lower()} {shown(interval[0])} to {shown(interval[1])}" for name, _, _, interval in rows if interval]
    words = figure(item.name)
    hint = ", ".join(part for part in (words.meaning, "higher is better" if words.higher_is_better else "lower is better") if part)
    top = words.top if words.higher_is_better else None
    named = "".join(f"<span>{name}</span>" for name, _, _, _ in rows)
    footnote = f'<p class="range">95 %: {text("; ".join(ranges))}</p>' if ranges else ""
    if item.test is not None:
        low, high = (change(item.name, end) for end in item.test.interval)
        footnote += (
            f'<p class="range">Difference: {text(change(item.name, item.test.difference))} ({text(low)} to {text(high)}), '
            f"{text(p_value(item.test))}, {_TESTS[item.test.test]}</p>"
        )
    doubt = badge("may be chance", "neutral", "≈") if item.doubtful else ""
    verdict_mark = badge("worse", "bad", "▼") + doubt if item.tone == "bad" else doubt if item.tone == "good" else ""
    return (
        f'<article class="card{" lead" if lead else ""}"><h3>{item.label}{verdict_mark}</h3><p class="big">{numbers}</p>'
        f'<div class="barbox"><div class="barnames" aria-hidden="true">{named}</div>{bars(item.label, rows, top=top, show=shown)}</div>'
        f'{footnote}<p class="hint">{text(hint)}</p></article>'
    )


def _answer(value: str | None, correct: bool | None) -> str:
    if value is None:
        return '<span class="empty">–</span>'
    mark = "" if correct is None else badge("correct", "good", "✓") if correct else badge("wrong", "bad", "✗")
    return mark + user_text(value)


def _examples(report: Report) -> str:
    if not report.examples:
        return ""
    answered = report.examples
    columns: list[tuple[str, Callable[[Example], str]]] = [("Expected", lambda item: user_text(item.reference))]
    if any(item.before is not None for item in answered):
        columns.append(("Base model", lambda item: _answer(item.before, item.correct_before)))
    if any(item.after is not None for item in answered):
        columns.append(("Tuned model", lambda item: _answer(item.after, item.correct_after)))
    rows = [[user_text(item.prompt), *(cell(item) for _, cell in columns)] for item in answered]
    head = ["Request", *(name for name, _ in columns)]
    return section("examples", "Examples", table(head, rows, name="example-table", label="Example answers", class_="examples"))


def _data(report: Report) -> str:
    def row(name: str, split: SplitInfo) -> list[str]:
        share = (
            f" <small>({percent(split.supervised_tokens / split.tokens)})</small>" if 0 < split.supervised_tokens <= split.tokens else ""
        )
        cells = [
            data(getattr(split, key), f"{getattr(split, key):,}")
            for key in ("rows", "tokens", "supervised_tokens", "truncated", "dropped", "longest")
        ]
        return [name, *cells[:2], cells[2] + share, *cells[3:]]

    rows = [row("Training", report.data.train)]
    if report.data.eval is not None:
        rows.append(row("Held-out", report.data.eval))
    head = ["Split", "Rows", "Tokens", "Supervised tokens", "Truncated", "Dropped", "Longest row"]
    return section("data", "Data", table(head, rows, name="data-table", label="Data counts", class_="counts"), _audit_example(report))


def _audit_example(report: Report) -> str:
    pieces = _pairs(report.checks.label_audit.get("example"))
    if not pieces:
        return ""
    room, parts = AUDIT_CHARACTERS, []
    for piece, supervised in pieces:
        shown = text(piece[:room])
        parts.append(f"<mark>{shown}</mark>" if supervised else f"<span>{shown}</span>")
        room -= len(piece)
        if room <= 0:
            parts.append('<span class="more"> … cut</span>')
            break
    return (
        '<figure class="audit"><figcaption>One training row as the model sees it: '
        "<mark>marked tokens</mark> carry loss, the others are context.</figcaption>"
        f'<div class="user" dir="auto">{"".join(parts)}</div></figure>'
    )


def _pairs(value: Any) -> list[tuple[str, bool]]:
    """The label audit's example, neighbours of one kind joined; empty where it has another shape."""
    joined: list[tuple[str, bool]] = []
    for item in value if isinstance(value, list) else []:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            return []
        if joined and joined[-1][1] == bool(item[1]):
            joined[-1] = (joined[-1][0] + item[0], joined[-1][1])
        else:
            joined.append((item[0], bool(item[1])))
    return joined


def _checks(report: Report) -> str:
    audit = {key: value for key, value in report.checks.label_audit.items() if key != "example"}
    audited = facts((_name(key), _free(value)) for key, value in audit.items() if key != "passed")
    state = badge("not run", "neutral") if not report.checks.label_audit else badge("passed", "good", "✓")
    if audit.get("passed") is False:
        state = badge("failed", "bad", "✗")
    first = f'<article class="card"><h3>Label audit {state}</h3>{audited if audit else ""}</article>'
    cards = f'<div class="cards checks">{first}{_live(report.checks.live_adapter)}</div>'
    return section("checks", "Checks", cards, _gates(report.gates))


def _gates(gates: Sequence[Gate]) -> str:
    if not gates:
        return ""
    rows = [
        [
            f"<code>{text(gate.key)}</code>",
            "not measured" if gate.found is None else data(gate.found, number(gate.found, 6)),
            text(gate.expected),
            badge("passed", "good", "✓") if gate.passed else badge("failed", "bad", "✗"),
        ]
        for gate in gates
    ]
    return table(["Gate", "Found", "Expected", ""], rows, name="gate-table", label="What the recipe expects", class_="counts")


def _free(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return data(value, f"{value:,}" if isinstance(value, int) else number(value))
    return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _name(key: str) -> str:
    """``eos_supervised_rows`` as ``EOS supervised rows``."""
    words = [word.upper() if word in ("eos", "bos", "id", "ids", "sha256") else word for word in key.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def _live(check: LiveAdapterCheck | None) -> str:
    if check is None:
        return f'<article class="card"><h3>Live adapter {badge("not run", "neutral")}</h3><p>Nothing was saved.</p></article>'
    state = badge("passed", "good", "✓") if check.passed else badge("failed", "bad", "✗")
    kinds = [
        ("Missing", check.missing),
        ("Unexpected", check.unexpected),
        ("Not finite", check.non_finite),
        ("Did not move", check.unmoved),
    ]
    faults = "".join(
        f"<details open><summary>{label} ({len(names)})</summary><ul>{_code_items(names[:50])}</ul></details>"
        for label, names in kinds
        if names
    )
    note = f"<p>{text(check.note)}</p>" if check.note else ""
    return f'<article class="card"><h3>Live adapter {state}</h3><p>{text(live_adapter_line(check))}.</p>{note}{faults}</article>'


def _code_items(names: Sequence[str]) -> str:
    return "".join(f"<li><code>{text(name)}</code></li>" for name in names)


def _details(report: Report, recipe_text: str) -> str:
    notes = f"<ul>{''.join(f'<li>{text(note)}</li>' for note in report.notes)}</ul>" if report.notes else ""
    method = [("Name", text(report.method.name)), *((key, _free(value)) for key, value in report.method.options.items())]
    if report.method.paper:
        method.append(("Paper", text(report.method.paper)))
    environment = [(key.replace("_", " "), _free(value)) for key, value in report.environment.model_dump().items() if value is not None]
    order = report.data.batch_order_sha256
    sources = [[text(item.path), f"<code>{text(item.sha256 or '–')}</code>"] for item in report.data.files]
    sources += [["batch order", f"<code>{text(order)}</code>"]] if order else []
    written = [[text(path), f"<code>{text(digest)}</code>"] for path, digest in report.files.items()]
    model = [(key, _free(value)) for key, value in report.model.model_dump().items() if value is not None]
    folded = [
        ("Recipe", f'<pre class="yaml" tabindex="0"><code>{highlight_yaml(recipe_text.rstrip())}</code></pre>'),
        ("Model and method", facts(model) + facts(method)),
        ("Environment", facts(environment)),
        ("Data files", table(["File", "SHA-256"], sources, name="source-table", label="Data files", class_="hashes") if sources else ""),
        (
            "Files of this run",
            table(["File", "SHA-256"], written, name="file-table", label="Files of this run", class_="hashes") if written else "",
        ),
    ]
    parts = "".join(
        f'<details class="fold"{" open" if name == "Recipe" else ""}><summary>{name}</summary>{body}</details>'
        for name, body in folded
        if body
    )
    return section("notes", "Notes", notes) + section("details", "Details", parts)


def _footer(report: Report) -> str:
    env = report.environment
    made = f" · {text(report.created)}" if report.created else ""
    device = env.device_name or env.device
    return (
        f"<footer>peftcli {text(env.peftcli)} · torch {text(env.torch)} · {text(device)} · {plural(env.threads, 'thread')}{made}</footer>"
    )
