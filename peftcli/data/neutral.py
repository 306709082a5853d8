"""The neutral form that every data format is turned into before a tokenizer sees it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``developer``, ``user``, ``assistant`` or ``tool``.
        content: its text; may be empty for an assistant message that calls tools.
        tool_calls: the calls as chat templates expect them (type, function: {name, arguments}).
        reasoning: the assistant's reasoning where the data has it apart from the content.
        train: whether an assistant message carries loss.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    reasoning: str = ""
    train: bool = True

    def without_loss(self) -> Message:
        """The same message, carrying no loss."""
        return replace(self, train=False)

    def for_template(self) -> dict[str, Any]:
        """The message as ``apply_chat_template`` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be rendered by a chat template; every assistant turn with ``train`` carries loss."""

    messages: list[Message]
    origin: str
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text: a prompt, and a completion that carries loss. ``request`` is the part of the prompt that a person reads."""

    prompt: str
    completion: str
    origin: str
    request: str


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text; all of it carries loss."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text or a pair of texts with its label: a name, a list of names, or a number; ``None`` where it is not known yet."""

    text: str
    text_pair: str | None
    label: str | int | float | tuple[str, ...]
    origin: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer: raw texts, or messages for a chat template, all three of one kind.

    Attributes:
        margin: how much better the better one is at least, where the data say so.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    origin: str
    tools: list[dict[str, Any]] | None = None
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt with one answer that is wanted or not: raw texts, or messages for a chat template, both of one kind."""

    prompt: str | list[Message]
    answer: str | list[Message]
    desirable: bool
    origin: str
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words and as many tags."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    origin: str


TextItem = Conversation | Completion | Document
Item = TextItem | Labelled | Preference | Judged | Tagged


def answered(prompt: str | list[Message], answer: str | list[Message], origin: str, tools: list[dict[str, Any]] | None) -> TextItem:
    """A prompt and one answer to it, of which the answer alone carries loss."""
    if isinstance(prompt, str):
        assert isinstance(answer, str), "prompt and answer are of one kind"
        return Completion(prompt, answer, origin, prompt)
    assert not isinstance(answer, str), "prompt and answer are of one kind"
    return Conversation([*(message.without_loss() for message in prompt), *answer], origin, tools)


def is_rendered(item: Item) -> bool:
    """Whether a chat template writes the text that a model sees of it."""
    if isinstance(item, (Preference, Judged)):
        return not isinstance(item.prompt, str)
    return isinstance(item, Conversation)


def keys(item: Item) -> tuple[int, int]:
    """Two 64-bit keys: of the whole content without the origin, equal for exact duplicates; and of what is asked, equal for rows
    with the same prompt or text whatever their answer, 0 where a row asks nothing."""
    content = [type(item).__name__, *(getattr(item, field.name) for field in fields(item) if field.name not in ("origin", "request"))]
    asked = _asked(item)
    return _key(content), _key(asked) if asked else 0


def _asked(item: Item) -> Any:
    match item:
        case Conversation():
            last = max((place for place, message in enumerate(item.messages) if message.role == "assistant"), default=0)
            said = [(message.role, message.content, message.tool_calls, message.reasoning) for message in item.messages[:last]]
            return [said, item.tools] if said else None
        case Completion() | Preference() | Judged():
            return [item.prompt] if item.prompt else None
        case Labelled():
            return [item.text, item.text_pair]
        case Tagged():
            return [item.tokens]
    return None


def _key(value: Any) -> int:
    # 64 bits: among ten million rows two different ones share a key with a probability of 3e-6.
    return int.from_bytes(hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1
