"""Pieces of HTML that the sections of report.html are put together from. Everything that goes in as text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def visible(value: object) -> str:
    """Any value as text whose control characters have become their visible pictures (U+2400 ...)."""
    return _CONTROL.sub(lambda match: "\u2421" if match.group() == "\x7f" else chr(0x2400 + ord(match.group())), str(value))


def text(value: object) -> str:
    """Any value as escaped text; control characters become visible."""
    return html.escape(visible(value))


def data(value: float | None, shown: str) -> str:
    """A number as people read it, with the exact one in the element's ``value``."""
    return text(shown) if value is None else f'<data value="{value!r}">{text(shown)}</data>'


def badge(label: str, tone: str, mark: str = "") -> str:
    """A small coloured label; the words carry the meaning, the colour only helps."""
    sign = f'<span aria-hidden="true">{mark}</span> ' if mark else ""
    return f'<span class="badge {tone}">{sign}{text(label)}</span>'


def user_text(value: str, limit: int = 20_000) -> str:
    """Text of a person or a model: line breaks kept, its own writing direction, cut past ``limit`` characters."""
    if not value:
        return '<div class="user empty">(empty)</div>'
    more = f'<p class="more">… {len(value) - limit:,} more characters</p>' if len(value) > limit else ""
    return f'<div class="user" dir="auto">{text(value[:limit])}</div>{more}'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and values; the values are HTML already."""
    return '<dl class="facts">' + "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs) + "</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, name: str, label: str, class_: str = "") -> str:
    """A table whose first column names the row. ``head`` is text, the cells are HTML already."""
    cells = "".join(f'<th scope="col">{text(column)}</th>' for column in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{value}</td>" for value in row[1:]) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table id="{text(name)}" class="{text(class_)}">'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A section of the page with its heading; ``parts`` are HTML. Nothing at all where every part is empty."""
    body = "".join(parts)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>{body}</section>' if body else ""
