"""Reading one data file into rows, each with its place in the file.

Line formats (JSONL, CSV, TSV) are read line by line, so a longer file than memory is possible for a caller that does
not keep the rows. A fault is noted with ``file:line`` and reading goes on with the next line where the format allows it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from peftcli.data.faults import Faults

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_CONVERT = "convert it first, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE"
_ROW_KEYS = ("messages", "conversations")
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file.

    Attributes:
        values: column name to value; text for CSV and TSV, else whatever the format holds.
        origin: ``file:line`` for line formats, ``file[index]`` for JSON arrays and Parquet (from 0), ``file`` for text.
    """

    values: dict[str, Any]
    origin: str


def kind_of(path: Path) -> str | None:
    """The format's suffix such as ``".jsonl"``, with ``.gz`` taken off; ``None`` for a file that is not read."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_file(path: Path, shown: str, faults: Faults) -> Iterator[Row]:
    """The rows of a file in its order.

    Args:
        path: the file.
        shown: its name in origins and faults.
        faults: where faults go; what could not be read is left out of the rows.
    """
    kind = kind_of(path)
    try:
        if path.stat().st_size == 0:
            faults.add(f"{shown}: the file is empty")
            return
        with _open(path) as stream:
            if kind in (".jsonl", ".ndjson"):
                yield from _json_lines(stream, shown, faults)
            elif kind == ".json":
                yield from _json(stream.read(), shown, faults)
            elif kind in (".csv", ".tsv"):
                yield from _table(stream, shown, faults, tab=kind == ".tsv")
            elif kind == ".parquet":
                yield from _parquet(stream, shown, faults)
            elif kind == ".txt":
                yield from _text(stream.read(), shown, faults)
            else:
                faults.add(f"{shown}: not a data file; known are {', '.join(SUFFIXES)}, each also as .gz")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        faults.add(f"{shown}: the gzip data is broken or cut off ({error})")
    except OSError as error:
        faults.add(f"{shown}: cannot be read ({error.strerror or error})")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _decode(raw: bytes, place: str, faults: Faults) -> str | None:
    """UTF-8 text of a line or a file, or ``None`` after noting why not."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        faults.add(
            f"{place}: the text is UTF-16, not UTF-8", hint="convert it first, for example: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
        )
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        faults.add(f"{place}: byte 0x{raw[error.start]:02X} (byte {error.start - line_start + 1} of the line) is not UTF-8", hint=_CONVERT)
        return None
    if "\0" in text:
        faults.add(
            f"{place}: NUL byte (byte {len(text[: text.index(chr(0))].encode()) + 1})", hint="the file is damaged or not a text file"
        )
        return None
    return text


def _lines(stream: IO[bytes], shown: str, faults: Faults) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, 1):
        text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, f"{shown}:{number}", faults)
        if text is not None:
            yield number, text
        elif number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return


def _whole(raw: bytes, shown: str, faults: Faults) -> str | None:
    """A whole file's text; a fault names the line that the first bad byte stands on."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        bad = raw.find(b"\0")
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.start
    line = 1 if bad < 0 or raw.startswith((b"\xff\xfe", b"\xfe\xff")) else raw.count(b"\n", 0, bad) + 1
    start = 0 if line == 1 else raw.rfind(b"\n", 0, bad) + 1
    return _decode(raw, shown, faults) if bad < 0 else _decode(raw[start:], f"{shown}:{line}", faults)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def _json_lines(stream: IO[bytes], shown: str, faults: Faults) -> Iterator[Row]:
    empty = True
    for number, text in _lines(stream, shown, faults):
        if not text.strip():
            continue
        empty = False
        place = f"{shown}:{number}"
        try:
            value = _loads(text)
        except ValueError as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.add(f"{place}: not valid JSON ({what}): {_excerpt(text)}")
            continue
        if isinstance(value, dict):
            yield Row(value, place)
        else:
            faults.add(f'{place}: a row must be an object such as {{"text": ...}}, found {_name(value)}')
    if empty and not faults.found:
        faults.add(f"{shown}: the file has no rows")


def _json(raw: bytes, shown: str, faults: Faults) -> Iterator[Row]:
    text = _whole(raw, shown, faults)
    if text is None:
        return
    if not text.strip():
        faults.add(f"{shown}: the file has no rows")
        return
    try:
        value = _loads(text)
    except ValueError as error:
        first_line = text.lstrip().split("\n", 1)[0]
        if first_line.startswith("{") and _is_object(first_line):
            # Many people name JSON Lines ".json".
            yield from _json_lines(io.BytesIO(raw), shown, faults)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        faults.add(f"{shown}:{line}: not valid JSON ({what})")
        return
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
        if len(lists) == 1 and lists[0] not in _ROW_KEYS:
            value = value[lists[0]]
        elif len(value) and all(isinstance(item, list) for item in value.values()) and not lists:
            faults.add(f"{shown}: the file holds columns, not rows; an array of objects is needed", hint="write it with orient='records'")
            return
        else:
            value = [value]
    if not isinstance(value, list):
        faults.add(f"{shown}: an array of objects is needed, found {_name(value)}")
        return
    if not value:
        faults.add(f"{shown}: the file has no rows")
    for index, item in enumerate(value):
        if isinstance(item, dict):
            yield Row(item, f"{shown}[{index}]")
        else:
            faults.add(f"{shown}[{index}]: a row must be an object, found {_name(item)}")


def _table(stream: IO[bytes], shown: str, faults: Faults, *, tab: bool) -> Iterator[Row]:
    """CSV as RFC 4180 has it; TSV without quoting, as text/tab-separated-values has it (a quote is a quote)."""
    csv.field_size_limit(_LONGEST_FIELD)
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for number, text in _lines(stream, shown, faults):
            at = number
            yield text

    reader = csv.reader(lines(), delimiter="\t" if tab else ",", quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL, strict=True)
    header: list[str] | None = None
    rows = 0
    start = 0
    while True:
        start = at + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            faults.add(f"{shown}:{start}: {error} (a quote that does not close, or text after a closing quote)")
            if at < start:
                break
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header) or "" in header:
                faults.add(f"{shown}:1: the first line must name each column once, found {', '.join(map(repr, header))}")
                return
            continue
        rows += 1
        if len(cells) != len(header):
            what = "values are missing" if len(cells) < len(header) else "there are values without a column"
            faults.add(f"{shown}:{start}: {len(cells)} values in {len(header)} columns ({', '.join(header)}): {what}")
            continue
        yield Row(dict(zip(header, cells, strict=True)), f"{shown}:{start}")
    if not rows and not faults.found:
        faults.add(f"{shown}: the file has no rows below its header")


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
        faults.add(f"{shown}: not a readable Parquet file ({str(error).splitlines()[0]})")
        return
    if not index:
        faults.add(f"{shown}: the file has no rows")


def _text(raw: bytes, shown: str, faults: Faults) -> Iterator[Row]:
    text = _whole(raw, shown, faults)
    if text is None:
        return
    if not text.strip():
        faults.add(f"{shown}: the file has no text")
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
