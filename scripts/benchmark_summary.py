"""What the runs of scripts/benchmark.py come to: medians, ratios to the fastest peer, means over the methods, tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LANGUAGE, CLASSES = "causal_lm", "sequence_classification"
OURS = "peftcli"
# Our side with train.frozen_products, by its name in the tables.
OURS_INT8 = {"peftcli, int8 backward": "int8_backward", "peftcli, int8": "int8"}
# Methods whose rank and targets the benchmark sets; the others keep their defaults.
RANKED = ("lora", "qlora", "loha", "lokr", "adalora")
RATIOS = ("times_faster", "times_less_cpu")


def summarize(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each case and side: medians over the repeats, and how ours compares with the fastest peer."""
    cases = list(dict.fromkeys(json.dumps(run["case"]) for run in runs))
    for key in cases:
        mine = [run for run in runs if json.dumps(run["case"]) == key]
        medians: dict[str, dict[str, Any]] = {}
        for side in dict.fromkeys(run["side"] for run in mine):
            same = [run for run in mine if run["side"] == side]
            good = [run for run in same if "failed" not in run]
            if not good:
                yield {"case": json.loads(key), "side": side, "failed": same[0]["failed"]}
                continue
            names = ("tokens_per_second", "supervised_per_second", "tokens_per_cpu_second", "peak_bytes")
            medians[side] = {name: statistics.median(run[name] for run in good) for name in names}
            medians[side]["losses"] = [step["loss"] for step in good[0]["steps"]]
        best = _fastest_peer(medians)
        for side, values in medians.items():
            line = {"case": json.loads(key), "side": side, **values}
            if best is not None and (side == OURS or side in OURS_INT8):
                theirs = medians[best]
                line["times_faster"] = values["tokens_per_second"] / theirs["tokens_per_second"]
                line["times_less_cpu"] = values["tokens_per_cpu_second"] / theirs["tokens_per_cpu_second"]
                line["memory_ratio"] = values["peak_bytes"] / theirs["peak_bytes"]
                line["largest_loss_gap"] = max(abs(a - b) for a, b in zip(values["losses"], theirs["losses"], strict=True))
            yield line


def _fastest_peer(sides: dict[str, dict[str, Any]]) -> str | None:
    peers = [side for side in sides if side != OURS and side not in OURS_INT8]
    return max(peers, key=lambda side: sides[side]["tokens_per_second"], default=None)


def geometric_means(summary: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By task: the geometric means of ours to the fastest peer over all cases, each of the methods with the same weight."""
    means: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(line["case"]["task"] for line in summary):
        lines = [line for line in summary if line["case"]["task"] == task and line["side"] == OURS and "times_faster" in line]
        methods: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            methods.setdefault(line["case"]["method"], []).append(line)
        if methods:
            own = {key: [statistics.geometric_mean(line[key] for line in of) for of in methods.values()] for key in RATIOS}
            means[task] = {"methods": list(methods), **{key: statistics.geometric_mean(own[key]) for key in RATIOS}}
    return means


def means_in_words(summary: Sequence[dict[str, Any]], without_twin: Mapping[str, Mapping[str, str]]) -> str:
    """A sentence for each task: the geometric means, and which methods have no twin, and why."""
    lines = []
    for task, mean in geometric_means(summary).items():
        missing = "; ".join(f"`{name}`: {why}" for name, why in without_twin.get(task, {}).items())
        lines.append(
            f"- `{task}`, geometric mean over methods with a twin ({len(mean['methods'])}): {mean['times_faster']:.2f}x as fast, "
            f"{mean['times_less_cpu']:.2f}x by CPU time." + (f" Without a twin: {missing}." if missing else "")
        )
    return "\n".join(lines)


def table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown, a row for each side."""
    head = ["task", "method", "rows x length", "rank", "side", "tok/s", "supervised tok/s", "tok/CPU-s", "peak GiB", "last loss"]
    head += ["beside the fastest peer", "by CPU time", "memory", "loss gap"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for line in summary:
        cells = [line["case"]["task"], *_work(line["case"]), line["side"]]
        if "failed" in line:
            cells += [f"failed: {line['failed'][:100].replace('|', '/')}", *[""] * 8]
        else:
            cells += [f"{line[key]:.0f}" for key in ("tokens_per_second", "supervised_per_second", "tokens_per_cpu_second")]
            cells += [f"{line['peak_bytes'] / 2**30:.2f}", f"{line['losses'][-1]:.4f}", *_ratios(line)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compact(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown, a row for each case of ours beside the fastest peer."""
    head = ["task", "method", "rows x length", "rank", "peer", "tok/s, peer", "tok/s, peftcli", "peak GiB, peer", "peak GiB, peftcli"]
    head += ["times as fast", "by CPU time", "memory", "loss gap"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for line in summary:
        if "times_faster" not in line:
            continue
        same = {other["side"]: other for other in summary if other["case"] == line["case"] and "failed" not in other}
        best = _fastest_peer(same)
        assert best is not None
        name = line["case"]["method"] + line["side"].removeprefix(OURS)
        task, work = line["case"]["task"], _work(line["case"])
        figures = [f"{side['tokens_per_second']:.0f}" for side in (same[best], line)]
        figures += [f"{side['peak_bytes'] / 2**30:.2f}" for side in (same[best], line)]
        lines.append("| " + " | ".join([task, name, *work[1:], best, *figures, *_ratios(line)]) + " |")
    return "\n".join(lines)


def _work(case: dict[str, Any]) -> list[str]:
    return [case["method"], f"{case['batch_size']} x {case['max_length']}", str(case["rank"]) if case["method"] in RANKED else ""]


def _ratios(line: dict[str, Any]) -> list[str]:
    forms = {"times_faster": "{:.2f}x", "times_less_cpu": "{:.2f}x", "memory_ratio": "{:.2f}", "largest_loss_gap": "{:.4f}"}
    return [form.format(line[key]) if key in line else "" for key, form in forms.items()]
