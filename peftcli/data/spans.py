"""Where the assistant's turns stand in a rendered conversation: exact, or refused.

A turn begins behind the generation prompt, the text that the model is given at inference, and ends with its end-of-turn
token. What the template writes after that (often a line break) is nothing that a model is asked to write.

Three ways, tried in this order:

1. The template's own ``{% generation %}`` blocks, which the generation prompt must stand before.
2. Prefixes: the rendering of the messages before the turn, with the generation prompt, must be the start of the whole.
3. Where a template renders earlier turns differently in the whole (it moves the system prompt, or strips reasoning): the
   turn's content is exchanged for a marker, and the generation prompt must stand right before the marker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peftcli.data.neutral import Conversation
from peftcli.data.templates import Renderer, RenderFault

# A private-use character at each end, so that it can neither stand in the data by chance nor be trimmed.
_MARKER = "\ue000marker\ue001"


@dataclass(frozen=True, slots=True)
class Span:
    """One assistant turn, in characters of the text.

    Attributes:
        start: the first character behind the generation prompt.
        end: behind the end-of-turn token, or behind the content where the template writes none.
        closed: whether an end-of-turn token stands at the end.
        train: whether the turn carries loss.
    """

    start: int
    end: int
    closed: bool
    train: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's text and its assistant turns, in order."""

    text: str
    spans: list[Span]


class Locator:
    """Renders conversations and finds their assistant turns."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        tokenizer: Any = renderer.tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
        ends = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
        self._ends_with_special = re.compile(rf"(?:{ends})(?=\s*\Z)") if ends else re.compile(r"(?!)")
        self._next_special = re.compile(rf"(?:{ends})") if ends else re.compile(r"(?!)")

    def locate(self, conversation: Conversation) -> Rendered:
        """The text and the assistant turns, up to the last turn of the assistant.

        Raises:
            RenderFault: the template refuses the conversation, leaves out a part of it, or a turn cannot be located.
        """
        if conversation.tools and not self.renderer.knows_tools:
            raise RenderFault(
                "it has tools, and the chat template renders none",
            )
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        if self.renderer.marks_generation:
            text, ranges = self.renderer.render_marked(conversation)
            if len(ranges) != len(turns):
                raise RenderFault(f"the template marks {len(ranges)} generated parts in {len(turns)} assistant turns")
            spans = [self._marked(text, conversation, turn, *ends) for turn, ends in zip(turns, ranges, strict=True)]
        else:
            text = self.renderer.render(conversation)
            spans = [self._searched(text, conversation, turn) for turn in turns]
        position = 0
        for turn, span in zip(turns, spans, strict=True):
            if not position <= span.start < span.end <= len(text):
                raise RenderFault(f"message {turn}: the assistant's turn cannot be located in the rendered conversation")
            position = span.end
            for call in conversation.messages[turn].tool_calls:
                if call["function"]["name"] not in text[span.start : span.end]:
                    raise RenderFault(f"message {turn} calls a function, and the chat template does not render the call")
        return Rendered(text, spans)

    def _marked(self, text: str, conversation: Conversation, turn: int, start: int, end: int) -> Span:
        # A block may hold the header as well, which inference writes by itself.
        prefix = self._prefix(text, conversation, turn)
        if prefix is None:
            # Earlier turns are rendered differently in the whole; the block still follows what inference writes before an answer.
            asked = self._asked(conversation, turn)
            if asked is not None and text.startswith(asked, start):
                start += len(asked)
            elif asked is not None and not text.endswith(asked, 0, start):
                raise RenderFault(
                    f"message {turn}: the generation prompt {asked!r} does not stand before the part that is marked as generated"
                )
        else:
            start = max(start, prefix)
        span = self._close(text, start, end, conversation, turn)
        if not span.closed and (match := self._next_special.match(text, span.end)):
            # A block around the content alone would never teach the model to stop.
            span = Span(start, match.end(), True, span.train)
        return span

    def _searched(self, text: str, conversation: Conversation, turn: int) -> Span:
        start = self._prefix(text, conversation, turn)
        end = None
        if turn + 1 == len(conversation.messages):
            end = len(text)
        else:
            until = self._try(conversation, turn + 1)
            if until is not None and text.startswith(until) and len(until) > (start or 0):
                end = len(until)
        if start is not None and end is not None:
            return self._close(text, start, end, conversation, turn)
        return self._exchanged(text, conversation, turn, start)

    def _exchanged(self, text: str, conversation: Conversation, turn: int, start: int | None) -> Span:
        where = f"message {turn}: the assistant's turn cannot be located in the rendered conversation"
        if conversation.messages[turn].tool_calls:
            raise RenderFault(f"{where} (it calls a function)")
        marked = self.renderer.render(conversation, replace=(turn, _MARKER))
        before, marker, after = marked.partition(_MARKER)
        if not marker or not text.startswith(before) or not text.endswith(after) or len(before) + len(after) >= len(text):
            raise RenderFault(f"{where}: the template renders its content differently from what it is")
        if start is None:
            start = len(before)
            asked = self._asked(conversation, turn)
            if asked is None:
                raise RenderFault(f"{where}: the template cannot render the messages before it")
            if not before.endswith(asked):
                raise RenderFault(f"{where}: the generation prompt {asked!r} does not stand before it")
        end = len(text) - len(after)
        match = re.compile(r"\s*").match(after)
        closing = self._next_special.match(after, match.end() if match else 0)
        return Span(start, end + closing.end() if closing else end, closing is not None, conversation.messages[turn].train)

    def _prefix(self, text: str, conversation: Conversation, turn: int) -> int | None:
        """Length of everything before the turn, generation prompt included, if the whole text starts with it."""
        prompt = self._try(conversation, turn, prompt=True)
        return len(prompt) if prompt is not None and len(prompt) < len(text) and text.startswith(prompt) else None

    def _asked(self, conversation: Conversation, turn: int) -> str | None:
        """The generation prompt alone, as it stands behind the messages before the turn."""
        bare, asked = self._try(conversation, turn), self._try(conversation, turn, prompt=True)
        return None if bare is None or asked is None or not asked.startswith(bare) else asked[len(bare) :]

    def _try(self, conversation: Conversation, stop: int, *, prompt: bool = False) -> str | None:
        try:
            return self.renderer.render(conversation, stop, prompt=prompt)
        except RenderFault:
            return None  # some templates refuse a conversation without a user's message; another way may do

    def _close(self, text: str, start: int, end: int, conversation: Conversation, turn: int) -> Span:
        message = conversation.messages[turn]
        match = self._ends_with_special.search(text[start:end])
        if match:
            return Span(start, start + match.end(), True, message.train)
        # No token ends the turn: it ends with the content, of which trailing white space is a part.
        content = (
            message.content if text.startswith(message.content, start) or message.content in text[start:end] else message.content.strip()
        )
        at = text.rfind(content, start, end) if content else -1
        behind = at + len(content)
        if at >= 0 and not text[behind:end].strip():
            return Span(start, behind, False, message.train)
        return Span(start, start + len(text[start:end].rstrip()), False, message.train)
