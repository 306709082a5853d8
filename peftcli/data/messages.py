"""Reading one cell of a row: text, a list of messages in the OpenAI or ShareGPT writing, tool definitions."""

from __future__ import annotations

import json
from typing import Any

from peftcli.data.neutral import Message
from peftcli.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
_CALLS = ("function_call", "tool_call")


class RowFault(Exception):
    """What is wrong with a row; the caller adds the origin."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class EmptyAnswer(Exception):
    """A well-formed row whose answer is empty: nothing to learn. Its argument names the column.

    Published sets have some (Stanford Alpaca has 28), so such a row is dropped and counted and the run goes on.
    """


def read_text(value: Any, column: str) -> str:
    """A cell that must hold text; a list of text parts is joined.

    Raises:
        RowFault: something else, or text with a half of a surrogate pair, which no tokenizer takes.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if any(part.get("type", "text") != "text" for part in value):
            raise RowFault(
                f"{column}: only text is supported, found parts of type {', '.join(sorted({str(part.get('type')) for part in value}))}"
            )
        value = "".join(read_text(part.get("text"), column) for part in value)
    if not isinstance(value, str):
        raise RowFault(f"{column}: text is needed, found {'nothing' if value is None else type(value).__name__} ({str(value)[:40]!r})")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowFault(f"{column}: character {error.start + 1} is half of a surrogate pair, which is not text") from None
    return value


def read_messages(value: Any, column: str) -> list[Message]:
    """A list of messages, with the keys ``role`` and ``content`` or ``from`` and ``value``.

    Raises:
        RowFault: naming the column and the message (from 0).
        EmptyAnswer: an assistant message is empty.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse(value, column)
    if not isinstance(value, list):
        raise RowFault(f"{column}: a list of messages is needed, found {type(value).__name__}")
    if not value:
        raise RowFault(f"{column}: the list of messages is empty")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise RowFault(f"{place}: a message such as {{role: user, content: ...}} is needed, found {type(value).__name__}")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role = value.get(role_key)
    if role_key == "role" and role is None:
        raise RowFault(f"{place}: the message has no role (keys: {', '.join(map(str, value))})")
    if not isinstance(role, str):
        raise RowFault(f"{place}.{role_key}: text is needed, found {type(role).__name__}")
    name = role.strip().lower()
    if name in _CALLS:
        return Message("assistant", "", _calls(value.get(content_key), f"{place}.{content_key}"))
    name = _ALIASES.get(name, name)
    if name not in ROLES:
        near = nearest(name, [*ROLES, *_ALIASES, *_CALLS])
        raise RowFault(
            f"{place}.{role_key}: unknown role {role!r}"
            + (f"; did you mean {near!r}?" if near else f"; known are {', '.join((*ROLES, *_ALIASES, *_CALLS))}")
        )
    calls = _calls(value["tool_calls"], f"{place}.tool_calls") if value.get("tool_calls") else ()
    raw = value.get(content_key)
    content = "" if raw is None and calls else read_text(raw, f"{place}.{content_key}")
    train = value.get("weight", 1) not in (0, 0.0, "0")
    if name == "assistant" and not content.strip() and not calls and train:
        raise EmptyAnswer(f"{place}.{content_key}")
    reasoning = value.get("reasoning_content") or value.get("thinking") or ""
    return Message(name, content, calls, read_text(reasoning, f"{place}.reasoning_content"), train)


def _calls(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Tool calls in the form that chat templates take, from OpenAI's list or ShareGPT's JSON text."""
    if isinstance(value, str):
        value = _parse(value, place)
    calls = value if isinstance(value, list) else [value]
    read: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(f"{place}: a function call needs a name and arguments, found {str(call)[:60]!r}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _parse(arguments, f"{place}.arguments")
        read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not read:
        raise RowFault(f"{place}: the list of function calls is empty")
    return tuple(read)


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Tool definitions as a list of JSON schemas, from a list or its JSON text; ``None`` where there are none.

    Raises:
        RowFault: not a list of objects with a name.
    """
    if isinstance(value, str):
        value = _parse(value, column) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault(f"{column}: a list of tool definitions is needed, found {type(value).__name__}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(f"{place}: not valid JSON ({error}): {text[:40]!r}") from None
