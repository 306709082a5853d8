"""From rows in the formats that people have to one neutral form.

========================  ============================================  ==========================================
format                    columns (optional ones in brackets)           becomes
========================  ============================================  ==========================================
``messages``              messages: [{role, content}] [tools]           conversation
``sharegpt``              conversations: [{from, value}] [system tools]  conversation
``prompt_completion``     prompt, completion                            raw text for strings, conversation for lists
``alpaca``                instruction, output [input system]            conversation with a chat template, else raw text
``text``                  text                                          document
``classification``        text, label [text_pair]                       labelled text
``text_to_text``          source, target                                raw text
``tagging``               tokens, tags                                  words with a tag for each
``preference``            prompt, chosen, rejected [tools margin]       two answers: raw texts for strings, else messages
``preference_sharegpt``   conversations, chosen, rejected [system ...]  two answers to the conversation so far
``preference_alpaca``     instruction, chosen, rejected [input ...]     two answers, each as ``alpaca`` has one
``preference_implicit``   chosen, rejected [tools margin]               two conversations that begin alike
``kto``                   prompt, completion, label [tools]             an answer that is wanted (true) or not (false)
``kto_messages``          messages, label [system tools]                the same of the last message
========================  ============================================  ==========================================

``prompt`` and ``completion`` strings are used as they are, without a chat template and without a separator between them,
as TRL does; EOS is added after the completion. GSM8K is read with ``columns: {prompt: question, completion: answer}``; to
ask a chat model the same through its template, use ``format: alpaca`` and ``columns: {instruction: question, output: answer}``.
In the conversational form of ``prompt_completion`` only the completion's assistant turns carry loss. For encoder-decoders
an alpaca row's source is its system prompt, instruction and input with blank lines between, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftcli.data.faults import Faults
from peftcli.data.messages import EmptyAnswer, RowFault, read_messages, read_text, read_tools
from peftcli.data.neutral import Completion, Conversation, Document, Item, Labelled, Message
from peftcli.data.preference_formats import pair_of, read_judged, read_pair
from peftcli.data.readers import Row, cell, has_cell
from peftcli.data.tagged_format import read_tagged
from peftcli.errors import DataError, nearest

# In the order of preference when the columns fit several.
REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "classification": ("text", "label"),
    "text_to_text": ("source", "target"),
    "tagging": ("tokens", "tags"),
    "preference": ("prompt", "chosen", "rejected"),
    "preference_sharegpt": ("conversations", "chosen", "rejected"),
    "preference_alpaca": ("instruction", "chosen", "rejected"),
    "preference_implicit": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "kto_messages": ("messages", "label"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("tools",),
    "alpaca": ("input", "system"),
    "text": (),
    "classification": ("text_pair",),
    "text_to_text": (),
    "tagging": (),
    "preference": ("tools", "margin"),
    "preference_sharegpt": ("system", "tools", "margin"),
    "preference_alpaca": ("input", "system", "margin"),
    "preference_implicit": ("tools", "margin"),
    "kto": ("tools",),
    "kto_messages": ("system", "tools"),
}
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def known_formats(formats: Sequence[str] = tuple(REQUIRED)) -> str:
    """The formats with their columns, for a message."""
    return "; ".join(f"{name} ({', '.join(REQUIRED[name])})" for name in formats)


def detect(columns: Iterable[str], mapping: Mapping[str, str], where: str, formats: Sequence[str]) -> str:
    """The one of ``formats`` whose columns are there once ``mapping`` (ours: yours) is applied.

    Raises:
        DataError: no format fits, or the rows are preference pairs; the message lists the columns and says how to map them.
    """
    theirs = list(columns)
    available = set(mapping) | set(theirs) - set(mapping.values())
    plain = "prompt_completion" in formats
    if plain and {"chosen", "rejected"} <= set(theirs) and "completion" not in mapping:
        raise DataError(
            f"{where}: the columns {', '.join(theirs)} are preference pairs; this run trains on single answers",
            hint="learn from the pairs: task: dpo (or orpo, simpo, reward); or name the answers to learn: dataset.format: "
            "prompt_completion with dataset.columns: {prompt: ..., completion: chosen}",
        )
    for name in formats:
        required = REQUIRED[name]
        if set(required) <= available:
            if "label" in theirs and name in ("messages", "prompt_completion"):
                raise DataError(
                    f"{where}: beside {' and '.join(required)} there is a column 'label', as in data with good and bad answers",
                    hint=f"learn from both kinds: task: kto; or to learn every answer, whatever its label: dataset.format: {name}",
                )
            return name
    example = "prompt_completion" if plain else formats[0]
    first, *_, last = REQUIRED[example] if len(REQUIRED[example]) > 1 else (*REQUIRED[example], "")
    mapped = f"{first}: {theirs[0] if theirs else 'question'}" + (
        f", {last}: {theirs[-1] if len(theirs) > 1 else 'answer'}" if last else ""
    )
    raise DataError(
        f"{where}: no {'known format' if plain else 'format of this task'} has the columns {', '.join(theirs) or '(none)'}",
        hint=f"map them with dataset.columns, for example {{{mapped}}}. Known formats: {known_formats(formats)}",
    )


def check_mapping(mapping: Mapping[str, str], columns: Iterable[str], where: str) -> None:
    """Check that a column mapping leads from names of ours to columns that are there.

    Raises:
        DataError: with every fault and the nearest names.
    """
    ours = sorted({name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names})
    theirs = list(columns)
    faults = Faults()
    for key, value in mapping.items():
        if key not in ours:
            near = nearest(key, ours)
            faults.add(
                f"dataset.columns: {key!r} is no column of ours"
                + (f"; did you mean {near!r}?" if near else f"; ours are {', '.join(ours)}")
            )
        if value not in theirs and value.split(".", 1)[0] not in theirs:
            near = nearest(value, theirs)
            faults.add(
                f"{where}: dataset.columns.{key}: there is no column {value!r}; "
                + (f"did you mean {near!r}? " if near else "")
                + f"(columns: {', '.join(theirs)})"
            )
    faults.raise_if_any()


def check_format(mapping: Mapping[str, str], format: str) -> None:
    """Check that every mapped column is one of the format's, so that no mapping is without effect.

    Raises:
        DataError: naming the columns that the format does not have.
    """
    ours = (*REQUIRED[format], *OPTIONAL[format])
    strange = [key for key in mapping if key not in ours]
    if strange:
        raise DataError(
            f"dataset.columns: format {format} has no column {', '.join(map(repr, strange))}; it has {', '.join(ours)}",
            hint="name the format that you mean with dataset.format",
        )


class Converter:
    """Turns the rows of one source into the neutral form.

    Args:
        format: a format's name.
        mapping: column mapping, ours: yours.
        chat: whether a chat template is in use; without one alpaca rows become the Stanford prompt text.
        system: system prompt for conversations that have none.
        plain: nothing is put around the texts, neither a chat template nor the Stanford prompt text.
    """

    def __init__(self, format: str, mapping: Mapping[str, str], *, chat: bool, system: str | None = None, plain: bool = False) -> None:
        self.format = format
        self.mapping = mapping
        self.chat = chat
        self.system = system
        self.plain = plain

    def convert(self, row: Row) -> Item:
        """One row's neutral form.

        Raises:
            RowFault: a column is missing or holds something else than the format says.
            EmptyAnswer: the row is well formed but there is nothing to learn from it.
        """
        values = self._columns(row)
        match self.format:
            case "messages":
                return self._conversation(row, read_messages(values["messages"], self._theirs("messages")), values)
            case "sharegpt":
                messages = read_messages(values["conversations"], self._theirs("conversations"))
                system = self._optional(values, "system")
                return self._conversation(row, [Message("system", system), *messages] if system else messages, values)
            case "prompt_completion":
                return self._prompt_completion(row, values)
            case "alpaca":
                return self._alpaca(row, values)
            case "classification":
                return self._labelled(row, values)
            case "text_to_text":
                return self._text_to_text(row, values)
            case "tagging":
                return read_tagged(values, self._theirs, row.origin)
            case "kto" | "kto_messages":
                return read_judged(self.format, values, self._theirs, self.system, row.origin)
            case "preference" | "preference_sharegpt" | "preference_implicit":
                return read_pair(self.format, values, self._theirs, self.system, row.origin)
            case "preference_alpaca":
                answers = [
                    Converter("alpaca", {**self.mapping, "output": self._theirs(name)}, chat=self.chat, system=self.system).convert(row)
                    for name in ("chosen", "rejected")
                ]
                return pair_of(answers[0], answers[1], values["margin"], self._theirs("margin"))
        text = read_text(values["text"], self._theirs("text"))
        if not text.strip():
            raise EmptyAnswer(self._theirs("text"))
        return Document(text, row.origin)

    def _theirs(self, ours: str) -> str:
        return self.mapping.get(ours, ours)

    def _columns(self, row: Row) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in REQUIRED[self.format]:
            theirs = self._theirs(name)
            if not has_cell(row.values, theirs):
                near = nearest(theirs, row.values)
                raise RowFault(
                    f"there is no column {theirs!r}"
                    + (f"; did you mean {near!r}?" if near else "")
                    + f" (columns: {', '.join(row.values)})"
                )
            values[name] = cell(row.values, theirs)
        for name in OPTIONAL[self.format]:
            values[name] = cell(row.values, self._theirs(name))
        return values

    def _optional(self, values: dict[str, Any], name: str) -> str:
        value = values.get(name)
        return "" if value is None else read_text(value, self._theirs(name))

    def _conversation(self, row: Row, messages: list[Message], values: dict[str, Any]) -> Conversation:
        column = self._theirs(REQUIRED[self.format][-1])
        if not any(message.role == "assistant" and message.train for message in messages):
            raise RowFault(f"{column}: there is no assistant turn to learn (roles: {', '.join(message.role for message in messages)})")
        if self.system and messages[0].role not in ("system", "developer"):
            messages = [Message("system", self.system), *messages]
        return Conversation(messages, row.origin, read_tools(values.get("tools"), self._theirs("tools")))

    def _prompt_completion(self, row: Row, values: dict[str, Any]) -> Item:
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            asked = [message.without_loss() for message in read_messages(prompt, self._theirs("prompt"))]
            return self._conversation(row, asked + read_messages(completion, self._theirs("completion")), values)
        prompt = read_text(prompt, self._theirs("prompt"))
        completion = read_text(completion, self._theirs("completion"))
        if not completion.strip():
            raise EmptyAnswer(self._theirs("completion"))
        return Completion(prompt, completion, row.origin, prompt)

    def _text_to_text(self, row: Row, values: dict[str, Any]) -> Completion:
        source, target = read_text(values["source"], self._theirs("source")), read_text(values["target"], self._theirs("target"))
        if not target.strip():
            raise EmptyAnswer(self._theirs("target"))
        return Completion(source, target, row.origin, source)

    def _labelled(self, row: Row, values: dict[str, Any]) -> Labelled:
        column, label = self._theirs("label"), values["label"]
        text = read_text(values["text"], self._theirs("text"))
        pair = values["text_pair"]
        if isinstance(label, list):
            if not all(isinstance(name, (str, int)) and not isinstance(name, bool) for name in label):
                raise RowFault(f"{column}: a list of labels holds names or whole numbers, not {label!r}")
            label = tuple(str(name) for name in label)
        elif isinstance(label, bool):
            label = str(label).lower()
        elif not isinstance(label, (str, int, float)):
            raise RowFault(f"{column}: {label!r} is no label", hint="a label is a name, a number, or a list of names")
        elif isinstance(label, float) and not math.isfinite(label):
            raise RowFault(f"{column}: {label!r} is not a finite number")
        if label == "":
            raise EmptyAnswer(column)
        if not text.strip() and not pair:
            raise EmptyAnswer(self._theirs("text"))
        return Labelled(text, None if pair is None else read_text(pair, self._theirs("text_pair")), label, row.origin)

    def _alpaca(self, row: Row, values: dict[str, Any]) -> Item:
        instruction = read_text(values["instruction"], self._theirs("instruction"))
        output = read_text(values["output"], self._theirs("output"))
        extra = self._optional(values, "input")
        system = self._optional(values, "system") or self.system or ""
        if not instruction.strip() and not extra.strip():
            raise RowFault(f"{self._theirs('instruction')}: empty")
        if not output.strip():
            raise EmptyAnswer(self._theirs("output"))
        request = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        if self.plain:
            source = f"{system}\n\n{request}" if system else request
            return Completion(source, output, row.origin, source)
        if self.chat:
            start = [Message("system", system)] if system else []
            return Conversation([*start, Message("user", request), Message("assistant", output)], row.origin)
        text = _ALPACA_INPUT.format(instruction=instruction, input=extra) if extra.strip() else _ALPACA.format(instruction=instruction)
        return Completion(f"{system}\n\n{text}" if system else text, output, row.origin, request)


def convert_rows(rows: Iterable[Row], converter: Converter, faults: Faults | None = None) -> tuple[list[Item], list[tuple[str, str]]]:
    """Convert every row of a source.

    Args:
        faults: where faulty rows are noted.

    Returns:
        The items, and (origin, column) of each row that is well formed but has an empty answer.

    Raises:
        DataError: up to ten faulty rows, each with its origin and column.
    """
    items: list[Item] = []
    empty: list[tuple[str, str]] = []
    faults = faults or Faults()
    for row in rows:
        try:
            items.append(converter.convert(row))
        except RowFault as fault:
            faults.add(str(fault), at=row.origin, hint=fault.hint)
        except EmptyAnswer as answer:
            empty.append((row.origin, str(answer)))
    faults.raise_if_any()
    return items, empty
