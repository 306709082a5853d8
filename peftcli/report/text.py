"""Wording that the terminal, report.md and report.html share: numbers, the verdict, the before/after table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from peftcli.report.catalogue import FIGURES, GENERATED, figure
from peftcli.report.schema import EvalInfo, PairedTest, Report

Tone = Literal["good", "bad", "neutral"]
# A difference whose p-value is not below may be chance.
SIGNIFICANT = 0.05


def percent(share: float) -> str:
    """``0.921875`` as ``92.2 %``. 0 % and 100 % are said only of exactly 0 and 1."""
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    for digits in (1, 2, 3):
        text = f"{share * 100:.{digits}f}"
        if float(text) not in (0.0, 100.0):
            return f"{text} %"
    return "< 0.001 %" if share < 0.5 else "> 99.999 %"


def number(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits, or an en dash where there is none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 1)}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.01:  # leading zeros are no significant digits
        return f"{value:.{digits - 1 - math.floor(math.log10(size))}f}"
    whole = len(str(int(size))) if size >= 1 else 0
    return f"{value:.{max(digits - whole, 0)}f}"


def metric(name: str, value: float | None) -> str:
    """A metric's value as people write it: shares in percent, losses plain."""
    if value is None:
        return "–"
    return percent(value) if figure(name).share else number(float(value))


def change(name: str, value: float) -> str:
    """A metric's difference with its sign; of shares in percentage points."""
    size = abs(value)
    shown = f"{size * 100:.1f} points" if figure(name).share else number(size)
    return f"{'-' if value < 0 else '+' if value > 0 else '±'}{shown}"


def p_value(test: PairedTest) -> str:
    """``p = 0.03``, or a bound where it is small: ``p < 0.001``, ``p ≤ 0.002`` (as far as resampling tells)."""
    if test.test == "bootstrap" and test.p_value <= 0.002:
        return "p ≤ 0.002"
    return "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.{3 if test.p_value < 0.1 else 2}f}"


def size(count: float) -> str:
    """Bytes in binary units, such as ``1.24 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def short_count(value: float) -> str:
    """``134515008`` as ``134.5M``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'K' else limit):.1f}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """``75.2`` as ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def plural(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shorten(text: str, limit: int) -> str:
    """``text``, cut to ``limit`` characters, saying how much was left out."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


@dataclass(frozen=True)
class Comparison:
    """One metric of the base and the tuned model.

    Attributes:
        before, after: plain numbers, ``None`` where not measured.
        interval_before, interval_after: 95 % intervals, ``None`` where not computed.
        test: the paired test of the two, ``None`` where there is none.
    """

    name: str
    before: float | None
    after: float | None
    interval_before: tuple[float, float] | None
    interval_after: tuple[float, float] | None
    test: PairedTest | None = None

    @property
    def label(self) -> str:
        return figure(self.name).label

    @property
    def tone(self) -> Tone:
        if self.before is None or self.after is None or self.before == self.after:
            return "neutral"
        return "good" if (self.after > self.before) == figure(self.name).higher_is_better else "bad"

    @property
    def doubtful(self) -> bool:
        """The difference may be chance: the paired test says so, or where there is none, the two intervals share a point."""
        if self.test is not None:
            return self.test.p_value >= SIGNIFICANT
        if self.interval_before is None or self.interval_after is None:
            return False
        return self.interval_before[0] <= self.interval_after[1] and self.interval_after[0] <= self.interval_before[1]


def comparisons(report: Report) -> list[Comparison]:
    """The metrics that were measured before or after, the most telling first."""

    def value(info: EvalInfo | None, name: str) -> float | None:
        return None if info is None else info.figure(name)

    def interval(info: EvalInfo | None, name: str) -> tuple[float, float] | None:
        return None if info is None else info.intervals.get(name)

    before, after = report.eval_before, report.eval
    measured = [name for info in (before, after) if info is not None for name in info.metrics]
    names = list(dict.fromkeys((*FIGURES, *measured)))
    tests = report.comparisons
    found = (
        Comparison(name, value(before, name), value(after, name), interval(before, name), interval(after, name), tests.get(name))
        for name in names
    )
    return [item for item in found if item.before is not None or item.after is not None]


@dataclass(frozen=True)
class Verdict:
    """The run in one sentence.

    Attributes:
        text: the sentence, without a full stop.
        tone: good, bad or neutral.
        detail: what qualifies it (a failed check, a difference that may be chance), or ``None``.
    """

    text: str
    tone: Tone
    detail: str | None = None


def verdict(report: Report) -> Verdict:
    """The one line that a person reads first. Never kinder than the numbers."""
    steps = plural(report.train.steps, "step")
    if report.status == "failed":
        return Verdict(f"Failed after {steps}", "bad", report.error)
    if report.status == "interrupted":
        return Verdict(f"Interrupted after {steps}", "neutral", "Continue with --resume")
    sentence, tone, detail = _outcome(report, steps)
    live = report.checks.live_adapter
    if live is not None and not live.passed:
        return Verdict(sentence, "bad", "The live-adapter check failed: do not use the saved weights")
    return Verdict(sentence, tone, detail)


def _outcome(report: Report, steps: str) -> tuple[str, Tone, str | None]:
    detail = "Stopped early: the held-out loss no longer fell" if report.status == "stopped_early" else None
    found = comparisons(report)
    if report.eval is None or not found:
        if report.train.loss_last is None:
            return f"Ran {steps} without a logged loss", "neutral", detail
        return (
            f"Training loss {number(report.train.loss_first)} → {number(report.train.loss_last)} in {steps}; no held-out rows",
            "neutral",
            detail,
        )
    # Without generated answers the loss says more than the accuracy of single tokens.
    told = [item for item in found if item.after is not None and item.name not in ("token_accuracy", "perplexity")]
    lead = told[0] if told else found[0]
    rows = report.eval.generated if lead.name in GENERATED and report.eval.generated else report.eval.rows
    label = lead.label if lead.name in GENERATED else f"Held-out {lead.name.replace('_', ' ')}"
    moved = metric(lead.name, lead.after) if lead.before is None else f"{metric(lead.name, lead.before)} → {metric(lead.name, lead.after)}"
    why = f"paired test, {p_value(lead.test)}" if lead.test is not None else "the 95 % intervals overlap"
    if lead.tone == "bad":
        detail = "The tuned model is worse than the base model" + (f", or equal: {why}" if lead.doubtful else "")
    elif lead.doubtful and lead.tone == "good":
        detail = f"The gain may be chance: {why}"
    held = "held-out row" if rows == 1 else "held-out rows"
    return f"{label} {moved} on {rows:,} {held}", lead.tone, detail
