"""Make the shipped preference data from the quickstart's: a request, the right command, and another request's command.

    python scripts/make_preference_data.py            write recipes/data/commands.pairs.jsonl and commands.judged.jsonl
    python scripts/make_preference_data.py --check    exit 1 if the files on disk differ

A worse answer is the command of the next row that asks for the same action with other values: well formed, and wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
ROWS = 200


def pairs() -> list[dict[str, Any]]:
    """Rows of the format ``preference``: messages, a better and a worse answer."""
    lines = (DATA / "commands.train.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line)["messages"] for line in lines]
    found = []
    for index, (asked, right) in enumerate(requests[:ROWS]):
        action = json.loads(right["content"])["action"]
        later = (answer for _, answer in requests[index + 1 :] if json.loads(answer["content"])["action"] == action)
        wrong = next(answer for answer in later if answer["content"] != right["content"])
        found.append({"prompt": [asked], "chosen": [right], "rejected": [wrong]})
    return found


def judged() -> list[dict[str, Any]]:
    """Rows of the format ``kto``: the right and the wrong answers by turns."""
    kinds = ("chosen", "rejected")
    return [{"prompt": row["prompt"], "completion": row[kinds[index % 2]], "label": index % 2 == 0} for index, row in enumerate(pairs())]


def main() -> int:
    """Write the files, or compare them with what is on disk."""
    changed = 0
    for name, rows in (("commands.pairs.jsonl", pairs()), ("commands.judged.jsonl", judged())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = DATA / name
        if "--check" in sys.argv[1:]:
            changed += not path.is_file() or path.read_text(encoding="utf-8") != text
        else:
            path.write_text(text, encoding="utf-8")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
