"""The suite's own rules hold: see ``suite.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.slow
def test_trains(): pass

def test_quick(): pass

@pytest.mark.gpu
def test_on_a_gpu(): pytest.skip("no CUDA device")

@pytest.mark.machine
def test_with_a_compiler(): pytest.skip("no compiler")

def test_missing(): pytest.skip("no real model at hand")
"""


def run(folder: Path, required: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_sample.py").write_text(TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n    machine\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PEFTCLI_REQUIRE_DATA": required}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "suite", "-p", "no:cacheprovider", "-v", "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_slow_tests_run_last(tmp_path: Path) -> None:
    output = run(tmp_path, "").stdout
    assert output.index("test_quick") < output.index("test_missing") < output.index("test_trains")


@pytest.mark.parametrize(("required", "code", "summary"), [("", 0, "2 passed, 3 skipped"), ("1", 1, "1 failed, 2 passed, 2 skipped")])
def test_skips_fail_where_nothing_may_be_missing(required: str, code: int, summary: str, tmp_path: Path) -> None:
    result = run(tmp_path, required)
    assert result.returncode == code, result.stdout
    assert summary in result.stdout
    assert ("PEFTCLI_REQUIRE_DATA allows no skips: Skipped: no real model at hand" in result.stdout) == bool(required)


def test_a_whole_file_may_not_skip_either(tmp_path: Path) -> None:
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.skip('nothing here', allow_module_level=True)\n", encoding="utf-8")
    result = run(tmp_path, "1")
    assert result.returncode != 0 and "nothing here" in result.stdout
