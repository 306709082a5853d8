"""What holds for the rows of every task alike: weights and limits of sources, exact duplicates and leakage counted before training, and
faulty rows named or skipped, wherever they are found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_tokenizer

from peftcli.data.kinds import RowKind
from peftcli.data.labelled_rows import LabelledRows
from peftcli.data.preference_rows import JudgedRows, PreferenceRows
from peftcli.data.prepare import Prepared, prepare
from peftcli.data.seq2seq_rows import Seq2SeqRows
from peftcli.data.tagged_rows import TaggedRows
from peftcli.data.text_rows import TextRows
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import TASKS

WORDS = ("red", "green", "blue")
Values = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Rows of one task.

    Attributes:
        make: what they become. ``row``: one that asks for number ``i``, with answer number ``j``.
        broken: a row with a value of a wrong type, and the column that the fault names.
        strange: a row whose fault is seen only beside the others or in the run's settings, and what the fault says.
    """

    make: Callable[[DatasetSection], RowKind[Any]]
    row: Callable[[int, int], Values]
    broken: tuple[Values, str]
    strange: tuple[Values, str] | None = None


def tokenizer() -> Any:
    made = byte_tokenizer()
    # Refuses what a conversation may not hold, as published templates do.
    made.chat_template = (
        "{% for m in messages %}{% if m.content == 'never' %}{{ raise_exception('never is not said') }}{% endif %}{{ m.role }}: "
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def said(*texts: str) -> list[Values]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


KINDS = {
    "chats": Kind(
        lambda config: TextRows(config, tokenizer()),
        lambda i, j: {"messages": said(f"ask {i}", WORDS[j % 3])},
        ({"messages": 3}, "messages"),
        ({"messages": said("never", "red")}, "never is not said"),
    ),
    "texts": Kind(
        lambda config: TextRows(config, tokenizer()),
        lambda i, j: {"prompt": f"ask {i}", "completion": WORDS[j % 3]},
        ({"prompt": "a", "completion": 3}, "completion"),
    ),
    "one label": Kind(
        lambda config: LabelledRows(config, tokenizer(), None, WORDS),
        lambda i, j: {"text": f"ask {i}", "label": WORDS[j % 3]},
        ({"text": 3, "label": "red"}, "text"),
        ({"text": "a", "label": "bleu"}, "'bleu' is none of the 3 labels; did you mean 'blue'?"),
    ),
    "several labels": Kind(
        lambda config: LabelledRows(config, tokenizer(), "multi_label", WORDS),
        lambda i, j: {"text": f"ask {i}", "text_pair": "x", "label": list(WORDS[: j % 3])},
        ({"text": "a", "label": [1.5]}, "label"),
        ({"text": "a", "label": ["red", "red"]}, "a label stands twice"),
    ),
    "numbers": Kind(
        lambda config: LabelledRows(config, tokenizer(), "regression", None),
        lambda i, j: {"text": f"ask {i}", "label": j + 0.5},
        ({"text": "a", "label": {}}, "label"),
        ({"text": "a", "label": "high"}, "the label 'high' is no number"),
    ),
    "tags": Kind(
        lambda config: TaggedRows(config, tokenizer(), ("O", "B-COL"), "first"),
        lambda i, j: {"tokens": ["ask", str(i)], "tags": ["O", ("O", "B-COL", "O")[j % 3]]},
        ({"tokens": ["a"], "tags": ["O", "O"]}, "tokens and tags: 1 words and 2 tags"),
        ({"tokens": ["a", "b"], "tags": ["X", "B-KOL"]}, "'B-KOL' is none of the 2 tags; did you mean 'B-COL'? Nor is 'X'."),
    ),
    "text to text": Kind(
        lambda config: Seq2SeqRows(config, tokenizer(), None),
        lambda i, j: {"messages": said(f"ask {i}", WORDS[j % 3])},
        ({"messages": []}, "messages"),
        ({"messages": said("a", "b", "c", "d")}, "more of a conversation"),
    ),
    "pairs": Kind(
        lambda config: PreferenceRows(config, tokenizer()),
        lambda i, j: {"prompt": said(f"ask {i}"), "chosen": WORDS[j % 3], "rejected": "no"},
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen"),
        ({"prompt": said("never"), "chosen": "a", "rejected": "b"}, "never is not said"),
    ),
    "judged": Kind(
        lambda config: JudgedRows(config, tokenizer()),
        lambda i, j: {"prompt": said(f"ask {i}"), "completion": WORDS[j % 3], "label": i % 2 == 0},
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "label"),
        ({"prompt": said("never"), "completion": "a", "label": True}, "never is not said"),
    ),
}
pytestmark = pytest.mark.parametrize("name", KINDS)


