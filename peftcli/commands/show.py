"""Small ways of printing that commands share."""

from __future__ import annotations

import json
import sys
from typing import Any

from peftcli.redact import redact


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(redact(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")
