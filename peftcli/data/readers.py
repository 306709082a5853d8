"""Reading one data file into rows, each with its place in the file.

Line formats (JSONL, CSV, TSV, lines that a pattern takes apart) and Parquet are read piece by piece, so a longer file than
memory is possible for a caller that does not keep the rows; a JSON array is read as a whole. A fault is noted with
``file:line`` and reading goes on with the next line where the format allows it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from peftcli.data.faults import Faults

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_ENCODING = "name the file's encoding, for example encoding: latin-1 beside its path in the recipe"
_ROW_KEYS = ("messages", "conversations")
_LONGEST_FIELD = 2**31 - 1
_BOM = b"\xef\xbb\xbf"
LINE_FORMATS = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file.

    Attributes:
        values: column name to value; text for CSV and TSV, else whatever the format holds.
        origin: ``file:line`` for line formats, ``file[index]`` for JSON arrays and Parquet (from 0), ``file`` for text.
    """

    values: dict[str, Any]
    origin: str


_ABSENT = object()


def cell(values: dict[str, Any], name: str) -> Any:
    """The value of a column, ``None`` where it is absent. A dot leads into it: ``instances.0.output``."""
    found = _inside(values, name)
    return None if found is _ABSENT else found


def has_cell(values: dict[str, Any], name: str) -> bool:
    """Whether :func:`cell` finds something."""
    return _inside(values, name) is not _ABSENT


def _inside(values: dict[str, Any], name: str) -> Any:
    if name in values:
        return values[name]
    first, *steps = name.split(".")
    found: Any = values.get(first, _ABSENT) if steps else _ABSENT
    for step in steps:
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return _ABSENT
    return found


def kind_of(path: Path) -> str | None:
    """The format's suffix such as ``".jsonl"``, with ``.gz`` taken off; ``None`` for a file that is not read."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read that do not say it themselves; the recipe's source has the same names.

    Attributes:
        header: names of the columns of a table whose first line is a row already.
        delimiter: what stands between the cells of a table; ``None``: a comma, in ``.tsv`` files a tab.
        encoding: of text files.
        pattern: a regular expression that each line must match from its beginning to its end; its named groups are the columns.
    """

    header: tuple[str, ...] | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"
    pattern: re.Pattern[str] | None = None

    def kind(self, path: Path) -> str | None:
        """The suffix of the format that a file is read as."""
        if self.pattern is not None:
            return "pattern"
        return ".csv" if self.delimiter is not None else kind_of(path)


def read_file(
    path: Path, shown: str, faults: Faults, reading: Reading | None = None, *, only: Container[int] | None = None
) -> Iterator[Row]:
    """The rows of a file in its order.

    Args:
        path: the file.
        shown: its name in origins and faults.
        faults: where faults go; what could not be read is left out of the rows.
        only: take only these lines apart, of a format with one row on each line; other formats give every row.
    """
    reading = reading or Reading()
    kind = reading.kind(path)
    with opened(path, shown, faults) as stream:
        if stream is None:
            return
        if kind in LINE_FORMATS:
            yield from json_lines(stream, shown, faults, reading, only=only)
        elif kind == ".json":
            yield from _json(stream.read(), shown, faults, reading)
        elif kind in (".csv", ".tsv"):
            yield from _table(stream, shown, faults, reading, tab=reading.delimiter == "\t" or kind == ".tsv")
        elif kind == ".parquet":
            yield from _parquet(stream, shown, faults)
        elif kind == ".txt":
            yield from _text(stream.read(), shown, faults, reading)
        elif kind == "pattern":
            yield from _matched(stream, shown, faults, reading)
        else:
            faults.add(f"not a data file; known are {', '.join(SUFFIXES)}, each also as .gz", at=shown)


