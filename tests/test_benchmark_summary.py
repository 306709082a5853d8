"""What recorded runs of the benchmark come to: medians, ratios to the fastest peer, means over the methods."""

from __future__ import annotations

from typing import Any

import benchmark_summary as summary
import pytest


def run(method: str, side: str, speed: float, *, batch_size: int = 8, task: str = summary.LANGUAGE) -> dict[str, Any]:
    case = {"task": task, "method": method, "batch_size": batch_size, "max_length": 64, "rank": 16}
    rates = {"tokens_per_second": speed, "supervised_per_second": speed / 2, "tokens_per_cpu_second": speed * 2, "peak_bytes": 2**30}
    return {"case": case, "side": side, **rates, "steps": [{"loss": 2.0}, {"loss": 1.0 + speed / 1000}]}


def test_ours_is_held_against_the_fastest_peer_by_medians() -> None:
    runs = [run("lora", "peftcli", speed) for speed in (10.0, 300.0, 200.0)]
    runs += [run("lora", "padded", 50.0), run("lora", "padding-free", 100.0)]
    mine, *_ = summary.summarize(runs)
    assert (mine["times_faster"], mine["times_less_cpu"], mine["memory_ratio"]) == (2.0, 2.0, 1.0)
    assert mine["largest_loss_gap"] == pytest.approx(0.09)  # the first run's losses beside those of the fastest peer
    assert "| lora | 8 x 64 | 16 | padding-free | 100 | 200 |" in summary.compact(list(summary.summarize(runs)))


def test_every_method_has_the_same_weight_in_the_mean() -> None:
    runs = []
    for method, batch_size, speed in (("lora", 8, 200.0), ("lora", 4, 200.0), ("lora", 2, 200.0), ("ia3", 8, 800.0)):
        runs += [run(method, "peftcli", speed, batch_size=batch_size), run(method, "padded", 100.0, batch_size=batch_size)]
    runs += [run("lora", "peftcli, int8 backward", 1000.0), run("bitfit", "peftcli", 300.0, task=summary.CLASSES)]
    lines = list(summary.summarize(runs))
    means = summary.geometric_means(lines)
    assert list(means) == [summary.LANGUAGE]
    assert means[summary.LANGUAGE]["methods"] == ["lora", "ia3"]
    assert means[summary.LANGUAGE]["times_faster"] == pytest.approx(4.0)
    words = summary.means_in_words(lines, {summary.LANGUAGE: {"adapter": "peft has none"}})
    assert "4.00x as fast" in words
    assert "Without a twin: `adapter`: peft has none." in words


def test_a_side_that_failed_is_told_and_counts_nowhere() -> None:
    case = run("ia3", "peftcli", 100.0)["case"]
    runs = [run("ia3", "peftcli", 100.0), {"case": case, "side": "padded", "failed": "ValueError: no | such mask"}]
    lines = list(summary.summarize(runs))
    assert "failed: ValueError: no / such mask" in summary.table(lines)
    assert summary.geometric_means(lines) == {}
    assert "ia3" not in summary.compact(lines)
