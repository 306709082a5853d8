"""Reading files: every format, and every fault with its place."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftcli.data.sources import SourceRows, open_source, read_source, stop_at
from peftcli.errors import DataError
from peftcli.recipe.schema import SourceSection

ROWS = [{"text": "one"}, {"text": "zwei ä"}, {"text": "三"}]


def read(path: Path | str, limit: int | None = None, base_dir: Path = Path(), source_limit: int | None = None) -> SourceRows:
    source = SourceSection(path=str(path), limit=source_limit)
    return read_source(open_source(source, base_dir=base_dir, role="train"), stop_at(source, limit))


def values(found: SourceRows) -> list[dict[str, object]]:
    return [row.values for row in found.rows]


def fault(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", lines(ROWS)),
        (".jsonl", lines(ROWS).replace(b"\n", b"\r\n")),
        (".jsonl", b"\xef\xbb\xbf" + lines(ROWS) + b"\n\n"),
        (".json", lines(ROWS)),
        (".json", json.dumps(ROWS, indent=1).encode()),
        (".json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        (".json", json.dumps({"version": 1, "data": ROWS}).encode()),
        (".csv", "\ufefftext\r\none\r\n\"zwei ä\"\r\n三\r\n".encode()),
        (".tsv", "text\none\nzwei ä\n三\n".encode()),
    ],
)  # fmt: skip
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str, content: bytes, packed: bool) -> None:
    path = tmp_path / f"rows{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    found = read(path)
    assert values(found) == ROWS
    assert found.files == [(str(path), hashlib.sha256(path.read_bytes()).hexdigest())]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]), path)
    found = read(path)
    assert values(found)[0] == {"messages": [{"role": "user", "content": "a"}]}
    assert [row.origin for row in found.rows] == [f"{path}[0]", f"{path}[1]"]
    assert "not a readable Parquet file" in fault(path, b"PAR1 no")


def test_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert values(read(path)) == [{"text": "one\ntwo\n"}]


def test_origins_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n{"text": broken\n')
    assert [row.origin for row in read(path, limit=2).rows] == [f"{path}:1", f"{path}:3"]
    assert len(read(path, limit=2, source_limit=1).rows) == 1


def test_csv_origin_is_the_line_that_a_row_starts_on(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('prompt,completion\n"two\nlines",x\nb,"y, ""z"""\n')
    found = read(path)
    assert [(row.origin, row.values["completion"]) for row in found.rows] == [(f"{path}:2", "x"), (f"{path}:4", 'y, "z"')]


