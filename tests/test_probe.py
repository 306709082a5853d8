"""What `peftcli methods` says is what a probe finds."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from peftcli.commands import methods as command
from peftcli.methods import registry
from peftcli.probe import FAMILIES, capabilities, probe, stored
from peftcli.recipe.load import parse_recipe

NAMES = registry.names()


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_results_are_those_of_a_fresh_probe(name: str) -> None:
    assert asdict(stored()[name]) == asdict(probe(name)), "out of date: python -m peftcli.probe --write"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_claims_is_what_it_does(name: str) -> None:
    caps, can = registry.get(name).caps, capabilities(name)
    assert can.works_on
    assert (can.mergeable is None or caps.whole_model) == caps.mergeable
    assert bool(can.works_over_nf4) == caps.quantized_base
    assert can.trained > 0
    assert (can.share == 1) == (name == "full")


def test_a_method_from_outside_is_probed_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register("toy", "toy_method:Toy")
    assert "toy" not in stored()
    row = command.facts("toy", capabilities("toy"))
    assert row["families"]
    assert row["trainable_share"] > 0
    assert set(row["reasons"]) & {*FAMILIES, "nf4", "merge"}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_explained_with_a_recipe_that_validates(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = command.facts(name, capabilities(name))
    assert all(row[key] for key in ("summary", "solves", "costs", "choose", "paper"))
    assert all(option["meaning"] for option in row["options"])
    assert parse_recipe(command.recipe_for(row), "r.yaml").recipe.method.name == name
    command.run(name, live=False, json=False)
    shown = capsys.readouterr().out
    assert "choose it for" in shown
    assert command.recipe_for(row) in shown


def test_the_table_names_every_method_and_its_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(None, live=False, json=False)
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert command.among(["llama", "gpt2"], ["llama", "gpt2", "t5"]) == "not T5"
    assert command.among(["gpt2"], ["llama", "gpt2", "t5"]) == "GPT-2"
    assert command.among([], ["llama"]) == "no"
