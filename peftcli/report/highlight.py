"""Light colouring of YAML for report.html."""

from __future__ import annotations

import re
from html import escape

_TOKEN = re.compile(
    r"""
    (?P<comment>(?:(?<=\s)|^)\#.*$)
  | (?P<key>(?:(?<=[\s{,\[-])|^)[A-Za-z_][\w.-]*(?=:(?:\s|$)))
  | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')
  | (?P<number>(?<![\w.+-])[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.-]))
  | (?P<constant>(?<![\w.-])(?:true|false|null|~)(?![\w.-]))
    """,
    re.VERBOSE,
)


def highlight_yaml(text: str) -> str:
    """``text`` as HTML with keys, strings, numbers, constants and comments in ``<span class="y-...">``, all escaped."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    parts, end = [], 0
    for match in _TOKEN.finditer(line):
        parts.append(escape(line[end : match.start()]))
        parts.append(f'<span class="y-{match.lastgroup}">{escape(match.group())}</span>')
        end = match.end()
    return "".join(parts) + escape(line[end:])
