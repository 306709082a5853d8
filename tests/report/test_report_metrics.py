"""metrics.jsonl: appended, flushed, cut back on resume, readable after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import CheckpointError
from peftcli.report.metrics import MetricsWriter, read_metrics


def fill(path: Path, steps: range) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1 / step})


def test_every_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": 0.5})
    assert json.loads(path.read_text(encoding="utf-8")) == {"step": 1, "loss": 0.5}
    writer.close()
    writer.close()
    with pytest.raises(CheckpointError, match="closed"):
        writer.write({"step": 2})


def test_a_new_run_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 5))
    fill(path, range(1, 3))
    assert [record["step"] for record in read_metrics(path).records] == [1, 2]


def test_resume_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 10))
    with MetricsWriter(path, append=True, truncate_after_step=5) as writer:
        assert [record["step"] for record in read_metrics(path).records] == [1, 2, 3, 4, 5]
        writer.write({"step": 6, "loss": 0.0})
    log = read_metrics(path)
    assert [record["step"] for record in log.records] == [1, 2, 3, 4, 5, 6]
    assert log.warning is None
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_kept_lines_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.1 + 0.2, "learning_rate": 1e-5, "name": "ä"})
    before = path.read_bytes()
    MetricsWriter(path, append=True, truncate_after_step=1).close()
    assert path.read_bytes() == before


def test_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        log = read_metrics(path)
        steps = [record["step"] for record in log.records]
        # A last line that lost only its newline is still whole.
        assert steps == ([1, 2, 3] if cut == 1 else [1, 2])
        assert (log.warning is None) == (cut == 1)
    with MetricsWriter(path, append=True) as writer:
        assert writer.warning is not None
        assert "metrics.jsonl:3" in writer.warning
        writer.write({"step": 3, "loss": 0.3})
    assert [record["step"] for record in read_metrics(path).records] == [1, 2, 3]


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b'{"loss": 1}', b"\xff\xff"])
def test_a_damaged_middle_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is damaged"):
        read_metrics(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_become_null_with_a_note(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": value, "grad_norm": 1.0})

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "grad_norm": 1.0, "note": f"loss is {value}"}


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="integer step"):
        writer.write({"loss": 1.0})


def test_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot write"):
        MetricsWriter(tmp_path / "file" / "metrics.jsonl")
