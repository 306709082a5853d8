"""Rows that are read as a stream: the same split as in memory, kept in a cache that is keyed by content."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_tokenizer

from peftcli.data import store
from peftcli.data.batching import Plan
from peftcli.data.prepare import Prepared, prepare, prepare_eval
from peftcli.data.sources import HubSource
from peftcli.data.splits import TextSplit
from peftcli.data.stored_text import StoredText
from peftcli.data.text_rows import TextRows
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection, SourceSection

TOKENIZER = byte_tokenizer(adds_bos=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "peftcli" / "tokens"


def run(section: dict[str, Any], tokenizer: Any = None, seed: int = 3, **more: Any) -> Prepared:
    return prepare(TextRows(DatasetSection(**section, **more), tokenizer or TOKENIZER), base_dir=Path(), seed=seed)


def contents(split: Any) -> list[tuple[str, list[int], list[bool], int]]:
    return [
        (split.origins[row], split.input_ids[row].tolist(), split.supervised[row].tolist(), split.units(row))
        for row in range(len(split.origins))
    ]


def notes(found: Prepared) -> list[str]:
    return [note for note in found.audit.notes if "taken from the cache" not in note]


def assert_same(one: Prepared, other: Prepared) -> None:
    assert isinstance(one.train, StoredText) and type(other.train) is TextSplit
    assert contents(one.train) == contents(other.train)
    assert list(one.train.lengths) == list(other.train.lengths)
    assert (one.eval is None) == (other.eval is None)
    if one.eval is not None and other.eval is not None:
        assert contents(one.eval) == contents(other.eval) and one.eval.generation == other.eval.generation
        assert one.eval.counts == other.eval.counts
    for name in ("counts", "dropped_origins", "stop_ids"):
        assert getattr(one.train, name) == getattr(other.train, name)
    assert sorted(one.skipped) == sorted(other.skipped)
    assert notes(one) == notes(other)
    assert {**one.audit.to_dict(), "notes": []} == {**other.audit.to_dict(), "notes": []}
    assert one.files == other.files


ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": st.sampled_from(["q", "ask:", "", "é 三"]), "completion": st.sampled_from(["a", "b" * 30, " ", "dd"])}),
        st.just("{broken"),
        st.just({"prompt": 3, "completion": "x"}),
        st.just(""),
    ),
    min_size=1,
    max_size=25,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROWS, min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.4, 1.0, 1.0, 2.5]), min_size=3, max_size=3),
    fraction=st.sampled_from([0.0, 0.3]),
    limit=st.sampled_from([None, 4]),
    mode=st.sampled_from(["keep_start", "keep_end", "drop"]),
    deduplicate=st.booleans(),
    on_error=st.sampled_from(["fail", "skip"]),
    train_on=st.sampled_from(["completions", "all"]),
    suffix=st.sampled_from(["jsonl", "jsonl.gz"]),
)
def test_a_stream_gives_what_memory_gives(
    rows: list[Any], weights: list[float], fraction: float, limit: int | None, mode: str, deduplicate: bool, on_error: str, train_on: str,
    suffix: str, tmp_path: Path,
) -> None:  # fmt: skip
    sources = []
    for number, part in enumerate(rows):
        path = tmp_path / f"{number}.{suffix}"
        text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in part).encode()
        path.write_bytes(gzip.compress(text, mtime=0) if suffix.endswith("gz") else text)
        sources.append({"path": str(path), "weight": weights[number]})
    section = {"train": sources, "eval_fraction": fraction, "limit": limit, "truncation": mode, "deduplicate": deduplicate,
               "on_error": on_error, "train_on": train_on, "max_length": 12, "eval_limit": 2}  # fmt: skip
    found = []
    for streaming in (True, False):
        try:
            found.append(run(section, streaming=streaming, num_proc=1))
        except DataError as error:
            found.append(error)
    stream, memory = found
    if isinstance(memory, DataError):
        assert isinstance(stream, DataError)
        if "faults in the data" in str(memory) or "1 fault in" in str(memory):
            assert str(stream).splitlines()[1] == str(memory).splitlines()[1], "the same first fault"
        return
    assert not isinstance(stream, DataError), stream
    assert_same(stream, memory)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def many(count: int) -> list[dict[str, Any]]:
    chance = random.Random(0)
    return [
        {"prompt": f"{number % 37}:", "completion": " " + "z" * chance.randint(0, 30), "ignored": "x" * 1500} for number in range(count)
    ]


def test_processes_change_nothing(tmp_path: Path, cache: Path) -> None:
    """Two chunks and more, in their order, whatever process tokenized them."""
    lines = [json.dumps(row) for row in many(1600)]
    lines[3] = lines[1500] = "{broken"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert path.stat().st_size > 2 * (1 << 20)
    section: dict[str, Any] = {"train": {"path": str(path), "weight": 1.5}, "eval_fraction": 0.01, "on_error": "skip", "deduplicate": True}
    memory = run(section, streaming=False)
    found = run(section, streaming=True, num_proc=2)
    assert_same(found, memory)
    assert [skipped.origin for skipped in found.skipped] == [f"{path}:4", f"{path}:1501"]
    assert found.audit.duplicates > 0 and found.audit.skipped == 2
    made = {p.name: p.read_bytes() for p in next(p for p in cache.iterdir() if p.is_dir()).iterdir()}
    for entry in cache.iterdir():
        if entry.is_dir():
            for inner in entry.iterdir():
                inner.unlink()
    assert_same(run(section, streaming=True, num_proc=1), memory)
    assert made == {p.name: p.read_bytes() for p in next(p for p in cache.iterdir() if p.is_dir()).iterdir()}, "the same bytes"


def test_tables_texts_and_folders_are_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.csv").write_text("text\n" + "".join(f'"row {number},\nx"\n' for number in range(1200)))
    (folder / "b.json").write_text(json.dumps([{"text": "in an array"}, {"text": ""}]))
    write(folder / "c.jsonl", [{"text": "a line"}])
    section: dict[str, Any] = {"train": str(folder)}
    memory = run(section, streaming=False)
    assert_same(run(section, streaming=True, num_proc=1), memory)
    assert memory.train.counts.dropped == 1 and memory.train.origins[1200] == f"{folder}/b.json[0]"
    assert_same(run(section, streaming=True, num_proc=1, limit=1201), run(section, streaming=False, limit=1201))
    book = tmp_path / "book.txt"
    book.write_text("one two three\n" * 50)
    section = {"train": str(book), "truncation": "split", "max_length": 16}
    assert_same(run(section, streaming=True, num_proc=1), run(section, streaming=False))


def taken(found: Prepared) -> bool:
    return any("taken from the cache" in note for note in found.audit.notes)


def test_the_cache_is_found_again_and_any_change_of_content_is_another_one(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = many(5)
    section: dict[str, Any] = {"train": write(path, rows), "streaming": True, "num_proc": 1}
    first = run(section)
    again = run(section)
    assert not taken(first) and taken(again) and contents(first.train) == contents(again.train)
    # What only chooses among the rows does not tokenize them anew.
    assert taken(run(section, seed=9, eval_fraction=0.4, deduplicate=True, shuffle=False))
    for change in ({"max_length": 20}, {"train_on": "all"}, {"truncation": "drop"}, {"on_error": "skip"}, {"limit": 3}):
        assert not taken(run(section, **change)), change
    assert not taken(run(section, tokenizer=byte_tokenizer(adds_bos=False)))
    chat: dict[str, Any] = {"train": write(tmp_path / "chat.jsonl", [{"instruction": "a", "output": "b"}]), "streaming": True}
    assert not taken(run(chat, tokenizer=byte_tokenizer(), chat_template="chatml"))
    assert not taken(run(chat, tokenizer=byte_tokenizer(), chat_template="zephyr"))
    assert taken(run(chat, tokenizer=byte_tokenizer(), chat_template="zephyr"))
    before = path.stat()
    write(path, [{**rows[0], "completion": rows[0]["completion"][:-1] + "y"}, *rows[1:]])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    changed = run(section)
    assert not taken(changed) and contents(changed.train) != contents(first.train)


def folders(cache: Path) -> list[Path]:
    return [entry for entry in cache.iterdir() if entry.is_dir()]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["ids.bin", "supervised.bin", "pieces.bin", "rows.bin", "manifest.json"]), place=st.floats(0, 1, exclude_max=True),
       damage=st.sampled_from(["flip", "cut", "remove", "grow"]))  # fmt: skip
def test_a_damaged_cache_is_made_anew(name: str, place: float, damage: str, tmp_path: Path, cache: Path) -> None:
    section: dict[str, Any] = {"train": write(tmp_path / "rows.jsonl", many(4)), "streaming": True, "num_proc": 1}
    good = contents(run(section).train)
    path = folders(cache)[0] / name
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if damage == "flip":
        content[at] ^= 1
    elif damage == "cut":
        del content[at:]
    else:
        content.extend(b"0")
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content)
    found = run(section)
    # A byte behind the manifest's last line is no damage.
    assert not taken(found) or (name == "manifest.json" and damage in ("grow", "cut"))
    assert contents(found.train) == good and taken(run(section))


def test_nothing_half_made_stays(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": broken\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON"):
        run({"train": str(path), "streaming": True})
    assert folders(cache) == []
    old = cache / ".new-killed"
    old.mkdir()
    os.utime(old, (0, 0))
    path.write_text('{"text": "one"}\n')
    run({"train": str(path), "streaming": True})
    assert len(folders(cache)) == 1 and not old.exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(DataError, match=r"cache of tokenized rows .* cannot be written(.|\n)*streaming: false"):
        run({"train": str(path), "streaming": True})


def test_the_audit_refuses_in_a_worker_too(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": chat, "ignored": "x" * 4000}] * 600)
    tokenizer = byte_tokenizer(adds_bos=True)
    tokenizer.chat_template = "<s><s>{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match=r"rows.jsonl:1 starts with two BOS(.|\n)*take the BOS out"):
        run({"train": path, "streaming": True, "num_proc": 2}, tokenizer=tokenizer)


def test_the_rows_held_out_of_a_stream_are_the_ones_evaluated_later(tmp_path: Path) -> None:
    section: dict[str, Any] = {"train": write(tmp_path / "rows.jsonl", many(60)), "streaming": True, "eval_fraction": 0.2, "eval_limit": 7}
    found = run(section)
    assert found.eval is not None and len(found.eval.origins) == 7
    alone = prepare_eval(TextRows(DatasetSection(**section), TOKENIZER), base_dir=Path(), seed=3)
    assert contents(alone) == contents(found.eval) and alone.generation == found.eval.generation
    assert not set(found.eval.origins) & set(found.train.origins)


def test_large_files_are_streamed_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as stream:
        for number in range(33):
            stream.write(json.dumps({"text": f"row {number}", "ignored": "x" * 2_000_000}) + "\n")
    assert isinstance(run({"train": str(path), "num_proc": 1}).train, StoredText)
    assert type(run({"train": str(path), "streaming": False}).train) is TextSplit


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset folder that ``datasets`` itself reads, under a path that looks like a hub id."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "owner" / "set").mkdir(parents=True)
    write(tmp_path / "owner" / "set" / "train.jsonl", many(30))
    write(tmp_path / "owner" / "set" / "test.jsonl", many(4))
    monkeypatch.chdir(tmp_path)
    return "owner/set"


def hub(path: str, role: Any, streaming: bool) -> HubSource:
    from peftcli.data import sources

    return sources._hub(SourceSection(path=path), Path(), role, streaming)


def test_a_hub_dataset_is_read_as_it_comes(hub_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from peftcli.data.faults import Faults

    loose, whole = hub(hub_folder, "train", True), hub(hub_folder, "train", False)
    assert isinstance(loose.table, datasets.IterableDataset) and isinstance(whole.table, datasets.Dataset)
    assert loose.size is None and (whole.size or 0) > 0 and loose.key is None and whole.key
    files: list[list[tuple[str, str]]] = [[], []]
    rows = [list(source.rows(Faults(), used)) for source, used in zip((loose, whole), files, strict=True)]
    assert rows[0] == rows[1] and len(rows[0]) == 30 and rows[0][0].origin == "owner/set/train[0]"
    assert files[0] == files[1] and files[0][0][0] == "owner/set@main"
    assert len(list(hub(hub_folder, "eval", True).rows(Faults(), []))) == 4


def test_the_order_of_a_stream_is_the_order_of_memory(tmp_path: Path) -> None:
    section: dict[str, Any] = {"train": write(tmp_path / "rows.jsonl", many(80))}
    lengths = [run(section, streaming=streaming).train.lengths for streaming in (True, False)]
    for size, tokens in ((3, None), (None, 64)):
        digests = {
            Plan(lengths=found, batch_size=size, batch_tokens=tokens, accumulation=2, processes=2, seed=4, group_by_length=True).digest(2)
            for found in lengths
        }
        assert len(digests) == 1


@pytest.fixture(autouse=True)
def no_store_is_left_mapped() -> Iterator[None]:
    yield
    assert store.HAS_START == 1 and np.dtype(store.ROW).itemsize == 35