@contextmanager
def opened(path: Path, shown: str, faults: Faults) -> Iterator[IO[bytes] | None]:
    """A file's bytes, unpacked; ``None`` for an empty one. What goes wrong while it is read becomes a fault."""
    try:
        if path.stat().st_size == 0:
            faults.add("the file is empty", at=shown)
            yield None
            return
        with _open(path) as stream:
            yield stream
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        faults.add(f"the gzip data is broken or cut off ({error}); nothing behind that place was read", at=shown)
    except OSError as error:
        faults.add(f"cannot be read ({error.strerror or error})", at=shown)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _decode(raw: bytes, place: str, faults: Faults, encoding: str) -> str | None:
    """The text of a line or a file, or ``None`` after noting why not."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) and encoding == "utf-8":
        faults.add(
            "the text is UTF-16, not UTF-8", at=place, hint="convert it first, for example: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
        )
        return None
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        name = "UTF-8" if encoding == "utf-8" else encoding
        faults.add(
            f"byte 0x{raw[error.start]:02X} (byte {error.start - line_start + 1} of the line) is not {name}", at=place, hint=_ENCODING
        )
        return None
    if "\0" in text:
        before = len(text[: text.index(chr(0))].encode(encoding))
        faults.add(f"NUL byte (byte {before + 1})", at=place, hint="the file is damaged or not a text file")
        return None
    return text


def _lines(
    stream: IO[bytes], shown: str, faults: Faults, reading: Reading, *, first: int = 1, only: Container[int] | None = None
) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, first):
        if only is not None and number not in only:
            continue
        text = _decode(raw.removeprefix(_BOM) if number == 1 else raw, f"{shown}:{number}", faults, reading.encoding)
        if text is not None:
            yield number, text
        elif number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return


def _whole(raw: bytes, shown: str, faults: Faults, encoding: str) -> str | None:
    """A whole file's text; a fault names the line that the first bad byte stands on."""
    raw = raw.removeprefix(_BOM)
    try:
        bad = raw.find(b"\0")
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        bad = error.start
    line = 1 if bad < 0 or raw.startswith((b"\xff\xfe", b"\xfe\xff")) else raw.count(b"\n", 0, bad) + 1
    start = 0 if line == 1 else raw.rfind(b"\n", 0, bad) + 1
    return _decode(raw, shown, faults, encoding) if bad < 0 else _decode(raw[start:], f"{shown}:{line}", faults, encoding)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def json_lines(
    stream: IO[bytes],
    shown: str,
    faults: Faults,
    reading: Reading,
    *,
    first: int = 1,
    only: Container[int] | None = None,
    part: bool = False,
) -> Iterator[Row]:
    """The rows of JSON Lines, or of a part of them.

    Args:
        first: the number of the stream's first line.
        only: take only these lines apart.
        part: the stream is not the whole file, and may hold no row.
    """
    before, empty = faults.count, not part and only is None
    for number, text in _lines(stream, shown, faults, reading, first=first, only=only):
        if not text.strip():
            continue
        empty = False
        place = f"{shown}:{number}"
        try:
            value = _loads(text)
        except ValueError as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.add(f"not valid JSON ({what}): {_excerpt(text)}", at=place)
            continue
        if isinstance(value, dict):
            yield Row(value, place)
        else:
            faults.add(f'a row must be an object such as {{"text": ...}}, found {_name(value)}', at=place)
    if empty and faults.count == before:
        faults.add("the file has no rows", at=shown)


def _json(raw: bytes, shown: str, faults: Faults, reading: Reading) -> Iterator[Row]:
    text = _whole(raw, shown, faults, reading.encoding)
    if text is None:
        return
    if not text.strip():
        faults.add("the file has no rows", at=shown)
        return
    try:
        value = _loads(text)
    except ValueError as error:
        first_line = text.lstrip().split("\n", 1)[0]
        if first_line.startswith("{") and _is_object(first_line):
            # Many people name JSON Lines ".json".
            yield from json_lines(io.BytesIO(raw), shown, faults, reading)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        faults.add(f"not valid JSON ({what})", at=f"{shown}:{line}")
        return
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
        if len(lists) == 1 and lists[0] not in _ROW_KEYS:
            value = value[lists[0]]
        elif len(value) and all(isinstance(item, list) for item in value.values()) and not lists:
            faults.add("the file holds columns, not rows; an array of objects is needed", at=shown, hint="write it with orient='records'")
            return
        else:
            value = [value]
    if not isinstance(value, list):
        faults.add(f"an array of objects is needed, found {_name(value)}", at=shown)
        return
    if not value:
        faults.add("the file has no rows", at=shown)
    for index, item in enumerate(value):
        if isinstance(item, dict):
            yield Row(item, f"{shown}[{index}]")
        else:
            faults.add(f"a row must be an object, found {_name(item)}", at=f"{shown}[{index}]")


