"""Reading rows of words and tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftcli.data.messages import EmptyAnswer, RowFault
from peftcli.data.neutral import Tagged


def read_tagged(values: Mapping[str, Any], theirs: Callable[[str], str], origin: str) -> Tagged:
    """One row of words and tags: two lists, or two texts with blanks between.

    Args:
        values: ``tokens`` and ``tags``. ``theirs``: the data's name of a column of ours.

    Raises:
        RowFault: they are something else, or not as many tags as words.
        EmptyAnswer: there is no word.
    """
    words, tags = _listed(values["tokens"], theirs("tokens")), _listed(values["tags"], theirs("tags"))
    for word in words:
        if not isinstance(word, str):
            raise RowFault(f"{theirs('tokens')}: {word!r} is no text")
    for tag in tags:
        if isinstance(tag, bool) or not isinstance(tag, (str, int)) or tag == "":
            raise RowFault(f"{theirs('tags')}: {tag!r} is no tag", hint="a tag is a name, such as B-PER, or a whole number")
    if len(words) != len(tags):
        raise RowFault(f"{theirs('tokens')} and {theirs('tags')}: {len(words)} words and {len(tags)} tags")
    if not words:
        raise EmptyAnswer(theirs("tokens"))
    return Tagged(tuple(words), tuple(str(tag) for tag in tags), origin)


def _listed(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list):
        return value
    raise RowFault(f"{column}: a {type(value).__name__} where a list or a text with blanks between the words is needed")
