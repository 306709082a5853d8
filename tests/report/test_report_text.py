"""Shared wording: honest numbers and verdicts; report.md; the terminal's summary."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peftcli.report.console import print_summary
from peftcli.report.html import render_html
from peftcli.report.markdown import cell, fence, render_markdown
from peftcli.report.schema import PairedTest, Report
from peftcli.report.text import comparisons, duration, number, p_value, percent, short_count, size, verdict


def judged(values: dict[str, Any]) -> Any:
    return verdict(Report.model_validate(values))


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.921875, "92.2 %"),
        (0.5, "50.0 %"),
        (0.9999, "99.99 %"),
        (0.00004, "0.004 %"),
        (1e-9, "< 0.001 %"),
        (1 - 1e-9, "> 99.999 %"),
    ],
)
def test_percent_never_claims_all_or_nothing(share: float, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0"),
        (2.81431, "2.814"),
        (0.09031, "0.0903"),
        (18.7512, "18.75"),
        (1234.5, "1,234"),
        (5e-4, "5e-4"),
        (1.5e12, "1.5e12"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_units() -> None:
    assert [size(count) for count in (0, 1023, 1536, 2_034_237_440)] == ["0 B", "1023 B", "1.5 KiB", "1.89 GiB"]
    assert [duration(seconds) for seconds in (0.0, 1.25, 59.4, 75.2, 7260.0)] == ["0.0 s", "1.2 s", "59 s", "1 min 15 s", "2 h 1 min"]
    assert [short_count(count) for count in (512, 40_960, 134_515_008, 7e9)] == ["512", "41.0K", "134.5M", "7.0B"]


def test_verdict_leads_with_exact_match_then_loss(values: dict[str, Any]) -> None:
    assert judged(values).text == "Exact match 0 % → 92.2 % on 64 held-out rows"
    for name in ("eval", "eval_before"):
        values[name].update(generated=None)
        values[name]["metrics"].pop("exact_match")
        values[name]["intervals"].pop("exact_match")
    assert judged(values).text == "Held-out loss 2.931 → 0.0903 on 64 held-out rows"
    assert judged(values).tone == "good"


def test_verdict_is_not_kinder_than_the_numbers(values: dict[str, Any]) -> None:
    values["eval_before"]["metrics"].update(exact_match=0.95)
    assert judged(values).tone == "bad"
    assert "worse" in judged(values).detail
    values["eval_before"]["metrics"].update(exact_match=0.9)
    values["eval_before"]["intervals"]["exact_match"] = [0.8, 0.95]
    assert "may be chance" in judged(values).detail
    values["checks"]["live_adapter"]["passed"] = False
    assert judged(values).tone == "bad"
    assert "do not use" in judged(values).detail


def test_verdict_of_runs_that_did_not_end_well(values: dict[str, Any]) -> None:
    values.update(status="interrupted", eval=None)
    assert judged(values).text == "Interrupted after 128 steps"
    values.update(status="failed", error="out of memory")
    values["train"]["steps"] = 1
    assert (judged(values).text, judged(values).detail) == ("Failed after 1 step", "out of memory")


def test_comparisons_keep_the_plain_numbers(report: Report) -> None:
    found = {item.name: item for item in comparisons(report)}
    assert list(found) == ["exact_match", "token_accuracy", "loss", "perplexity"]
    assert report.eval is not None
    assert found["exact_match"].after == report.eval.metrics["exact_match"]
    assert found["exact_match"].interval_after == (0.8299, 0.9661)
    assert not found["exact_match"].doubtful
    assert found["loss"].tone == "good"


def test_markdown_holds_the_reports_numbers(report: Report, recipe_text: str) -> None:
    text = render_markdown(report, recipe_text, title="quickstart")
    assert text.startswith("# quickstart\n\n**Exact match 0 % → 92.2 % on 64 held-out rows**")
    assert "| Exact match | 0 % [0 %, 5.7 %] | 92.2 % [83.0 %, 96.6 %] |" in text
    assert "| Training | 512 | 40,960 | 14,336 | 0 | 1 | 131 |" in text
    assert "Live adapter: ✓ passed" in text
    assert recipe_text.strip() in text
    assert "<script>" not in text


def test_markdown_tables_survive_any_text(values: dict[str, Any]) -> None:
    values["examples"][0]["prompt"] = "a | b\n\n```\n<b>*x*</b> \\| # _y_ [z](http://e)"
    text = render_markdown(Report.model_validate(values), "x: '```'\n", title="t")
    rows = [line for line in text.splitlines() if line.startswith("| a ")]
    assert len(rows) == 1
    assert rows[0].replace("\\\\", "").replace("\\|", "").count("|") == 5
    assert "<b>" not in text
    assert "````yaml" in text


def test_cell_and_fence() -> None:
    assert cell("x" * 10, 4) == "xxxx… (6 more characters)"
    assert fence("a", "yaml") == "```yaml\na\n```"


def with_tests(values: dict[str, Any]) -> Report:
    """With the paired tests of two figures, of which one may be chance."""
    values["comparisons"] = {
        "exact_match": {"difference": 0.921875, "interval": [0.82, 0.97], "p_value": 1e-9, "test": "mcnemar"},
        "loss": {"difference": -2.8409, "interval": [-3.0, 0.1], "p_value": 0.07, "test": "bootstrap"},
    }
    return Report.model_validate(values)


def test_the_paired_test_decides_what_may_be_chance(values: dict[str, Any]) -> None:
    found = {item.name: item for item in comparisons(with_tests(values))}
    assert found["loss"].doubtful and not found["exact_match"].doubtful
    # The intervals of the two overlap, but the rows are the same and the test tells them apart, or the other way round.
    values["eval_before"]["metrics"].update(exact_match=0.9)
    values["eval_before"]["intervals"]["exact_match"] = [0.8, 0.95]
    values["comparisons"]["exact_match"].update(difference=0.021875, interval=[0.01, 0.05], p_value=0.004)
    assert judged(values).detail is None
    values["comparisons"]["exact_match"].update(p_value=0.5)
    assert judged(values).detail == "The gain may be chance: paired test, p = 0.50"
    values["eval_before"]["metrics"].update(exact_match=0.95)
    values["comparisons"]["exact_match"].update(difference=-0.028125, interval=[-0.1, 0.03])
    assert judged(values).detail == "The tuned model is worse than the base model, or equal: paired test, p = 0.50"


def test_paired_tests_are_shown_everywhere(values: dict[str, Any], recipe_text: str) -> None:
    report = with_tests(values)
    text = render_markdown(report, recipe_text, title="quickstart")
    assert "| +92.2 points [+82.0 points, +97.0 points], p < 0.001 |" in text
    assert "| -2.841 [-3.000, +0.1000], p = 0.070 |" in text
    assert "p: paired test over the same rows." in text
    assert "+92.2 points, p < 0.001" in shown(report)
    page = render_html(report, [], recipe_text, title="quickstart")
    assert "Difference: +92.2 points (+82.0 points to +97.0 points), p &lt; 0.001, McNemar's exact test" in page.replace("&nbsp;", " ")
    assert page.count("may be chance") == 1 and "paired bootstrap" in page


@pytest.mark.parametrize(
    ("p", "test", "words"),
    [
        (2 / 1001, "bootstrap", "p ≤ 0.002"),
        (1e-12, "mcnemar", "p < 0.001"),
        (0.004, "mcnemar", "p = 0.004"),
        (0.049, "bootstrap", "p = 0.049"),
        (1.0, "mcnemar", "p = 1.00"),
    ],
)
def test_p_values_in_words(p: float, test: Any, words: str) -> None:
    assert p_value(PairedTest(difference=0.1, interval=(0.0, 0.2), p_value=p, test=test)) == words


def shown(report: Report, folder: Path | None = None) -> str:
    out = io.StringIO()
    print_summary(report, Console(file=out, width=120), folder)
    return out.getvalue()


def test_summary_on_the_terminal(report: Report) -> None:
    text = shown(report, Path("runs/quickstart"))
    assert "Exact match 0 % → 92.2 % on 64 held-out rows" in text
    assert "runs/quickstart/report.html" in text
    assert "runs/quickstart/adapter/" in text
    assert "live-adapter check: passed, 420 tensors" in text
    assert text.count("request") == 3
    assert [line.split()[2:] for line in text.splitlines() if "perplexity" in line] == [["1.095"]]


def test_summary_cannot_be_steered_by_model_text(values: dict[str, Any]) -> None:
    values["examples"][0].update(prompt="[bold red]x[/] \x1b[2J", after="[/nonsense]")
    text = shown(Report.model_validate(values))
    assert "\x1b" not in text
    assert "[bold red]x[/]" in text
    assert "[/nonsense]" in text


def test_summary_without_evaluation(values: dict[str, Any]) -> None:
    values["eval"] = values["eval_before"] = values["data"]["eval"] = None
    values["examples"] = []
    assert "Training loss 2.814 → 0.0718 in 128 steps; no held-out rows" in shown(Report.model_validate(values))
