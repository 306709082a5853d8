"""Gates: what a recipe expects of its run, judged from the report, said everywhere, and written as CI reads it."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from peftcli.errors import GateFailed
from peftcli.report import gates
from peftcli.report.html import render_html
from peftcli.report.markdown import render_markdown
from peftcli.report.schema import EvalInfo, Report


def judged(report: Report, expect: dict[str, str]) -> dict[str, bool]:
    return {gate.key: gate.passed for gate in gates.judge(expect, report)}


def test_every_key_that_may_be_named_is_found_in_a_report(report: Report) -> None:
    """No key of the list leads nowhere: each is a number, or one that this run did not measure."""
    found = {gate.key: gate.found for gate in gates.judge(dict.fromkeys(gates.known(), ">= 0"), report)}
    assert len(found) > 60
    for key in (
        "eval.loss",
        "eval.rows",
        "eval_before.loss",
        "train.steps",
        "train.peak_memory_bytes",
        "model.parameters",
        "data.train.rows",
    ):
        assert isinstance(found[key], (int, float)), key
    assert report.eval is not None
    assert found["eval.loss"] == report.eval.loss
    assert found["eval.supervised_tokens"] == report.eval.supervised_tokens
    assert found["train.peak_memory_bytes"] == report.train.peak_memory_bytes
    assert found["eval.token_accuracy"] == report.eval.metrics["token_accuracy"]
    assert found["eval.matthews"] is None


@pytest.mark.parametrize(
    ("comparison", "passed"),
    [("<= 1.5", True), ("< 1.5", False), (">= 1.5", True), ("> 1.5", False), ("== 1.5", True), ("== 1.50001", False), ("<=15e-1", True), (">= -.5", True), ("<1.4", False)],
)  # fmt: skip
def test_comparisons(comparison: str, passed: bool) -> None:
    (gate,) = gates.judge_eval({"eval.loss": comparison, "train.steps": "< 0"}, EvalInfo(loss=1.5, supervised_tokens=1, rows=1))
    assert gate.passed is passed
    assert gate.found == 1.5


def test_what_was_not_measured_fails() -> None:
    (gate,) = gates.judge_eval({"eval.exact_match": ">= 0"}, EvalInfo(loss=1.5, supervised_tokens=1, rows=1))
    assert (gate.found, gate.passed) == (None, False)
    with pytest.raises(GateFailed, match=r"1 gate of 1 failed:\n  eval.exact_match was not measured, expected >= 0") as caught:
        gates.refuse([gate])
    assert caught.value.exit_code == 10
    gates.refuse([])


def test_all_forms_of_the_report_say_which_gate_failed(report: Report) -> None:
    found = gates.judge({"eval.loss": "<= 1e-9", "train.steps": ">= 1"}, report)
    assert [gate.passed for gate in found] == [False, True]
    report = report.model_copy(update={"gates": found})
    page = render_html(report, [], "a: 1\n", title="run")
    assert page.index("gate-table") > 0
    assert "&lt;= 1e-9" in page
    text = render_markdown(report, "a: 1\n", title="run")
    assert "| `eval.loss` |" in text
    assert text.count("✗ FAILED") == 1
    suite = ET.fromstring(gates.junit("run", list(gates.cases(report)), 1.5)).find("testsuite")
    assert suite is not None
    assert (suite.get("name"), suite.get("failures"), suite.get("errors")) == ("run", "1", "0")
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases["eval.loss <= 1e-9"] == ["failure"]
    assert cases["train.steps >= 1"] == []
    assert cases["training ends"] == []


def test_a_failed_run_is_an_error_for_ci_and_any_text_is_xml(report: Report) -> None:
    report = report.model_copy(update={"status": "failed", "error": "step 3: <loss> is \x07 not a number\nand more"})
    suite = ET.fromstring(gates.junit("a\x00b", list(gates.cases(report)), 0.0)).find("testsuite")
    assert suite is not None
    assert suite.get("errors") == "1"
    error = suite.find("testcase/error")
    assert error is not None
    assert error.get("message") == "step 3: <loss> is \u2407 not a number"
