"""How the whole suite runs: quick tests first, and no test passed over where nothing may be missing.

Loaded by ``-p suite`` in pyproject.toml. With ``PEFTCLI_REQUIRE_DATA=1``, which ``.ci/run`` sets, a test that skips because a
model or data set is not at hand fails instead; only tests marked ``gpu`` or ``machine`` may skip.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Without a GPU, Triton's kernels run in its interpreter, which has to be known before anything imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REQUIRED = os.environ.get("PEFTCLI_REQUIRE_DATA", "") not in ("", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``slow`` come last; the order is kept otherwise."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def _may_skip(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("gpu", "machine"))


def _refuse(report: Any, name: str) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{name} was skipped, and PEFTCLI_REQUIRE_DATA allows no skips: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test becomes a failed one."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail") and not _may_skip(item):
        _refuse(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """So does a whole file that skips itself."""
    report = yield
    if REQUIRED and report.skipped:
        _refuse(report, collector.nodeid)
    return report
