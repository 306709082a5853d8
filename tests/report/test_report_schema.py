"""report.json's schema: what is required, what is refused, and that the shipped JSON Schema is current."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from peftcli.report.schema import Report, finite, json_schema, json_schema_text, shipped_schema_text


def test_shipped_schema_is_current() -> None:
    assert shipped_schema_text() == json_schema_text(), "write peftcli/report/report.schema.json anew from json_schema_text()"


def test_schema_is_closed_and_names_the_promised_fields() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    promised = {"report_version", "status", "model", "method", "data", "train", "eval_before", "eval", "environment", "files", "checks"}
    assert promised <= set(schema["required"])
    parts = schema["$defs"]
    assert {"loss", "metrics", "intervals"} <= set(parts["EvalInfo"]["required"])
    figures = {"steps", "epochs", "loss_first", "loss_last", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes"}
    assert figures <= set(parts["TrainInfo"]["required"])
    assert {"rows", "tokens", "supervised_tokens", "truncated", "dropped"} <= set(parts["SplitInfo"]["required"])


def test_round_trip(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_eval_loss_is_required_where_held_out_rows_exist(values: dict[str, Any]) -> None:
    values["eval"] = None
    with pytest.raises(ValidationError, match="eval is required"):
        Report.model_validate(values)
    values["status"] = "stopped_early"
    with pytest.raises(ValidationError, match="eval is required"):
        Report.model_validate(values)
    values["status"] = "interrupted"
    assert Report.model_validate(values).eval is None


def test_eval_without_a_loss_is_refused(values: dict[str, Any]) -> None:
    values["eval"]["loss"] = None
    with pytest.raises(ValidationError, match=r"eval\.loss"):
        Report.model_validate(values)


def test_eval_may_be_absent_without_held_out_rows(values: dict[str, Any]) -> None:
    values["eval"] = values["eval_before"] = values["data"]["eval"] = None
    assert Report.model_validate(values).eval is None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "place", ["eval.loss", "train.loss_last", "train.tokens_per_second", "method.options.alpha", "checks.label_audit.share"]
)
def test_non_finite_numbers_are_refused(values: dict[str, Any], place: str, number: float) -> None:
    *path, last = place.split(".")
    target = values
    for part in path:
        target = target[part]
    target[last] = number
    with pytest.raises(ValidationError, match="finite"):
        Report.model_validate(values)


def test_finite_makes_null_of_what_json_cannot_hold() -> None:
    assert finite(1.5) == 1.5
    assert finite(None) is None
    assert finite(math.nan) is None
    assert finite(math.inf) is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("report_version", 1, "2"),
        ("status", "done", "completed"),
        ("surprise", 1, "Extra"),
        ("files", {"/etc/passwd": "0" * 64}, "relative"),
        ("files", {"../x": "0" * 64}, "relative"),
        ("files", {"a": "nothex"}, "pattern"),
    ],
)
def test_wrong_top_level_values_are_refused(values: dict[str, Any], place: str, value: Any, message: str) -> None:
    values[place] = value
    with pytest.raises(ValidationError, match=message):
        Report.model_validate(values)


def test_intervals_stand_beside_known_metrics_in_order(values: dict[str, Any]) -> None:
    values["eval"]["intervals"] = {"loss": [2.0, 1.0]}
    with pytest.raises(ValidationError, match="low end"):
        Report.model_validate(values)
    values["eval"]["intervals"] = {"bleu": [1.0, 2.0]}
    with pytest.raises(ValidationError, match="names no metric"):
        Report.model_validate(values)


def test_exact_match_says_of_how_many(values: dict[str, Any]) -> None:
    values["eval"]["generated"] = None
    with pytest.raises(ValidationError, match="generated"):
        Report.model_validate(values)


def test_a_failed_run_says_why(values: dict[str, Any]) -> None:
    values["status"] = "failed"
    with pytest.raises(ValidationError, match="error is required"):
        Report.model_validate(values)


def test_half_a_surrogate_pair_does_not_lose_the_report(values: dict[str, Any]) -> None:
    values["examples"][0]["before"] = "cut \ud83d here"
    values["checks"]["label_audit"]["example"] = [["cut \ud83d", True]]
    report = Report.model_validate(values)
    assert report.examples[0].before == "cut \ufffd here"
    json.dumps(report.model_dump(mode="json"), ensure_ascii=False).encode("utf-8")


def test_report_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, peftcli.report.write, peftcli.report.console, peftcli.report.progress, peftcli.report.metrics\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