def test_folder_is_read_in_order_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text('{"text": "2"}\n')
    (tmp_path / "a.json").write_text('[{"text": "1"}]')
    (tmp_path / "sub" / "c.csv").write_text("text\n3\n")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "SOURCE.txt").write_text("elsewhere")
    (tmp_path / ".hidden.jsonl").write_text("no")
    found = read(tmp_path)
    assert [row["text"] for row in values(found)] == ["1", "2", "3"]
    assert "LICENSE, SOURCE.txt" in found.notes[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        read(tmp_path / "empty")


def test_relative_paths_are_looked_up_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    recipes.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (recipes / "rows.jsonl").write_text('{"text": "recipe"}\n')
    found = read("rows.jsonl", base_dir=recipes)
    assert values(found) == [{"text": "recipe"}]
    assert found.files[0][0] == "rows.jsonl"
    (here / "rows.jsonl").write_text('{"text": "cwd"}\n')
    assert values(read("rows.jsonl", base_dir=recipes)) == [{"text": "cwd"}]
    with pytest.raises(DataError, match=r"row.jsonl: there is no such file.*did you mean 'rows.jsonl'"):
        read("row.jsonl", base_dir=recipes)


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", GOOD + b'{"text": "cut o', ":2: not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "n\0l"}\n', ":2: NUL byte (byte 12)"),
        ("a.jsonl", GOOD + GOOD + b'{"text": "caf\xe9"}\n', ":3: byte 0xE9 (byte 14 of the line) is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ":1: the text is UTF-16"),
        ("a.jsonl", GOOD + b"[1, 2]\n", ":2: a row must be an object"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file has no rows"),
        ("a.jsonl", b"[" * 100_000 + b"\n", ":1: not valid JSON (nested too deeply"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', ":2: not valid JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', ":2: byte 0xE9 (byte 14 of the line)"),
        ("a.json", b'[{"text": "a"},\n{"text": "\0"}]', ":2: NUL byte"),
        ("a.json", b'[{"text": "a"}, "b"]', "[1]: a row must be an object, found text"),
        ("a.json", b'{"text": ["a", "b"], "more": [1, 2]}', "holds columns, not rows"),
        ("a.json", b"[]", "the file has no rows"),
        ("a.json", b"3", "an array of objects is needed, found a number"),
        ("a.csv", b"prompt,completion\na,b\nc\n", ":3: 1 values in 2 columns (prompt, completion): values are missing"),
        ("a.csv", b"prompt,completion\na,b,c\n", ":2: 3 values in 2 columns (prompt, completion): there are values without a column"),
        ("a.csv", b'prompt,completion\na,b\nc,"d\ne,f\n', ":3: unexpected end of data"),
        ("a.csv", b'prompt,completion\na,"b"c\n', ":2: "),
        ("a.csv", b"prompt,prompt\na,b\n", ":1: the first line must name each column once"),
        ("a.csv", b"prompt,completion\n", "no rows below its header"),
        ("a.csv", b"prompt,completion\na,caf\xe9\n", ":2: byte 0xE9"),
        ("a.txt", b"one\ntwo caf\xe9", ":2: byte 0xE9 (byte 8 of the line)"),
        ("a.txt", b" \n", "the file has no text"),
        ("a.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-12], "gzip data is broken or cut off"),
        ("a.jsonl.gz", b"no gzip", "gzip data is broken or cut off"),
        ("a.xlsx", b"PK", "not a data file"),
    ],
)
def test_fault_names_file_and_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    message = fault(tmp_path / name, content)
    assert expected in message
    assert str(tmp_path / name) in message


def test_faults_are_collected_up_to_ten(tmp_path: Path) -> None:
    message = fault(tmp_path / "a.jsonl", b"x\n" + GOOD + b"y\n")
    assert "2 faults" in message and "a.jsonl:1:" in message and "a.jsonl:3:" in message
    message = fault(tmp_path / "b.jsonl", b"x\n" * 500)
    assert "the first 10 faults" in message and "b.jsonl:10:" in message and "b.jsonl:11:" not in message


def test_hub_id_without_a_hub_says_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"openai/gsm8k: no such file or folder, and no hub dataset.*Couldn't reach the Hub"):
        read("openai/gsm8k")


def test_hub_dataset_split_and_origin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[object] = []

    def load(path: str, name: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.extend([path, name, revision])
        table = datasets.Dataset.from_list([{"text": str(number)} for number in range(3)])
        return datasets.DatasetDict({"train": table, "validation": table.select([2])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    source = SourceSection(path="owner/set", name="main", revision="abc")
    found = read_source(open_source(source, base_dir=tmp_path, role="train"), 2)
    assert asked == ["owner/set", "main", "abc"]
    assert [(row.origin, row.values["text"]) for row in found.rows] == [("owner/set/train[0]", "0"), ("owner/set/train[1]", "1")]
    assert found.files[0][0] == "owner/set@abc"
    assert values(read_source(open_source(source, base_dir=tmp_path, role="eval"))) == [{"text": "2"}]
    with pytest.raises(DataError, match="no split 'dev'; it has 'train', 'validation'"):
        open_source(source.model_copy(update={"split": "dev"}), base_dir=tmp_path, role="eval")
