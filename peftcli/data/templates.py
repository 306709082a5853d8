"""Chat templates: the tokenizer's own, one of the shipped ones, or a Jinja file; and rendering through the tokenizer.

The shipped templates write no BOS themselves. Where a tokenizer puts one before plain text, ``install`` puts
``{{ bos_token }}`` before the template, so that each row has exactly one and the saved tokenizer writes it as well.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peftcli.data.neutral import Conversation
from peftcli.data.sources import find
from peftcli.errors import DataError, nearest

_MARKERS: dict[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "plain": (),
    "vicuna": (),
    "zephyr": ("<|user|>", "<|assistant|>"),
}
# Published tokenizers of these families spell the markers out as text.
_MARKERS_AS_TEXT = ("mistral", "zephyr")
_LONGEST_FILE = 1_000_000


class RenderFault(Exception):
    """The template refuses a conversation or cannot render it; the caller adds the origin."""


def shipped() -> tuple[str, ...]:
    """The names of the shipped templates."""
    return tuple(sorted(_MARKERS))


def load(name: str, base_dir: Path) -> str:
    """The Jinja text of a shipped template, or of a file looked up in the working directory and then in ``base_dir``.

    Raises:
        DataError: neither a name nor a file, or not a template.
    """
    if name in _MARKERS:
        return (resources.files("peftcli.data") / "templates" / f"{name}.jinja").read_text("utf-8").rstrip("\n")
    path = find(name, base_dir)
    if path is None or not path.is_file():
        near = nearest(name, _MARKERS)
        raise DataError(
            f"dataset.chat_template: {name!r} is neither a shipped template nor a file" + (f"; did you mean {near!r}?" if near else ""),
            hint=f"shipped templates: {', '.join(shipped())}",
        )
    if path.stat().st_size > _LONGEST_FILE:
        raise DataError(f"dataset.chat_template: {name} has {path.stat().st_size} bytes; no chat template is that long")
    try:
        text = path.read_text("utf-8-sig")
        _environment().parse(text)
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.chat_template: {name} is not UTF-8 text (byte {error.start + 1})") from None
    except TemplateSyntaxError as error:
        raise DataError(f"{name}:{error.lineno}: not a valid Jinja template: {error.message}") from None
    return text.rstrip("\n")


def install(name: str, tokenizer: Any, base_dir: Path) -> list[str]:
    """Give the tokenizer a chat template, so that it is saved with the adapter.

    Args:
        name: a shipped template's name or a path to a Jinja file.
        tokenizer: changed in place.
        base_dir: where a relative path is looked up after the working directory.

    Returns:
        Notes for the label audit, such as markers that are no tokens of this vocabulary.

    Raises:
        DataError: see ``load``.
    """
    text = load(name, base_dir)
    notes = []
    if name in _MARKERS:
        if adds_bos(tokenizer):
            text = "{{- bos_token -}}\n" + text
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        unknown = [marker for marker in _MARKERS[name] if marker not in added]
        if unknown and name not in _MARKERS_AS_TEXT:
            notes.append(
                f"template {name}: {', '.join(unknown)} are no tokens of this vocabulary and stand as several; EOS ends the answer"
            )
    tokenizer.chat_template = text
    return notes


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before plain text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


class Renderer:
    """Renders conversations with the tokenizer's template, in transformers' sandbox.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not has_template(tokenizer):
            raise DataError(
                "the data are conversations, and the tokenizer has no chat template",
                hint=f"name one: dataset.chat_template: chatml (shipped: {', '.join(shipped())})",
            )
        self.tokenizer = tokenizer
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(f"the tokenizer has several chat templates and none is its default ({error})") from None
        self.marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        try:
            plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.template)
            self.knows_tools = "tools" in meta.find_undeclared_variables(_environment().parse(plain))
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from None

    def render(
        self, conversation: Conversation, stop: int | None = None, *, prompt: bool = False, replace: tuple[int, str] | None = None
    ) -> str:
        """The text of the first ``stop`` messages.

        Args:
            conversation: the messages and tools.
            stop: how many messages; ``None``: all.
            prompt: put the generation prompt behind them.
            replace: (index, text) of a message whose content is exchanged.

        Raises:
            RenderFault: the template refuses the conversation.
        """
        messages = self._messages(conversation, replace)[:stop]
        try:
            # As a batch of one, since a conversation that the assistant opens has no messages before that turn.
            texts = self.tokenizer.apply_chat_template([messages], tools=conversation.tools, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise RenderFault(f"the chat template cannot render it ({error})") from error
        return str(texts[0])

    def render_marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The whole text and the character ranges of the template's ``{% generation %}`` blocks.

        Raises:
            RenderFault: the template refuses the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # Its annotation says that it returns text; with the mask asked for it returns (texts, ranges).
            rendered: Any = render_jinja_template(
                [self._messages(conversation, None)],
                tools=cast(Any, conversation.tools),
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise RenderFault(f"the chat template cannot render it ({error})") from error
        texts, ranges = rendered
        return str(texts[0]), [(int(start), int(end)) for start, end in ranges[0]]

    @staticmethod
    def _messages(conversation: Conversation, replace: tuple[int, str] | None) -> list[dict[str, Any]]:
        messages = [message.for_template() for message in conversation.messages]
        if replace is not None:
            messages[replace[0]]["content"] = replace[1]
        return messages


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])


def stop_ids(tokenizer: Any) -> list[int]:
    """Where generation ends: EOS, and the end-of-turn token that the chat template writes after an answer, where that is a
    token of its own (ChatML's on a base model whose EOS is another)."""
    ends = {tokenizer.eos_token_id}
    if has_template(tokenizer):
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
        special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        last = next((i for i in reversed(ids) if i in special), None)
        ends.add(last)
    return sorted(i for i in ends if i is not None)


def set_stops(model: Any, tokenizer: Any) -> None:
    """Let the saved generation config of ``model`` end answers where the tokenizer's template ends them."""
    config = getattr(model, "generation_config", None)
    ends = stop_ids(tokenizer)
    if config is not None and ends:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