def _table(stream: IO[bytes], shown: str, faults: Faults, reading: Reading, *, tab: bool) -> Iterator[Row]:
    """CSV as RFC 4180 has it; TSV without quoting, as text/tab-separated-values has it (a quote is a quote)."""
    csv.field_size_limit(_LONGEST_FIELD)
    at, before = 0, faults.count

    def lines() -> Iterator[str]:
        nonlocal at
        for number, text in _lines(stream, shown, faults, reading):
            at = number
            yield text

    delimiter = "\t" if tab else reading.delimiter or ","
    reader = csv.reader(lines(), delimiter=delimiter, quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL, strict=True)
    header = None if reading.header is None else list(reading.header)
    rows = 0
    start = 0
    while True:
        start = at + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            lost = f"; lines {start} to {at} were taken for one row" if at > start else ""
            faults.add(f"{error} (a quote that does not close, or text after a closing quote{lost})", at=f"{shown}:{start}")
            if at < start:
                break
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header) or "" in header:
                faults.add(
                    f"the first line must name each column once, found {', '.join(map(repr, header))}",
                    at=f"{shown}:1",
                    hint="where the first line is a row, name the columns beside the path in the recipe, such as header: [text, label]",
                )
                return
            continue
        rows += 1
        if len(cells) != len(header):
            what = "values are missing" if len(cells) < len(header) else "there are values without a column"
            faults.add(f"{len(cells)} values in {len(header)} columns ({', '.join(header)}): {what}", at=f"{shown}:{start}")
            continue
        yield Row(dict(zip(header, cells, strict=True)), f"{shown}:{start}")
    if not rows and faults.count == before:
        faults.add("the file has no rows" + ("" if reading.header else " below its header"), at=shown)


def _matched(stream: IO[bytes], shown: str, faults: Faults, reading: Reading) -> Iterator[Row]:
    """Lines as a pattern takes them apart; a group that took no part is an empty text."""
    assert reading.pattern is not None
    before, empty = faults.count, True
    for number, text in _lines(stream, shown, faults, reading):
        line = text.rstrip("\r\n")
        if not line.strip():
            continue
        empty = False
        found = reading.pattern.fullmatch(line)
        if found is None:
            faults.add(f"the line does not match the source's pattern: {_excerpt(line)}", at=f"{shown}:{number}")
        else:
            yield Row(found.groupdict(default=""), f"{shown}:{number}")
    if empty and faults.count == before:
        faults.add("the file has no rows", at=shown)


def _parquet(stream: IO[bytes], shown: str, faults: Faults) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

    try:
        file = pq.ParquetFile(stream)
        index = 0
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                yield Row(values, f"{shown}[{index}]")
                index += 1
    except pa.ArrowException as error:
        faults.add(f"not a readable Parquet file ({str(error).splitlines()[0]})", at=shown)
        return
    if not index:
        faults.add("the file has no rows", at=shown)


def _text(raw: bytes, shown: str, faults: Faults, reading: Reading) -> Iterator[Row]:
    text = _whole(raw, shown, faults, reading.encoding)
    if text is None:
        return
    if not text.strip():
        faults.add("the file has no text", at=shown)
        return
    yield Row({"text": text.replace("\r\n", "\n")}, shown)


def _is_object(text: str) -> bool:
    try:
        return isinstance(_loads(text), dict)
    except ValueError:
        return False


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _excerpt(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-16:]}"
