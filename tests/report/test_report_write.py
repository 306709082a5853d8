"""Writing and reading: bytes, atomicity, damaged files, hashes, redaction."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import CheckpointError
from peftcli.report.schema import Report
from peftcli.report.write import REPORT_FILES, hash_files, read_report, write_report

Records = list[dict[str, Any]]


def test_round_trip_on_disk(tmp_path: Path, report: Report, metrics: Records, recipe_text: str) -> None:
    write_report(tmp_path / "run", report, metrics, recipe_text)
    assert read_report(tmp_path / "run") == report
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(REPORT_FILES), "nothing is left aside"


def test_json_is_stable_and_readable(tmp_path: Path, report: Report, metrics: Records, recipe_text: str) -> None:
    write_report(tmp_path, report, metrics, recipe_text)
    first = {name: (tmp_path / name).read_bytes() for name in REPORT_FILES}
    write_report(tmp_path, Report.model_validate_json(first["report.json"]), metrics, recipe_text)
    assert {name: (tmp_path / name).read_bytes() for name in REPORT_FILES} == first
    text = first["report.json"].decode()
    assert text.startswith('{\n  "report_version": 2,\n  "status": "completed"')
    assert text.endswith("}\n")
    assert "把客厅" in text


def test_a_failed_write_keeps_the_old_report(
    tmp_path: Path, report: Report, values: dict[str, Any], recipe_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, report, [], recipe_text)
    old = {name: (tmp_path / name).read_bytes() for name in REPORT_FILES}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    values["train"]["steps"] = 999
    with pytest.raises(CheckpointError, match="No space left"):
        write_report(tmp_path, Report.model_validate(values), [], recipe_text)
    assert {name: (tmp_path / name).read_bytes() for name in REPORT_FILES} == old
    assert len(list(tmp_path.iterdir())) == len(REPORT_FILES)


def test_report_json_is_written_last(tmp_path: Path, report: Report, recipe_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    write_report(tmp_path, report, [], recipe_text)
    assert order[-1] == "report.json"
    assert sorted(order) == sorted(REPORT_FILES)


def test_secrets_are_redacted_everywhere(tmp_path: Path, values: dict[str, Any]) -> None:
    values["notes"] = ["the token hf_secret123 was used"]
    values["examples"][0]["after"] = "hf_secret123"
    write_report(
        tmp_path, Report.model_validate(values), [], "name: hf_secret123\n", redact=lambda text: text.replace("hf_secret123", "[removed]")
    )
    for name in REPORT_FILES:
        content = (tmp_path / name).read_text(encoding="utf-8")
        assert "hf_secret123" not in content
        assert "[removed]" in content.replace("\\[", "[").replace("\\]", "]")


def test_missing_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        read_report(tmp_path)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"report\.json:1:1 is damaged"),
        (b'{"report_version": 2,\n "status": "comp', r"report\.json:2:\d+ is damaged"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[1, 2]", "holds a list"),
        (b'{"report_version": 7}', "report_version 7"),
        (b'{"report_version": 2}', "does not fit"),
        (b'{"report_version": NaN}', "holds NaN"),
        (b"[" * 200_000, "is damaged"),
    ],
)
def test_damaged_reports_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_report(tmp_path)


def test_a_wrong_field_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    values["train"]["steps"] = "many"
    (tmp_path / "report.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"train\.steps"):
        read_report(tmp_path)


def test_hash_files(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "b.bin").write_bytes(b"b")
    (tmp_path / "adapter" / "a.bin").write_bytes(b"a")
    (tmp_path / "recipe.yaml").write_bytes(b"")
    found = hash_files(tmp_path, ["recipe.yaml", tmp_path / "adapter"])
    assert list(found) == ["adapter/a.bin", "adapter/b.bin", "recipe.yaml"]
    assert found["adapter/a.bin"] == hashlib.sha256(b"a").hexdigest()
    assert found["recipe.yaml"] == hashlib.sha256(b"").hexdigest()


def test_hash_files_refuses_what_is_missing_or_outside(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        hash_files(tmp_path, ["nothing.bin"])
    with pytest.raises(CheckpointError, match="outside"):
        hash_files(tmp_path, ["../elsewhere"])
