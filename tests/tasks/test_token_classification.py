"""Tagging words: alignment with tokens, entities, metrics, every method on encoders and decoders, a real model on real text."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import classifiers
import helpers
import measure_tasks
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import f1_score, precision_recall_fscore_support
from small_tokenizers import byte_tokenizer

from peftcli import probe
from peftcli.data.prepare import prepare, prepare_eval
from peftcli.data.tagged_rows import NONE, TaggedRows
from peftcli.errors import DataError, UsageError
from peftcli.methods import registry
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import TokenClassificationTask
from peftcli.result import open_result
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Layout
from peftcli.tasks.token_classification import Tagger, entities, kinds, spans_entities

DATA, MODELS = os.environ.get("PEFTCLI_DATA_DIR"), os.environ.get("PEFTCLI_MODELS_DIR")
PEOPLE, PLACES = ["Ann", "Bob Lee", "Zoë"], ["Rome", "New York"]


def sentence(index: int) -> dict[str, list[str]]:
    """Who lives where, with IOB2 tags."""
    tokens, tags = [], []
    for kind, text in (("PER", PEOPLE[index % 3]), ("", "lives in"), ("LOC", PLACES[index % 2]), ("", "." if index % 4 else "now .")):
        words = text.split()
        tokens += words
        tags += [f"{'B' if place == 0 else 'I'}-{kind}" if kind else "O" for place in range(len(words))]
    return {"tokens": tokens, "tags": tags}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    path: Path, tokenizer: Any = None, label_at: Any = "first", labels: list[str] | None = None, **section: Any
) -> tuple[Any, Any]:
    rows = TaggedRows(DatasetSection(train=[str(path)], **section), tokenizer or byte_tokenizer(), labels, label_at)
    return rows, prepare(rows, base_dir=Path(), seed=0)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-B", [("A", 0, 1), ("B", 3, 3)]),
        ("B-A B-A I-A", [("A", 0, 0), ("A", 1, 2)]),
        ("I-A I-A I-B", [("A", 0, 1), ("B", 2, 2)]),  # IOB1, and tags that begin nowhere
        ("O I-A B-A", [("A", 1, 1), ("A", 2, 2)]),
        ("B-A I-B E-B S-B", [("A", 0, 0), ("B", 1, 2), ("B", 3, 3)]),
        ("U-A B-A L-A I-A", [("A", 0, 0), ("A", 1, 2), ("A", 3, 3)]),
        ("B-X-Y I-X-Y", [("X-Y", 0, 1)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_are_read_as_conll_reads_them(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


def test_which_tags_mark_entities() -> None:
    assert spans_entities(["O", "B-PER", "I-PER"]) and not spans_entities(["O"]) and not spans_entities(["NOUN", "B-PER"])
    assert kinds(["O", "B-PER", "I-PER", "B-LOC"]) == ("PER", "LOC")
    assert kinds(["NOUN", "VERB"]) == ("NOUN", "VERB")


@pytest.mark.parametrize("label_at", ["first", "last", "all"])
def test_every_tag_stands_at_its_word(tmp_path: Path, label_at: str) -> None:
    path = write(tmp_path / "rows.jsonl", [sentence(i) for i in range(12)])
    tokenizer = byte_tokenizer()
    rows, data = prepared(path, tokenizer, label_at)
    assert rows.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    split = data.train
    for row in range(12):
        wanted = sentence(row)
        assert split.words[row] == wanted["tokens"]
        assert [rows.labels[tag] for tag in split.tags(row)] == wanted["tags"]
        ids, targets, places = split.input_ids[row], split.targets[row], split.places[row]
        owner = np.searchsorted(places, np.arange(len(ids)), side="left" if label_at == "last" else "right") - (label_at != "last")
        labelled = np.flatnonzero(targets != NONE)
        visible = [place for place, token in enumerate(ids.tolist()) if tokenizer.decode([token]).strip()]
        assert labelled.tolist() == (places.tolist() if label_at != "all" else visible)
        for number, word in enumerate(wanted["tokens"]):
            piece = tokenizer.decode(ids[owner == number].tolist(), skip_special_tokens=True)
            assert piece.strip() == word
        assert split.units(row) == len(labelled)
    assert data.audit.labels == {"O": 39, "B-LOC": 12, "B-PER": 12, "I-LOC": 6, "I-PER": 4}
    assert "".join(text for text, _ in data.audit.example) == "Ann [B-PER] lives [O] in [O] Rome [B-LOC] now [O] . [O] "


def test_words_as_texts_and_numbers_as_tags(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"words": "a b", "ner": [10, 2]}, {"words": "c d", "ner": [0, 2]}])
    rows, data = prepared(tmp_path / "rows.jsonl", columns={"tokens": "words", "tags": "ner"})
    assert rows.labels == ("0", "2", "10")
    assert [row.tolist() for row in map(data.train.tags, range(2))] == [[2, 1], [0, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"rows.jsonl:2: tokens and tags: 2 words and 1 tags"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"rows.jsonl:2: tokens: 3 is no text"),
        ({"tokens": ["a"], "tags": [1.5]}, r"rows.jsonl:2: tags: 1.5 is no tag"),
        ({"tokens": {"a": 1}, "tags": []}, r"rows.jsonl:2: tokens: a dict where a list"),
        ({"text": "a", "label": "O"}, r"rows.jsonl:2: there is no column 'tokens'"),
    ],
)
def test_faulty_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(write(tmp_path / "rows.jsonl", [sentence(0), row]), format="tagging")


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(DataError, match="one tag only"):
        prepared(path)
    with pytest.raises(DataError, match="not split"):
        prepared(path, truncation="split")
    write(path, [sentence(0), sentence(1)])
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'B-LOC' is none of the 2 tags; did you mean 'B-LOK'"):
        prepared(path, labels=["O", "B-LOK"])
    write(tmp_path / "eval.jsonl", [{"tokens": ["x"], "tags": ["B-ORG"]}])
    with pytest.raises(DataError, match=r"eval.jsonl:1: 'B-ORG' is none of"):
        prepared(path, eval=[str(tmp_path / "eval.jsonl")])


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", ["Ann", "lives"]), ("keep_end", ["now", "."])])
def test_what_is_cut_off_is_counted(tmp_path: Path, mode: str, kept: list[str]) -> None:
    tokenizer = helpers.tiny_tokenizer()  # one token for each byte
    path = write(tmp_path / "rows.jsonl", [sentence(0), {"tokens": ["a", "b"], "tags": ["O", "B-PER"]}])
    _, data = prepared(path, tokenizer, max_length=9, truncation=mode)
    assert data.train.words[0][: len(kept)] == kept or data.train.words[0][-len(kept) :] == kept
    assert data.audit.truncated == 1 and data.audit.words_cut == 6 - len(data.train.words[0])
    assert any("and" in note and "tagged words with them" in note for note in data.audit.notes)
    _, data = prepared(path, tokenizer, max_length=9, truncation="drop")
    assert (data.train.counts.rows, data.train.counts.dropped, data.train.dropped_origins) == (1, 1, [f"{path}:1"])
    with pytest.raises(DataError, match="rows.jsonl:1: 23 tokens, dataset.max_length is 9"):
        prepared(path, tokenizer, max_length=9, truncation="error")


def tagger(labels: Sequence[str], kind: str = "bert") -> Tagger:
    config = classifiers.tiny_config(kind)
    config.num_labels = len(labels)
    torch.manual_seed(5)
    return Tagger(transformers.AutoModelForTokenClassification.from_config(config).double().eval(), labels)


@pytest.mark.parametrize("flat", [True, False])
def test_figures_are_those_of_scikit_learn(tmp_path: Path, flat: bool) -> None:
    """Random guesses of an untrained model, measured by us and by an independent count."""
    rows = [sentence(i) for i in range(30)]
    if flat:
        rows = [{"tokens": row["tokens"], "tags": [tag[-3:] for tag in row["tags"]]} for row in rows]
    kind, data = prepared(write(tmp_path / "rows.jsonl", rows), helpers.tiny_tokenizer())
    task = tasks.make(TokenClassificationTask(labels=list(kind.labels)))
    module = tagger(kind.labels)
    batch = task.batch(data.train, range(30), Layout(False, 0))
    with torch.no_grad():
        found = task.scores(module.measure(batch), data.train)
        guesses = module.logits(batch).argmax(-1)
    guess = [kind.labels[tag] for row in range(30) for tag in guesses[row][data.train.places[row]].tolist()]
    true = [tag for row in rows for tag in row["tags"]]
    assert len(set(guess)) > 1
    assert found["token_accuracy"].value == pytest.approx(np.mean([one == other for one, other in zip(guess, true, strict=True)]))
    if flat:
        assert found["f1"].value == pytest.approx(f1_score(true, guess, average="macro", labels=list(kind.labels), zero_division=0.0))
        assert "entity_f1" not in found
        return
    # Entities as the rows of a table: one column says whether it was found, one whether it is there.
    here, there, start = set(), set(), 0
    for row in rows:
        end = start + len(row["tokens"])
        here |= {(start, *entity) for entity in entities(guess[start:end])}
        there |= {(start, *entity) for entity in entities(true[start:end])}
        start = end
    both = sorted(here | there)
    precision, recall, f1, _ = precision_recall_fscore_support(
        [entity in there for entity in both], [entity in here for entity in both], average="binary", zero_division=0.0
    )
    assert [found[f"entity_{name}"].value for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    for metric in found.values():
        assert metric.interval is not None and metric.interval[0] <= metric.value <= metric.interval[1]


def test_the_loss_is_that_of_the_tagged_tokens_alone(tmp_path: Path) -> None:
    kind, data = prepared(write(tmp_path / "rows.jsonl", [sentence(i) for i in range(5)]), helpers.tiny_tokenizer())
    task, module = tasks.make(TokenClassificationTask(labels=list(kind.labels))), tagger(kind.labels)
    batch = task.batch(data.train, range(5), Layout(False, 0))
    total = module(batch).total
    own = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets).loss
    assert float(total / sum(map(data.train.units, range(5)))) == pytest.approx(float(own), rel=1e-12)
    silent = module(task.batch(data.train, [0], Layout(False, 0), silent=True)).total
    silent.backward()
    assert float(silent) == 0.0
    assert not any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BERT-like body without a head, and a LLaMA-like language model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    transformers.BertModel(classifiers.tiny_config("bert")).save_pretrained(root / "bert")
    helpers.tiny_tokenizer().save_pretrained(root / "bert")
    helpers.save_folder(root / "llama", "llama-bias")
    write(root / "train.jsonl", [sentence(i) for i in range(48)])
    write(root / "eval.jsonl", [sentence(i) for i in range(5)])
    return {"bert": root / "bert", "llama": root / "llama", "data": root}


EVERYWHERE = [
    (name, kind)
    for name in registry.names()
    for kind in ("bert", "llama")
    if probe.stored()[name].families[kind] is None or (name == "bitfit" and kind == "llama")  # this one has biases
]


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_every_method_learns_and_is_read_back(name: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    method = f"{{name: {name}, last_layers: 1}}" if name == "freeze" else name
    quantized = "nf4" if registry.get(name).caps.quantized_base == "required" or name == "qlora" else "null"
    text = (
        f"base_model: {{name: {bases[kind]}, dtype: float32, quantization: {quantized}}}\n"
        f"task: {{name: token_classification, label_at: {'first' if kind == 'bert' else 'last'}}}\nmethod: {method}\n"
        f"dataset: {{train: {bases['data'] / 'train.jsonl'}, eval: {bases['data'] / 'eval.jsonl'}, max_length: 64}}\n"
        f"train: {{epochs: 2, batch_size: 8, learning_rate: 2e-2}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    report = helpers.run(text)
    assert report.eval is not None and report.eval_before is not None and report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed
    assert report.eval.loss < 0.8 * report.eval_before.loss
    assert (
        {"entity_f1", "entity_precision", "entity_recall", "token_accuracy"} >= set(report.eval.metrics) >= {"token_accuracy", "entity_f1"}
    )
    assert report.comparisons["loss"].difference == pytest.approx(report.eval.loss - report.eval_before.loss)
    # Read back from the folder alone, the labels and the head too.
    result = open_result(tmp_path / "run")
    rows = result.task.rows(result.recipe.dataset, result.base.tokenizer)  # type: ignore[union-attr]
    split = prepare_eval(rows, base_dir=Path(), seed=0)
    module = result.task.module(result.model)
    with torch.no_grad():
        measured = module.measure(result.task.batch(split, range(5), Layout(False, 3)))
    assert float(measured["loss"].sum() / measured["units"].sum()) == pytest.approx(report.eval.loss, rel=1e-4)


@pytest.mark.parametrize(("flat", "wrong", "right"), [(False, "f1", "entity_f1"), (True, "entity_f1", "f1")])
def test_gates_are_checked_against_what_the_tags_are(flat: bool, wrong: str, right: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Whether tags mark entities is known once the rows are read, and then a gate on the other kind's figure ends the run."""
    for part, count in (("train", 48), ("eval", 5)):
        rows = [{**row, "tags": [tag[-1:] for tag in row["tags"]]} if flat else row for row in map(sentence, range(count))]
        write(tmp_path / f"{part}.jsonl", rows)
    text = (
        f"base_model: {{name: {bases['bert']}, dtype: float32}}\ntask: token_classification\nmethod: lora\n"
        f"dataset: {{train: {tmp_path / 'train.jsonl'}, eval: {tmp_path / 'eval.jsonl'}, max_length: 64}}\n"
        f"train: {{epochs: 2, batch_size: 8, learning_rate: 2e-2}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    with pytest.raises(UsageError, match=f"expect.eval.{wrong} is not measured of rows like these") as refused:
        helpers.run(text, f"expect.eval.{wrong}=> 0.1")
    assert right in str(refused.value) and not (tmp_path / "run" / "adapter").exists()
    report = helpers.run(text, f"expect.eval.{right}=> 0.1", "expect.eval.token_accuracy=> 1", f"expect.comparisons.{right}.difference=> 0")
    assert [(gate.key, gate.found is not None) for gate in report.gates] == [
        (f"eval.{right}", True), ("eval.token_accuracy", True), (f"comparisons.{right}.difference", True),
    ]  # fmt: skip
    assert report.gates[1].passed is False


@pytest.mark.slow
@pytest.mark.skipif(DATA is None or MODELS is None, reason="PEFTCLI_DATA_DIR and PEFTCLI_MODELS_DIR are not set")
def test_an_encoder_learns_to_find_attributes_in_real_descriptions(tmp_path: Path) -> None:
    """MiniLM with LoRA on 240 descriptions; the held-out ones are of the published development set, whose restaurants are others."""
    assert DATA is not None and MODELS is not None
    train, held_out = measure_tasks.slots(Path(DATA))
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(held_out)
    write(tmp_path / "train.jsonl", train[:240])
    write(tmp_path / "eval.jsonl", held_out[:60])
    report = helpers.run(
        f"base_model: {{name: {Path(MODELS) / 'minilm'}, dtype: float32}}\ntask: token_classification\n"
        f"method: {{name: lora, rank: 8, alpha: 16}}\n"
        f"dataset: {{train: {tmp_path / 'train.jsonl'}, eval: {tmp_path / 'eval.jsonl'}, max_length: 128}}\n"
        f"train: {{epochs: 2, batch_size: 8, learning_rate: 3e-3}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert report.eval is not None and report.eval_before is not None
    assert report.eval_before.metrics["entity_f1"] < 0.1
    assert report.eval.metrics["entity_f1"] > 0.8
    assert report.comparisons["entity_f1"].p_value < 0.01
    assert report.comparisons["entity_f1"].interval[0] > 0.6