def write(path: Path, rows: list[Values | str]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def run(name: str, **section: Any) -> Prepared:
    return prepare(KINDS[name].make(DatasetSection(**section)), base_dir=Path(), seed=3)


def rows(name: str, *numbers: int | tuple[int, int]) -> list[Values | str]:
    return [KINDS[name].row(*((number, number) if isinstance(number, int) else number)) for number in numbers]


def test_weights_and_limits_of_sources(name: str, tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / f"{start}.jsonl", rows(name, *range(start, start + 10))) for start in (0, 100, 200))
    sources = [{"path": one, "weight": 2}, {"path": two, "weight": 0.3}, {"path": three, "limit": 4, "weight": 1.5}]
    found = run(name, train=sources)
    assert Counter(origin.rsplit(":", 1)[0] for origin in found.train.origins) == {one: 20, two: 3, three: 6}
    assert found.train.origins == run(name, train=sources).train.origins
    assert run(name, train=[one, two], limit=13).train.origins[-1] == f"{two}:3"


def test_duplicates_and_leakage_are_counted(name: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows(name, 0, 1, 2, 1, 3, 1, 4))
    # Number 7 is new; 1 and 2 stand in the training rows; 3 and 4 are asked there with another answer.
    held_out = write(tmp_path / "eval.jsonl", rows(name, 7, 1, 2, (3, 4), (4, 5)))
    found = run(name, train=train, eval=held_out)
    audit = found.audit
    assert (audit.rows, audit.duplicates, audit.leaked_rows, audit.leaked_inputs) == (7, 2, 2, 4)
    assert any("2 training rows repeat an earlier one exactly; dataset.deduplicate: true" in note for note in audit.notes)
    assert any("2 of 5 held-out rows stand in the training rows as well" in note for note in audit.notes)
    assert any("2 of 5 held-out rows ask what a training row asks" in note for note in audit.notes)
    once = run(name, train=train, eval=held_out, deduplicate=True)
    assert [origin.rpartition(":")[2] for origin in once.train.origins] == ["1", "2", "3", "5", "7"]
    assert any("left out 2 training rows" in note for note in once.audit.notes)
    # What is held out of the training rows takes its repetitions with it.
    apart = run(name, train=train, eval_fraction=0.4)
    assert apart.eval is not None and apart.audit.leaked_rows == 0
    assert len(apart.train.origins) + len(apart.eval.origins) == 7


def test_faulty_rows_are_named_or_skipped_wherever_they_are_found(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    good = rows(name, *range(6))
    missing = dict(good[0]) if isinstance(good[0], dict) else {}
    gone = list(missing)[-1]
    del missing[gone]
    faults: list[tuple[Values | str, str]] = [
        ('{"cut o', "not valid JSON"),
        ("[1]", "a row must be an object"),
        (missing, f"there is no column {gone!r}"),
        kind.broken,
        *([kind.strange] if kind.strange else []),
    ]
    train = write(tmp_path / "train.jsonl", [*good, *(row for row, _ in faults)])
    held_out = write(tmp_path / "eval.jsonl", [*rows(name, 20, 21), *([kind.strange[0]] if kind.strange else [])])
    found = run(name, train=train, eval=held_out, on_error="skip")
    named = dict(found.skipped)
    assert len(named) == len(found.skipped) == len(faults) + bool(kind.strange) == found.audit.skipped
    for place, (_, what) in enumerate(faults, len(good) + 1):
        assert what in named[f"{train}:{place}"]
    assert [origin.rpartition(":")[2] for origin in found.train.origins] == [str(place) for place in range(1, 7)]
    assert found.train.counts.dropped == found.audit.dropped == len(faults)
    assert {*found.train.dropped_origins} == {f"{train}:{place}" for place in range(7, 7 + len(faults))}
    assert found.eval is not None and (found.eval.counts.rows, found.eval.counts.dropped) == (2, int(bool(kind.strange)))
    assert any(f"skipped {len(named)} faulty rows" in note for note in found.audit.notes)
    for row, what in faults:
        path = write(tmp_path / "one.jsonl", [*good, row])
        with pytest.raises(DataError) as refused:
            run(name, train=path)
        assert f"{path}:7: " in str(refused.value) and what in str(refused.value)


def test_where_every_row_is_faulty_that_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind = KINDS[name]
    row, what = kind.strange or kind.broken
    path = write(tmp_path / "rows.jsonl", [row, row])
    for streaming in (False, True)[: 1 + (name == "chats")]:
        with pytest.raises(DataError) as refused:
            run(name, train=path, on_error="skip", streaming=streaming)
        assert what in f"{refused.value} {refused.value.hint}" and "rows.jsonl:" in str(refused.value)


def test_a_task_that_keeps_its_rows_in_memory_refuses_to_stream(name: str) -> None:
    tasks = {
        "one label": "sequence_classification",
        "tags": "token_classification",
        "text to text": "seq2seq",
        "pairs": "dpo",
        "judged": "kto",
    }
    task = tasks.get(name, "causal_lm")
    text = f"base_model: x\nmethod: lora\ntask: {task}\ndataset:\n  train: r.jsonl\n  streaming: true\n"
    kind = KINDS[name].make(DatasetSection(train="r.jsonl"))  # type: ignore[arg-type]
    if name in tasks:
        with pytest.raises(RecipeError, match=rf"r.yaml:6:14: dataset.streaming: does not fit task {task}, whose rows are kept in memory"):
            parse_recipe(text, "r.yaml")
    elif TASKS[task].streams:
        parse_recipe(text, "r.yaml")
    assert kind.streams == (task == "causal_lm" and "text" in kind.formats)
