"""Hub datasets over HTTP: the ``datasets`` library against a server on this machine that answers as the hub does. What is read comes as
it is asked for, errors of the library and of the line become messages, and a pinned commit is found in the cache again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RANGE = 15 << 20  # what datasets asks for at once


def lines(count: int, padding: int = 0) -> bytes:
    return b"".join(json.dumps({"prompt": f"{i}:", "completion": " a", "x": "y" * padding}).encode() + b"\n" for i in range(count))


def parquet(count: int) -> bytes:
    stream = io.BytesIO()
    table = pa.table({"prompt": [f"{i}:" for i in range(count)], "completion": [" a"] * count, "x": [""] * count})
    pq.write_table(table, stream, row_group_size=10)
    return stream.getvalue()


REPOSITORIES = {
    "owner/parquet": {"data/train-00000-of-00002.parquet": parquet(25), "data/train-00001-of-00002.parquet": parquet(15)},
    "owner/large": {"train.jsonl": lines(600, 100_000), "test.jsonl": lines(3)},
    "owner/small": {"train.jsonl": lines(40)},
    "owner/broken": {"train.jsonl": lines(30) + b'{"prompt": "cut o\n' + lines(5)},
}


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub that reading a public dataset asks for."""

    protocol_version = "HTTP/1.1"
    furthest: dict[str, int] = {}

    def log_message(self, *_: object) -> None: ...

    def _json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, content: bytes | None) -> None:
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)) if asked else (0, len(content) - 1)
        part = content[start : end + 1]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command != "HEAD":
            self.furthest[name] = max(self.furthest.get(name, 0), end + 1)
            self.wfile.write(part)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(f"{found[1]}/{found[2]}", REPOSITORIES.get(found[1], {}).get(found[2]))
        elif (found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(/.*)?)?", path)) and found[1] in REPOSITORIES:
            files = REPOSITORIES[found[1]]
            if found[2] == "tree":
                folder = f"{(found[3] or '').strip('/')}/".lstrip("/")
                listed = {name: content for name, content in files.items() if name.startswith(folder) and "/" not in name[len(folder) :]}
                inside = {name[: name.index("/", len(folder))] for name in files if name.startswith(folder) and name not in listed}
                self._json(
                    [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(inside)]
                    + [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in listed.items()]
                )
            else:
                self._json({"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False})
        else:
            self._json({"error": "Repository not found"}, 404)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ASK = """
import json, sys
from pathlib import Path
from small_tokenizers import byte_tokenizer
from peftcli.data.prepare import prepare
from peftcli.data.text_rows import TextRows
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

for section in json.loads(sys.argv[1]):
    try:
        found = prepare(TextRows(DatasetSection(**section, num_proc=1), byte_tokenizer()), base_dir=Path(), seed=3)
    except DataError as error:
        print(json.dumps({"error": str(error)}))
        continue
    print(json.dumps({
        "kind": type(found.train).__name__,
        "origins": list(found.train.origins),
        "held_out": None if found.eval is None else list(found.eval.origins),
        "files": found.files,
        "notes": found.audit.notes,
        "texts": [byte_tokenizer().decode(ids) for ids in found.train.input_ids],
    }))
"""


def test_a_dataset_of_the_hub_is_read_as_it_comes(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    small = {"train": {"path": "owner/small", "revision": COMMIT}, "eval_fraction": 0.2}
    sections = [
        {"train": "owner/large", "eval": "owner/large", "streaming": True, "limit": 20},
        {**small, "streaming": True},
        {**small, "streaming": True},
        {**small, "streaming": False},
        {"train": "owner/parquet", "streaming": True},
        {"train": "owner/broken", "streaming": True, "on_error": "skip"},
        {"train": "owner/nothing", "streaming": True},
    ]
    tests = Path(__file__).resolve().parent.parent
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy") and not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(sections)], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    large, first, second, whole, published, broken, nothing = map(json.loads, done.stdout.splitlines()[-7:])
    assert [text.split(":")[0] for text in published["texts"]] == [str(i) for i in (*range(25), *range(15))]
    assert published["origins"] == [f"owner/parquet/train[{index}]" for index in range(40)]
    assert large["kind"] == "StoredText"
    assert large["origins"] == [f"owner/large/train[{index}]" for index in range(20)]
    assert large["held_out"] == [f"owner/large/test[{index}]" for index in range(3)]
    size = len(REPOSITORIES["owner/large"]["train.jsonl"])
    assert 0 < Hub.furthest["owner/large/train.jsonl"] <= RANGE < size / 3, "what lies behind the first rows is not loaded"
    assert first["texts"] == second["texts"] == whole["texts"]
    assert first["origins"] == whole["origins"]
    assert first["held_out"] == whole["held_out"]
    assert len(first["origins"]) == 32
    assert (first["kind"], whole["kind"]) == ("StoredText", "TextSplit")
    assert not any("taken from the cache" in note for note in first["notes"])
    assert any("taken from the cache" in note for note in second["notes"])
    assert [name for name, _ in first["files"]] == [f"owner/small@{COMMIT}"]
    assert re.search(r"owner/broken/train: the rows break off before number \d+ \(\w+: ", broken["error"])
    assert "owner/nothing: no such file or folder, and no hub dataset of this name could be had (" in nothing["error"]
    assert "Traceback" not in done.stderr
