"""What a run says while it goes on, in each mode."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from peftcli.report.progress import JsonProgress, NullProgress, PlainProgress, Progress, RichProgress, make_progress

STEP = {"step": 10, "epoch": 0.5, "loss": 1.25, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "peak_memory_bytes": 2**30}
EVALUATION: dict[str, Any] = {"step": 10, "epoch": 0.5, "eval_loss": 0.5, "eval_perplexity": 1.6487, "eval_token_accuracy": 0.875}
EVALUATION |= {"eval_intervals": {"loss": [0.4, 0.6], "token_accuracy": [0.8, 0.925]}}


def tell(progress: Progress) -> None:
    with progress:
        progress.note("loading model")
        progress.start(20, initial_step=5)
        progress.advance(10)
        progress.step(STEP)
        progress.evaluation(EVALUATION)
        progress.advance(20)
        progress.warn("row 7 was [truncated]")


def test_plain_lines() -> None:
    out = io.StringIO()
    tell(make_progress("plain", stream=out))
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["loading model", "training for 20 steps, continuing after step 5"]
    assert lines[2].startswith("step 10/20  loss 1.250  lr 2e-4  1,234 tokens/s  memory 1 GiB")
    assert lines[2].endswith(" left")
    assert lines[3:] == [
        "step 10  held-out  loss 0.5000 (0.4000 to 0.6000)  perplexity 1.649  token accuracy 87.5 % (80.0 % to 92.5 %)",
        "warning: row 7 was [truncated]",
    ]


def test_json_lines() -> None:
    out = io.StringIO()
    tell(make_progress("json", stream=out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert events == [
        {"event": "note", "message": "loading model"},
        {"event": "start", "total_steps": 20, "initial_step": 5},
        {"event": "step", **STEP},
        {"event": "evaluation", **EVALUATION},
        {"event": "warning", "message": "row 7 was [truncated]"},
        {"event": "stop"},
    ]


def test_json_holds_no_nan() -> None:
    out = io.StringIO()
    make_progress("json", stream=out).step({"step": 1, "loss": math.nan})
    assert json.loads(out.getvalue()) == {"event": "step", "step": 1, "loss": None, "note": "loss is nan"}


def test_json_goes_to_stdout_and_plain_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    make_progress("json").note("one")
    make_progress("plain").note("two")
    found = capsys.readouterr()
    assert json.loads(found.out) == {"event": "note", "message": "one"}
    assert found.err == "two\n"


def test_a_live_bar_on_a_terminal() -> None:
    out = io.StringIO()
    progress = make_progress("auto", console=Console(file=out, force_terminal=True, width=140, color_system=None))
    assert isinstance(progress, RichProgress)
    tell(progress)
    text = out.getvalue()
    for part in ("loading model", "20/20", "loss 1.250", "lr 2e-4", "1,234 tokens/s", "memory 1 GiB", "warning: row 7 was [truncated]"):
        assert part in text
    assert "held-out  loss 0.5000" in text


def test_logged_values_before_start_do_not_fail() -> None:
    progress = RichProgress(Console(file=io.StringIO(), force_terminal=True))
    with progress:
        progress.advance(1)
        progress.step(STEP)
        progress.start(3)
        progress.start(3)
    progress.stop()


def test_auto_is_plain_where_stderr_is_no_terminal() -> None:
    assert isinstance(make_progress("auto", console=Console(file=io.StringIO())), PlainProgress)


def test_none_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress("none")
    assert type(progress) is NullProgress
    tell(progress)
    found = capsys.readouterr()
    assert found.out == found.err == ""


def test_all_fit_the_protocol() -> None:
    modes: list[Any] = ["rich", "plain", "json", "none"]
    assert all(isinstance(make_progress(mode), Progress) for mode in modes)
    with pytest.raises(ValueError, match="unknown"):
        make_progress("loud")  # type: ignore[arg-type]


class Gone(io.StringIO):
    """A pipe whose reader went away."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0

    def write(self, text: str) -> int:
        self.attempts += 1
        raise BrokenPipeError


def test_a_reader_that_went_away_does_not_end_the_training() -> None:
    stream = Gone()
    tell(JsonProgress(stream))
    assert stream.attempts == 1


AUDIT = {
    "summary": "1,200 rows, 12,500 of 50,000 tokens carry loss (25.0 %), 3 truncated, 0 dropped",
    "rows": 1200, "tokens": 50000, "supervised_tokens": 12500, "truncated": 3, "dropped": 0,
    "example": [["<user>hi[b]", False], ["hello", True], ["\n", False]],
}  # fmt: skip


def test_the_label_audit_is_shown_before_the_first_step() -> None:
    """Counts and one row, the learned tokens marked; markup in the row is text."""
    plain, rich, lines = io.StringIO(), io.StringIO(), io.StringIO()
    PlainProgress(plain).audit(AUDIT)
    assert "1,200 rows, 12,500 of 50,000 tokens carry loss (25.0 %), 3 truncated, 0 dropped" in plain.getvalue()
    assert "<user>hi[b]⟦hello⟧" in plain.getvalue()
    RichProgress(Console(file=rich, force_terminal=True, color_system="standard", width=200)).audit(AUDIT)
    assert "\x1b[1;32mhello" in rich.getvalue()
    assert "<user>hi[b]" in rich.getvalue()
    JsonProgress(lines).audit(AUDIT)
    assert json.loads(lines.getvalue())["example"][1] == ["hello", True]
