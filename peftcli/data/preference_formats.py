"""Rows with two answers to one prompt, or with one answer that is wanted or not, as the data that people have write them.

Answers are texts, single messages or lists of messages; lists may begin with the prompt once more, as in conversations that part
at the answer. Texts beside a prompt that is text stay raw; anything else becomes messages for a chat template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftcli.data.messages import EmptyAnswer, RowFault, read_messages, read_text, read_tools
from peftcli.data.neutral import Completion, Conversation, Item, Judged, Message, Preference

_TRUE, _FALSE = ("true", "1", 1), ("false", "0", 0)


def read_pair(format: str, values: Mapping[str, Any], theirs: Callable[[str], str], system: str | None, origin: str) -> Preference:
    """A row of one of the ``preference`` formats but ``preference_alpaca``.

    Args:
        values: by our names of the columns. ``theirs``: the user's name of a column.
        system: system prompt for conversations that have none.

    Raises:
        RowFault, EmptyAnswer: as ``Converter.convert``.
    """
    asked = values.get("conversations" if format == "preference_sharegpt" else "prompt")
    column = theirs("conversations" if format == "preference_sharegpt" else "prompt")
    answers = {name: values[name] for name in ("chosen", "rejected")}
    tools, margin = read_tools(values.get("tools"), theirs("tools")), _margin(values.get("margin"), theirs("margin"))
    if isinstance(asked, str) and all(isinstance(answer, str) for answer in answers.values()):
        texts = [_text(answer, theirs(name)) for name, answer in answers.items()]
        return Preference(read_text(asked, column), texts[0], texts[1], origin, tools, margin)
    before = [] if format == "preference_implicit" else _messages(asked, "user", column)
    chosen, rejected = (_whole(before, _messages(answer, "assistant", theirs(name))) for name, answer in answers.items())
    # What both begin with is the prompt; an answer has one message at least.
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared < max(1, len(before)):
        raise RowFault(f"{theirs('chosen')} and {theirs('rejected')} do not begin with the same prompt")
    for name, answer in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        _check_answer(answer, theirs(name))
    return Preference(_with_system(chosen[:shared], values, theirs, system), chosen[shared:], rejected[shared:], origin, tools, margin)


def read_judged(format: str, values: Mapping[str, Any], theirs: Callable[[str], str], system: str | None, origin: str) -> Judged:
    """A row of one of the ``kto`` formats; arguments and faults as of :func:`read_pair`."""
    desirable = _label(values["label"], theirs("label"))
    tools = read_tools(values.get("tools"), theirs("tools"))
    if format == "kto_messages":
        column = theirs("messages")
        messages = read_messages(values["messages"], column)
    else:
        column = theirs("completion")
        asked, answer = values["prompt"], values["completion"]
        if isinstance(asked, str) and isinstance(answer, str):
            return Judged(read_text(asked, theirs("prompt")), _text(answer, column), desirable, origin, tools)
        messages = _whole(_messages(asked, "user", theirs("prompt")), _messages(answer, "assistant", column))
    if len(messages) < 2:
        raise RowFault(f"{column}: there is no prompt before the answer")
    _check_answer(messages[-1:], column)
    return Judged(_with_system(messages[:-1], values, theirs, system), messages[-1:], desirable, origin, tools)


def pair_of(chosen: Item, rejected: Item, margin: Any, column: str) -> Preference:
    """Two items that end with different answers to one prompt, as one."""
    number = _margin(margin, column)
    if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
        return Preference(chosen.messages[:-1], chosen.messages[-1:], rejected.messages[-1:], chosen.origin, chosen.tools, number)
    assert isinstance(chosen, Completion) and isinstance(rejected, Completion), "both are of one kind"
    return Preference(chosen.prompt, chosen.completion, rejected.completion, chosen.origin, None, number)


def _text(value: Any, column: str) -> str:
    text = read_text(value, column)
    if not text.strip():
        raise EmptyAnswer(column)
    return text


def _messages(value: Any, role: str, column: str) -> list[Message]:
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return [Message(role, _text(value, column) if role == "assistant" else read_text(value, column))]
    return read_messages(value, column)


def _whole(asked: list[Message], answer: list[Message]) -> list[Message]:
    return answer if len(answer) > len(asked) and answer[: len(asked)] == asked else asked + answer


def _check_answer(messages: Sequence[Message], column: str) -> None:
    if messages[0].role != "assistant":
        raise RowFault(f"{column}: the answer begins with a message of the {messages[0].role}, not of the assistant")
    if not any(message.role == "assistant" and message.train for message in messages):
        raise RowFault(f"{column}: every turn of the assistant has weight 0, so there is nothing to learn")


def _with_system(prompt: list[Message], values: Mapping[str, Any], theirs: Callable[[str], str], system: str | None) -> list[Message]:
    own = values.get("system")
    text = system if own is None or own == "" else read_text(own, theirs("system"))
    return [Message("system", text), *prompt] if text and prompt[0].role not in ("system", "developer") else prompt


def _margin(value: Any, column: str) -> float:
    if value is None or value == "":
        return 0.0
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise RowFault(f"{column}: {value!r} is not a finite number")
    return number


def _label(value: Any, column: str) -> bool:
    plain = value.strip().lower() if isinstance(value, str) else value
    if isinstance(plain, (bool, int, str)) and plain in (*_TRUE, *_FALSE):
        return plain in _TRUE
    raise RowFault(f"{column}: {value!r} is neither true (a wanted answer) nor false")
