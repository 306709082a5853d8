"""Measure what it takes to tokenize a large file: time and memory, for a first run, one that finds the cache, and the plan.

    python scripts/measure_stream.py TOKENIZER_FOLDER [--rows 1000000] [--processes 2]

A hundredth, a tenth and all of the rows are streamed by one process; the tenth by several processes too, which have to write
the same bytes; and what memory alone takes is measured for the smaller two. Rows are made up (a seeded mixture of words and numbers,
about 240 bytes each). Each measurement runs in a process of its own, so peaks are not mixed. Writes scripts/results/stream.json;
rows, cache and tokens lie in a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "stream.json"
_WORDS = (
    "the a of to in and that model row token learns answer question river stone green seven light house because often "
    "between measure without number small large between water paper carries train slowly always never again"
).split()


def write_rows(path: Path, rows: int) -> None:
    """JSON Lines of prompts and completions, a pure function of their number."""
    chance = random.Random(rows)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            asked = " ".join(chance.choices(_WORDS, k=chance.randint(6, 20)))
            said = " ".join(chance.choices(_WORDS, k=chance.randint(8, 30)))
            row = {"prompt": f"{number}: {asked}?", "completion": f" {said} {chance.random():.6f}."}
            stream.write(json.dumps(row) + "\n")


def measure(path: Path, tokenizer_folder: str, processes: int, streaming: bool) -> dict[str, Any]:
    """Prepare the file once in this process, and plan an epoch of it."""
    from transformers import AutoTokenizer

    from peftcli.data.batching import Plan
    from peftcli.data.prepare import prepare
    from peftcli.data.store import cache_folder
    from peftcli.data.text_rows import TextRows
    from peftcli.recipe.schema import DatasetSection, SourceSection

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    section = DatasetSection(
        train=[SourceSection(path=str(path))], streaming=streaming, num_proc=processes, eval_fraction=0.001, eval_limit=200
    )
    before, started = _resident(), time.perf_counter()
    data = prepare(TextRows(section, tokenizer), base_dir=Path(), seed=0)
    prepared = time.perf_counter() - started
    counts = data.train.counts
    started = time.perf_counter()
    plan = Plan(lengths=data.train.lengths, batch_size=8, batch_tokens=None, accumulation=1, processes=1, seed=0)
    steps = len(plan.epoch(0))
    planned = time.perf_counter() - started
    started = time.perf_counter()
    digest = plan.digest(1)
    peak = _peak(resource.RUSAGE_SELF)
    stored = hashlib.sha256()
    for file in sorted(cache_folder().glob("*/*.bin")) if streaming else ():
        stored.update(file.read_bytes())
    return {
        "rows": counts.rows,
        "tokens": counts.tokens,
        "from_cache": any("taken from the cache" in note for note in data.audit.notes),
        "seconds": round(prepared, 1),
        "peak_bytes": peak,
        "resident_before_bytes": before,
        "bytes_on_top": peak - before,
        "largest_worker_bytes": _peak(resource.RUSAGE_CHILDREN),
        "steps_of_an_epoch": steps,
        "seconds_to_plan": round(planned, 3),
        "seconds_to_hash_the_order": round(time.perf_counter() - started, 2),
        "order_sha256": digest,
        "store_sha256": stored.hexdigest() if streaming else None,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def main() -> None:
    """Run every measurement and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "STREAMING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        path, streaming = arguments.one
        print(json.dumps(measure(Path(path), arguments.tokenizer, arguments.processes, streaming == "yes")))
        return
    found: dict[str, Any] = {"tokenizer": Path(arguments.tokenizer).name, "cores": os.cpu_count(), "runs": []}
    small, middle, large = (arguments.rows // part for part in (100, 10, 1))
    stream, again, memory = "stream", "stream, second run", "in memory"
    plan = [(stream, rows, 1) for rows in (small, middle, large)] + [(again, large, 1), (stream, middle, arguments.processes)]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, processes in (*plan, (memory, small, 1), (memory, middle, 1)):
            path = Path(folder) / f"{rows}.jsonl"
            if not path.exists():
                write_rows(path, rows)
            streaming = "no" if name == memory else "yes"
            command = [sys.executable, __file__, arguments.tokenizer, "--processes", str(processes), "--one", str(path), streaming]
            environment = {**os.environ, "XDG_CACHE_HOME": f"{path}.cache{processes}"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
            facts = json.loads(done.stdout.splitlines()[-1])
            run = {"run": name, "processes": processes, "file_bytes": path.stat().st_size, **facts}
            found["runs"].append(run)
            print(json.dumps(run), flush=True)
    by_processes = {
        run["store_sha256"] for run in found["runs"] if run["run"] == stream and run["file_bytes"] == found["runs"][1]["file_bytes"]
    }
    found["same_bytes_whatever_the_processes"] = len(by_processes) == 1
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
