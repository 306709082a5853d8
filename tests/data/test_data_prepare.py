"""The whole way from the recipe's section to tokenized splits: truncation, hold-out, weights, counts, determinism."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_tokenizer

from peftcli.data.audit import audit_rows
from peftcli.data.neutral import Completion, Document
from peftcli.data.prepare import Prepared, prepare, prepare_eval
from peftcli.data.sampling import choose, weigh
from peftcli.data.splits import Split
from peftcli.data.templates import load
from peftcli.data.text_rows import TextRows
from peftcli.data.tokenize import Encoder
from peftcli.data.truncation import fit
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

Write = Callable[..., str]


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {number}:", "completion": f" answer {number}"} for number in range(start, start + count)]


def run(seed: int = 0, tokenizer: Any = None, max_positions: int | None = None, **section: Any) -> Prepared:
    return prepare(
        TextRows(DatasetSection(**section), tokenizer or byte_tokenizer(adds_bos=True)),
        base_dir=Path(),
        seed=seed,
        max_positions=max_positions,
    )


def same(one: Split, other: Split) -> bool:
    return one.origins == other.origins and all(
        np.array_equal(a, b)
        for left, right in ((one.input_ids, other.input_ids), (one.supervised, other.supervised))
        for a, b in zip(left, right, strict=True)
    )


def test_counts_files_and_generation(write_rows: Write) -> None:
    train, held_out = write_rows(pairs(5)), write_rows(pairs(3, start=10), "eval.jsonl")
    found = run(train=train, eval=held_out)
    assert found.eval is not None
    assert found.files == [(path, hashlib.sha256(Path(path).read_bytes()).hexdigest()) for path in (train, held_out)]
    assert found.train.counts.rows == 5 == len(found.train.input_ids) and found.eval.counts.rows == 3
    assert found.train.counts.tokens == sum(found.train.lengths) and found.train.counts.longest == max(found.train.lengths)
    assert found.train.counts.supervised_tokens == sum(int(mask.sum()) for mask in found.train.supervised) == found.audit.supervised_tokens
    assert all(
        ids.dtype == np.int32 and mask.dtype == np.bool_ for ids, mask in zip(found.train.input_ids, found.train.supervised, strict=True)
    )
    assert found.train.generation == []
    first = found.eval.generation[0]
    tokenizer = byte_tokenizer(adds_bos=True)
    assert (first.prompt, first.reference, first.origin) == ("question 10:", " answer 10", f"{held_out}:1")
    assert first.prompt_ids == tokenizer("question 10:")["input_ids"]
    assert found.train.stop_ids == (tokenizer.eos_token_id,)
    assert json.loads(json.dumps(found.audit.to_dict()))["bos_rows"] == 5


def test_stop_ids_hold_the_templates_end_of_turn(write_rows: Write) -> None:
    rows = write_rows([{"instruction": "a", "output": "b"}])
    tokenizer = byte_tokenizer()
    found = run(tokenizer=tokenizer, train=rows, chat_template="chatml")
    assert found.train.stop_ids == tuple(sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])))
    assert tokenizer.chat_template == load("chatml", Path())


def lengths_of(rows: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    return [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]


def long_rows() -> list[dict[str, Any]]:
    return [{"prompt": "q:", "completion": " ok"}, {"prompt": "q:", "completion": " z" * 40}, {"prompt": "z " * 60, "completion": "ok"}]


def test_keep_start_counts_and_drops_rows_left_without_loss(write_rows: Write) -> None:
    """Row 8: truncation that masks every label."""
    path = write_rows(long_rows())
    found = run(train=path, max_length=20)
    assert found.train.counts.rows == 2 and found.train.counts.truncated == 1 and found.train.counts.dropped == 1
    assert found.train.dropped_origins == [f"{path}:3"]
    assert found.train.lengths[1] == 20 == found.train.counts.longest
    assert all(mask.any() for mask in found.train.supervised)
    assert found.audit.complete_rows == found.audit.eos_supervised == 1
    assert any("dropped 1 rows without a supervised token" in note for note in found.audit.notes)
    with pytest.raises(DataError, match=r"none of 1 rows has a supervised token left within dataset\.max_length 20"):
        run(train=write_rows(long_rows()[2:]), max_length=20)


def test_keep_end_keeps_bos_and_eos(write_rows: Write) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    found = run(train=write_rows(long_rows()), max_length=20, truncation="keep_end")
    assert (found.train.counts.rows, found.train.counts.truncated, found.train.counts.dropped) == (3, 2, 0)
    for ids, mask in zip(found.train.input_ids, found.train.supervised, strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and mask[-1] and len(ids) <= 20
    assert tokenizer.decode(found.train.input_ids[2]).endswith("ok</s>")


def test_drop_and_error_name_the_rows(write_rows: Write) -> None:
    path = write_rows(long_rows())
    found = run(train=path, max_length=20, truncation="drop")
    assert (found.train.counts.rows, found.train.counts.truncated, found.train.counts.dropped) == (1, 0, 2)
    assert found.train.dropped_origins == [f"{path}:2", f"{path}:3"]
    with pytest.raises(DataError, match=r"2 faults(.|\n)*rows.jsonl:2: \d+ tokens, dataset.max_length is 20(.|\n)*rows.jsonl:3: "):
        run(train=path, max_length=20, truncation="error")
    with pytest.raises(DataError, match="only rows of plain text can be split"):
        run(train=path, max_length=20, truncation="split")


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 12), st.integers(0, 60))
def test_split_loses_nothing(max_length: int, words: int) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    whole = Encoder(tokenizer).encode([Document("z " * words + "end", "r:1")])[0]
    pieces = fit([whole], max_length=max_length, mode="split", bos=tokenizer.bos_token_id)
    assert np.concatenate([row.input_ids for row in pieces.rows]).tolist() == whole.input_ids.tolist()
    assert all(2 <= len(row.input_ids) <= max_length and row.supervised[1:].all() for row in pieces.rows)
    assert (pieces.truncated, pieces.unsupervised, pieces.split) == (0, [], int(len(whole.input_ids) > max_length))
    assert audit_rows(pieces.rows, tokenizer, train_on="completions", truncated=0, dropped=0).eos_supervised == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.sampled_from(["keep_start", "keep_end", "drop"]))
def test_every_row_is_kept_or_counted(max_length: int, mode: Any) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    rows = Encoder(tokenizer).encode([Completion("q" * place, "a" * (31 - place), f"r:{place}", "") for place in range(1, 31)])
    try:
        fitted = fit(rows, max_length=max_length, mode=mode, bos=tokenizer.bos_token_id)
    except DataError as error:
        assert "none of 30 rows" in str(error)
        return
    origins = [row.origin for row in fitted.rows] + fitted.too_long + fitted.unsupervised
    assert sorted(origins) == sorted(row.origin for row in rows)
    assert all(len(row.input_ids) <= max_length and row.supervised.any() and not row.supervised[0] for row in fitted.rows)
    assert fitted.truncated == sum(row.truncated for row in fitted.rows)


def test_empty_answers_are_dropped_and_counted(write_rows: Write) -> None:
    path = write_rows([*pairs(2), {"prompt": "x", "completion": ""}])
    found = run(train=path)
    assert (found.train.counts.rows, found.train.counts.dropped, found.train.dropped_origins) == (2, 1, [f"{path}:3"])
    assert any(f"dropped 1 rows whose answer is empty ({path}:3)" in note for note in found.audit.notes)
    assert found.audit.dropped == 1
    with pytest.raises(DataError, match="there are no training rows left"):
        run(train=write_rows([{"prompt": "x", "completion": ""}], "empty.jsonl"))


def test_hold_out_is_disjoint_deterministic_and_never_empty(write_rows: Write) -> None:
    path = write_rows(pairs(20))
    one, again, other = (run(seed=seed, train=path, eval_fraction=0.25) for seed in (1, 1, 2))
    assert one.eval is not None and again.eval is not None and other.eval is not None
    assert same(one.train, again.train) and same(one.eval, again.eval)
    assert one.eval.origins != other.eval.origins
    assert len(one.eval.origins) == 5
    assert sorted([*one.train.origins, *one.eval.origins]) == sorted(f"{path}:{line}" for line in range(1, 21))
    tiny = run(train=write_rows(pairs(2), "two.jsonl"), eval_fraction=0.001)
    assert tiny.eval is not None and (tiny.train.counts.rows, tiny.eval.counts.rows) == (1, 1)
    with pytest.raises(DataError, match="1 distinct rows cannot be divided"):
        run(train=write_rows(pairs(1), "one.jsonl"), eval_fraction=0.5)
    alone = prepare_eval(TextRows(DatasetSection(train=path, eval_fraction=0.25), byte_tokenizer(adds_bos=True)), base_dir=Path(), seed=1)
    assert same(alone, one.eval)


def test_exact_duplicates_stay_on_one_side_and_leaks_are_noted(write_rows: Write) -> None:
    path = write_rows(pairs(6) * 3)
    found = run(train=path, eval_fraction=0.5)
    assert found.eval is not None
    decode = byte_tokenizer(adds_bos=True).decode
    assert not {decode(ids) for ids in found.train.input_ids} & {decode(ids) for ids in found.eval.input_ids}
    leaking = run(train=path, eval=write_rows([*pairs(2), *pairs(1, start=50)], "eval.jsonl"))
    assert "2 of 3 held-out rows stand in the training rows as well, word for word" in leaking.audit.notes


def test_weights_and_limits(write_rows: Write) -> None:
    one, two, three = (write_rows(pairs(10, start=start), f"{start}.jsonl") for start in (0, 100, 200))
    sources = [{"path": one, "weight": 2}, {"path": two, "weight": 0.3}, {"path": three, "limit": 4, "weight": 1.5}]
    found = run(train=sources)
    counted = Counter(origin.rsplit(":", 1)[0] for origin in found.train.origins)
    assert counted == {one: 20, two: 3, three: 6}
    assert same(found.train, run(train=sources).train)
    assert found.train.origins != run(seed=5, train=sources).train.origins
    assert run(train=[one, two], limit=13).train.origins[-1] == f"{two}:3"
    held_out = run(train=one, eval=two, eval_limit=2).eval
    assert held_out is not None and held_out.origins == [f"{two}:1", f"{two}:2"]


@given(st.integers(1, 200), st.floats(0.01, 5), st.integers(0, 99))
def test_weigh_takes_each_row_evenly(count: int, weight: float, seed: int) -> None:
    places = weigh(count, weight, seed, 0)
    times = Counter(places)
    assert len(places) == max(1, count * int(weight) + round(weight % 1.0 * count))
    assert set(times.values()) <= {int(weight), int(weight) + 1} and set(times) <= set(range(count))
    assert np.array_equal(places, weigh(count, weight, seed, 0))


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(0, 99))
def test_choose_leaves_both_sides_something(count: int, fraction: float, seed: int) -> None:
    chosen = choose(count, fraction, seed)
    assert 1 <= len(chosen) == len(set(chosen)) <= count - 1 and set(chosen) <= set(range(count))
    assert np.array_equal(chosen, choose(count, fraction, seed))


def test_max_length_is_clamped_to_the_models_positions(write_rows: Write) -> None:
    found = run(train=write_rows(long_rows()), max_length=5000, max_positions=20)
    assert found.train.counts.longest == 20
    assert "dataset.max_length 5000 is more than the model's 20 positions, which hold instead" in found.audit.notes


def test_sources_may_differ_in_format_and_columns(write_rows: Write) -> None:
    one = write_rows([{"question": "q", "answer": "a"}], "qa.jsonl")
    two = write_rows([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}], "chat.jsonl")
    tokenizer = byte_tokenizer()
    sources = [{"path": one, "columns": {"instruction": "question", "output": "answer"}}, {"path": two, "format": "messages"}]
    found = run(tokenizer=tokenizer, train=sources, chat_template="chatml")
    assert [tokenizer.decode(ids[mask]) for ids, mask in zip(found.train.input_ids, found.train.supervised, strict=True)] == [
        "a<|im_end|>",
        "b<|im_end|>",
    ]
    with pytest.raises(DataError, match="format alpaca has no column 'prompt'"):
        run(train=one, format="alpaca", columns={"prompt": "question"})


def test_raw_rows_say_that_a_named_template_has_no_influence(write_rows: Write) -> None:
    found = run(train=write_rows(pairs(2)), chat_template="chatml", system="Be brief.")
    assert any("dataset.chat_template and dataset.system has no influence" in note for note in found.audit.notes)


def test_documents_have_no_generation_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    kind = TextRows(DatasetSection(train=str(path), eval=str(path)), byte_tokenizer(adds_bos=True))
    split = prepare_eval(kind, base_dir=Path(), seed=0)
    assert split.generation == [] and split.counts.rows == 1


def test_prepare_eval_needs_held_out_rows(write_rows: Write) -> None:
    path = write_rows(pairs(3))
    with pytest.raises(DataError, match="no held-out rows"):
        prepare_eval(TextRows(DatasetSection(train=path), byte_tokenizer()), base_dir=Path(), seed=0)
    split = prepare_eval(TextRows(DatasetSection(train=path, eval=path, eval_limit=2), byte_tokenizer()), base_dir=Path(), seed=0)
    assert split.counts.rows == len(split.generation) == 2


def test_train_on_all(write_rows: Write) -> None:
    found = run(train=write_rows(pairs(3)), train_on="all")
    assert found.audit.supervised_tokens == found.audit.tokens - 3
    assert found.audit.train_on == "all"
