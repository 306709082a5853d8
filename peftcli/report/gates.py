"""Gates: what a recipe expects of its own run (``expect:``), judged from the report, and written for CI as JUnit XML.

A gate is a dotted key of the report and a comparison, such as ``eval.loss: "<= 1.20"``. Figures of held-out rows stand directly under
``eval`` and ``eval_before`` (``eval.exact_match``), and the paired tests under ``comparisons`` (``comparisons.loss.p_value``).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from peftcli.errors import GateFailed, UsageError, nearest
from peftcli.report.catalogue import FIGURES, GENERATED
from peftcli.report.markup import visible
from peftcli.report.schema import EvalInfo, Gate, LiveAdapterCheck, ModelInfo, Part, Report, SplitInfo, TrainInfo
from peftcli.report.text import number, plural

# An order and a number, as the recipe's schema holds it.
COMPARISON = r"^\s*(<=|>=|==|<|>)\s*([-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?)\s*$"

_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_PARTS: dict[str, type[Part]] = {
    "model": ModelInfo,
    "data.train": SplitInfo,
    "data.eval": SplitInfo,
    "train": TrainInfo,
    "eval_before": EvalInfo,
    "eval": EvalInfo,
}
_TESTED = ("difference", "p_value")


def known() -> tuple[str, ...]:
    """Every key of the report that a gate may name, those of the held-out rows first."""
    found = []
    for name in ("eval", "eval_before"):
        found += [f"{name}.{figure}" for figure in FIGURES]
    found += [f"comparisons.{figure}.{what}" for figure in FIGURES for what in _TESTED]
    for name, part in _PARTS.items():
        found += [f"{name}.{key}" for key, field in part.model_json_schema()["properties"].items() if _is_number(field)]
    return tuple(dict.fromkeys(found))


def _is_number(field: Mapping[str, Any]) -> bool:
    return any(branch.get("type") in ("integer", "number") for branch in (field, *field.get("anyOf", ())))


def nearest_key(key: str) -> str | None:
    """The key that is meant by ``key``: one spelled alike, or the one of the held-out rows that ends like it."""
    names = known()
    return nearest(key, names) or next((other for other in names if other.rpartition(".")[2] == key.rpartition(".")[2]), None)


def refuse_unmeasured(expect: Mapping[str, str], figures: Sequence[str]) -> None:
    """See, once the rows are known and before anything is trained, that every figure of held-out rows that a gate names is measured.

    Args:
        figures: what the task tells of these rows, beside the loss and the metrics of generated answers.

    Raises:
        UsageError: one is not.
    """
    own = ("loss", *figures)
    for key in expect:
        part, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if part in ("eval", "eval_before", "comparisons") and name in FIGURES and name not in (*own, *GENERATED):
            raise UsageError(f"expect.{key} is not measured of rows like these", hint=f"what is: {', '.join(own)}")


def judge(expect: Mapping[str, str], report: Report) -> list[Gate]:
    """Each gate of a recipe against a run's report; a figure that was not measured fails its gate."""
    return [_gate(key, comparison, _value(report, key)) for key, comparison in expect.items()]


def judge_eval(expect: Mapping[str, str], measured: EvalInfo) -> list[Gate]:
    """The gates on held-out rows (``eval.*``) against one evaluation; the others are about the training."""
    inside = {key: comparison for key, comparison in expect.items() if key.startswith("eval.")}
    return [_gate(key, comparison, _of_eval(measured, key.removeprefix("eval."))) for key, comparison in inside.items()]


def _gate(key: str, comparison: str, found: float | None) -> Gate:
    matched = re.match(COMPARISON, comparison)
    assert matched is not None, "the recipe's schema lets nothing else through"
    order, limit = matched[1], matched[2]
    passed = found is not None and _ORDERS[order](found, float(limit))
    return Gate(key=key, expected=f"{order} {limit}", found=found, passed=passed)


def _value(report: Report, key: str) -> float | None:
    first, _, rest = key.partition(".")
    if first in ("eval", "eval_before"):
        return _of_eval(getattr(report, first), rest)
    if first == "comparisons":
        name, _, what = rest.partition(".")
        test = report.comparisons.get(name)
        return None if test is None else float(getattr(test, what))
    part: Any = report
    for name in key.split("."):
        part = getattr(part, name, None)
    found: float | None = part
    return found


def _of_eval(measured: EvalInfo | None, name: str) -> float | None:
    if measured is None:
        return None
    found: float | None = measured.figure(name)
    return found if found is not None else getattr(measured, name, None)


def gate_line(gate: Gate) -> str:
    """One gate in words: ``eval.loss is 1.31, expected <= 1.20``."""
    return f"{gate.key} {'was not measured' if gate.found is None else f'is {number(gate.found, 6)}'}, expected {gate.expected}"


def refuse(gates: Sequence[Gate]) -> None:
    """Raise :class:`GateFailed` where one did not pass, naming each that did not."""
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        lines = "".join(f"\n  {gate_line(gate)}" for gate in failed)
        raise GateFailed(
            f"{plural(len(failed), 'gate')} of {len(gates)} failed:{lines}",
            hint="the result and its report are kept; `expect` in the recipe says what is asked for.",
        )


@dataclass(frozen=True)
class Case:
    """One line of a CI's list of tests.

    Attributes:
        group, name: what was tested. ``failure``: why it failed. ``error``: why it could not be tested.
    """

    group: str
    name: str
    failure: str | None = None
    error: str | None = None


def cases(report: Report) -> Iterator[Case]:
    """A run as tests: that it ended well, that its saved weights are alive, and each gate."""
    unfinished = report.error or report.status if report.status in ("failed", "interrupted") else None
    yield Case("run", "training ends", error=unfinished)
    live = report.checks.live_adapter
    if live is not None:
        yield Case("run", "saved weights are alive", failure=None if live.passed else _faults(live))
    yield from gate_cases(report.gates)


def gate_cases(gates: Sequence[Gate]) -> Iterator[Case]:
    """Each gate as a test."""
    for gate in gates:
        yield Case("expect", f"{gate.key} {gate.expected}", failure=None if gate.passed else gate_line(gate))


def _faults(live: LiveAdapterCheck) -> str:
    return live.note or "the weights read back from disk are not those that were trained"


def junit(name: str, found: Sequence[Case], seconds: float) -> str:
    """JUnit XML, as CI services read it: one suite with a test for each case."""
    counts = {
        "tests": str(len(found)),
        "failures": str(sum(case.failure is not None for case in found)),
        "errors": str(sum(case.error is not None for case in found)),
        "time": f"{seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "peftcli", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": visible(name), **counts})
    for case in found:
        test = ET.SubElement(suite, "testcase", {"classname": f"peftcli.{case.group}", "name": case.name, "time": "0"})
        for kind, why in (("failure", case.failure), ("error", case.error)):
            if why is not None:
                ET.SubElement(test, kind, {"message": visible(why.splitlines()[0] if why else kind)}).text = visible(why)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def gate_table(gates: Sequence[Gate]) -> str:
    """The gates as a table in Markdown."""
    lines = ["| Gate | Found | Expected | |", "| --- | ---: | --- | --- |"]
    for gate in gates:
        found = "not measured" if gate.found is None else number(gate.found, 6)
        expected = gate.expected.replace("<", "&lt;").replace(">", "&gt;")
        lines.append(f"| `{gate.key}` | {found} | {expected} | {'✓ passed' if gate.passed else '✗ FAILED'} |")
    return "\n".join(lines)
