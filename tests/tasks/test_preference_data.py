"""Rows with two answers: every layout that people have, what is refused, how long rows are cut, what the audit counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import preference_cases as cases
import pytest

from peftcli.data.formats import Converter, check_mapping, convert_rows, detect
from peftcli.data.neutral import Item, Judged, Message, Preference
from peftcli.data.preference_rows import JudgedRows, PreferenceRows
from peftcli.data.prepare import prepare
from peftcli.data.readers import Row
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import CausalLMTask, DPOTask, KTOTask

ASKED, GOOD, BAD = Message("user", "hi"), Message("assistant", "hello"), Message("assistant", "no")
HUMAN = {"from": "human", "value": "hi"}
USER, HELLO, NO = ({"role": m.role, "content": m.content} for m in (ASKED, GOOD, BAD))


def convert(values: dict[str, Any], mapping: dict[str, str] | None = None, system: str | None = None, chat: bool = True) -> Item:
    mapping = mapping or {}
    check_mapping(mapping, values, "rows")
    formats = KTOTask.formats if "label" in {*values, *mapping} else DPOTask.formats
    name = detect(values, mapping, "rows", formats)
    items, empty = convert_rows([Row(values, "rows:1")], Converter(name, mapping, chat=chat, system=system))
    assert not empty
    return items[0]


def fault(values: dict[str, Any], **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(values, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "no"}},
        {"prompt": [USER], "chosen": [HELLO], "rejected": [NO]},
        {"prompt": "hi", "chosen": [HELLO], "rejected": [NO]},
        {"prompt": "hi", "chosen": [USER, HELLO], "rejected": [USER, NO]},
        {"chosen": [USER, HELLO], "rejected": [USER, NO]},
        {"instruction": "hi", "chosen": "hello", "rejected": "no"},
        {"prompt": [USER], "chosen": "hello", "rejected": "no", "score": 3},
    ],
    ids=["llama-factory", "messages", "text and messages", "prompt repeated", "implicit", "alpaca", "messages and text"],
)
def test_layouts_of_pairs(values: dict[str, Any]) -> None:
    assert convert(values) == Preference([ASKED], [GOOD], [BAD], "rows:1")


def test_raw_texts_stay_raw() -> None:
    assert convert({"prompt": "a: ", "chosen": "b", "rejected": "c"}) == Preference("a: ", "b", "c", "rows:1")
    found = convert({"question": "hi", "chosen": "b", "rejected": "c"}, {"instruction": "question"}, chat=False)
    assert isinstance(found, Preference) and isinstance(found.prompt, str) and found.prompt.endswith("hi\n\n### Response:\n")


def test_what_both_conversations_begin_with_is_the_prompt() -> None:
    more = [USER, HELLO, {"role": "user", "content": "and?"}]
    found = convert({"chosen": [*more, HELLO], "rejected": [*more, NO]}, system="be kind")
    assert isinstance(found, Preference)
    assert found.prompt == [Message("system", "be kind"), ASKED, GOOD, Message("user", "and?")]
    assert (found.chosen, found.rejected) == ([GOOD], [BAD])


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "hi", "completion": [HELLO], "label": True},
        {"prompt": [USER], "completion": "hello", "label": 1},
        {"messages": [USER, HELLO], "label": "True"},
    ],
)
def test_layouts_of_single_answers(values: dict[str, Any]) -> None:
    assert convert(values) == Judged([ASKED], [GOOD], True, "rows:1")
    assert convert({"prompt": "a: ", "completion": "b", "label": False}) == Judged("a: ", "b", False, "rows:1")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"chosen": [USER, HELLO], "rejected": [{"role": "user", "content": "ho"}, NO]}, "do not begin with the same prompt"),
        ({"prompt": "hi", "chosen": [USER], "rejected": [NO]}, "rows:1: chosen: the answer begins with a message of the user"),
        ({"prompt": "hi", "chosen": 3, "rejected": "no"}, "rows:1: chosen"),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": "much"}, "margin: 'much' is not a finite number"),
        ({"prompt": "hi", "completion": "yes", "label": "good"}, "label: 'good' is neither true"),
        ({"messages": [HELLO], "label": True}, "no prompt before the answer"),
        ({"messages": [HELLO, USER], "label": True}, "the answer begins with a message of the user"),
        ({"question": "hi", "good": "a"}, "Known formats: preference (prompt, chosen, rejected)"),
        ({"prompt": "hi", "label": True}, "Known formats: kto (prompt, completion, label); kto_messages (messages, label)"),
    ],
)
def test_faults_name_row_and_column(values: dict[str, Any], said: str) -> None:
    assert said in fault(values)


def test_single_answers_are_no_pairs_and_pairs_no_chats() -> None:
    with pytest.raises(DataError, match="no format of this task has the columns prompt, completion"):
        detect(["prompt", "completion"], {}, "rows", DPOTask.formats)
    with pytest.raises(DataError, match="task: dpo"):
        detect(["prompt", "chosen", "rejected"], {}, "rows", CausalLMTask.formats)
    with pytest.raises(DataError, match="task: kto"):
        detect(["messages", "label"], {}, "rows", CausalLMTask.formats)
    with pytest.raises(RecipeError, match="does not fit task dpo"):
        parse_recipe("base_model: x\nmethod: lora\ntask: dpo\ndataset: {train: r.jsonl, format: alpaca}\n", "r.yaml")
    with pytest.raises(RecipeError, match="label_smoothing is for loss_type sigmoid and robust; hinge has none"):
        parse_recipe("base_model: x\nmethod: lora\ntask: {name: dpo, loss_type: hinge, label_smoothing: 0.1}\ndataset: r.jsonl\n", "r.yaml")


def prepared(kind: type[PreferenceRows | JudgedRows], path: Path, **section: Any) -> Any:
    return prepare(kind(DatasetSection(train=[str(path)], **section), helpers.tiny_tokenizer()), base_dir=path.parent, seed=0)  # type: ignore[list-item]


def test_the_audit_counts_both_answers_and_shows_them(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "chosen": "cde", "rejected": "f"}, {"prompt": "ab", "chosen": "x", "rejected": "x"}]
    found = prepared(PreferenceRows, cases.write(tmp_path / "rows.jsonl", rows))
    audit = found.audit
    # Bytes, and an end token for each answer.
    assert (audit.rows, audit.tokens, audit.chosen_tokens, audit.rejected_tokens) == (1, 6 + 4, 4, 2)
    assert (audit.same, audit.dropped, audit.supervised_tokens, audit.prompt_tokens) == (1, 1, 6, 4)
    assert "1 rows, each with two answers to one prompt: 4 tokens preferred to 2, of 10 in all" in audit.summary
    assert any("dropped 1 rows whose two answers are the same" in note and "rows.jsonl:2" in note for note in audit.notes)
    assert audit.example == (("ab", False), ("cde<|im_end|>", True), ("\nrejected:\n", False), ("ab", False), ("f<|im_end|>", True))
    split = found.train
    assert (split.lengths, split.units(0), split.counts.longest) == ((10,), 1, 6)
    with pytest.raises(DataError, match="none of 1 training rows is left: 1 have two answers that are the same"):
        prepared(PreferenceRows, cases.write(tmp_path / "same.jsonl", rows[1:]))


def texts(split: Any, row: int = 0) -> list[str]:
    tokenizer = helpers.tiny_tokenizer()
    return [tokenizer.decode(answer.input_ids.tolist()) for answer in split.rows[row]]


def test_long_pairs(tmp_path: Path) -> None:
    path = cases.write(
        tmp_path / "rows.jsonl", [{"prompt": "abcd", "chosen": "efghi", "rejected": "jk"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    )
    assert texts(prepared(PreferenceRows, path, max_length=7).train) == ["abcdefg", "abcdjk<|im_end|>"]
    ended = prepared(PreferenceRows, path, max_length=7, truncation="keep_end").train
    assert texts(ended) == ["defghi<|im_end|>", "djk<|im_end|>"], "both answers lose the same tokens of their prompt"
    assert all(not row.supervised[0] for row in ended.rows[0])
    dropped = prepared(PreferenceRows, path, max_length=7, truncation="drop")
    assert len(dropped.train.rows) == 1 == dropped.train.counts.dropped and dropped.train.dropped_origins[0].endswith(":1")
    short = prepared(PreferenceRows, path, max_length=4)
    assert len(short.train.rows) == 1 and any("hold no part of an answer" in note for note in short.audit.notes)
    with pytest.raises(DataError, match="rows.jsonl:1: 10 tokens, dataset.max_length is 7"):
        prepared(PreferenceRows, path, max_length=7, truncation="error")
    for section, said in (({"truncation": "split"}, "cannot be split"), ({"train_on": "all"}, "where answers alone are judged")):
        for kind in (PreferenceRows, JudgedRows):
            with pytest.raises(DataError, match=said):
                prepared(kind, path, **section)


def test_conversations_share_their_prompt_to_the_token(tmp_path: Path) -> None:
    rows = [{"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "no"}}]
    split = prepared(PreferenceRows, cases.write(tmp_path / "rows.jsonl", rows), system="s").train
    chosen, rejected = split.rows[0]
    first = int(chosen.supervised.argmax())
    assert chosen.input_ids[:first].tolist() == rejected.input_ids[:first].tolist() == chosen.prompt_ids.tolist()
    assert first == int(rejected.supervised.argmax())
    assert texts(split)[0].endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n")


def test_unrelated_answers_are_those_of_the_nearest_row_before_with_another_prompt(tmp_path: Path) -> None:
    rows = [("a", "1"), ("a", "2"), ("b", "3"), ("b", "4"), ("c", "5")]
    path = cases.write(tmp_path / "rows.jsonl", [{"prompt": p, "completion": c, "label": c in "135"} for p, c in rows])
    found = prepared(JudgedRows, path)
    assert [texts(found.train, row)[1] for row in range(5)] == [f"{t}<|im_end|>" for t in ("a5", "a5", "b2", "b2", "c4")]
    assert found.train.labels.tolist() == [1, 0, 1, 0, 1]
    assert (found.audit.desirable, found.audit.undesirable, found.audit.tokens) == (3, 2, 15)
    longer = prepared(
        JudgedRows,
        cases.write(path, [{"prompt": "ab", "completion": "c" * n, "label": n > 1} for n in (1, 9)]),
        max_length=5,
        truncation="drop",
    )
    assert texts(longer.train) == ["abc<|im_end|>"] * 2, "alone in its kind, a row stands in for itself"
    alone = prepared(JudgedRows, cases.write(path, [{"prompt": "ab", "completion": "c", "label": True}]))
    assert any("every training answer is wanted" in note for note in alone.audit.notes)


def test_a_faulty_row_is_left_out_with_both_answers(tmp_path: Path) -> None:
    tools = [{"name": "f", "parameters": {}}]
    rows = [{"prompt": [USER], "chosen": [HELLO], "rejected": [NO], **({"tools": tools} if index == 1 else {})} for index in range(3)]
    path = cases.write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="rows.jsonl:2: it has tools, and the chat template renders none"):
        prepared(PreferenceRows, path)
    found = prepared(PreferenceRows, path, on_error="skip").train
    assert [origin.rpartition(":")[2] for origin in found.origins] == ["1", "3"]
    assert found.counts.dropped == 1 and found.dropped_origins[0].endswith(":2")
