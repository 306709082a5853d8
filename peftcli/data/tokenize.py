"""From the neutral form to token ids and the mask of supervised tokens.

Where the pieces are cut: a text is tokenized in pieces that end where inference's prompt ends, so that the training ids
begin with exactly the ids that inference feeds, and no token straddles the end of a prompt. Tokenizers that put a space
before each piece (SentencePiece's dummy prefix) would change the text that way; for those the text is tokenized at once,
and a token that holds characters of both sides carries no loss: the prompt is never supervised, and the model is not
taught a token that it cannot produce after the prompt.

BOS: a chat template writes its own; before raw text stands what the tokenizer puts there, once.
EOS: the end-of-turn token of each assistant turn is supervised; where the template ends the last turn without one, and
after completions and documents, EOS is added and supervised, whatever the padding token is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peftcli.data.faults import Faults
from peftcli.data.neutral import Completion, Conversation, Document, TextItem
from peftcli.data.spans import Locator
from peftcli.data.templates import Renderer, RenderFault
from peftcli.errors import DataError

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenized row.

    Attributes:
        input_ids: token ids, shape (length,).
        supervised: which of them carry loss, shape (length,). The first never does: nothing precedes it.
        origin: the row's place.
        prompt_ids: what inference feeds to get the last completion, uncut; empty for a document.
        request, reference: the readable request and the answer; empty for a document.
        has_start, has_end: whether the row's first and last token are still there.
        truncated: whether tokens were cut off.
    """

    input_ids: Ids
    supervised: Mask
    origin: str
    prompt_ids: Ids
    request: str = ""
    reference: str = ""
    has_start: bool = True
    has_end: bool = True
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """A row before tokenizing.

    Attributes:
        cuts: characters at which an inference prompt ends.
        ranges: the supervised characters.
        raw: whether the tokenizer's own prefix (BOS) is put before it; a chat template writes its own.
        add_eos: whether EOS is added.
        prompt_end: where the prompt of the last completion ends; ``None`` for a document.
        turn_end: where a conversation's last turn ends, its end-of-turn token included.
    """

    text: str
    cuts: list[int]
    ranges: list[tuple[int, int]]
    raw: bool
    add_eos: bool
    prompt_end: int | None
    request: str
    reference: str
    origin: str
    turn_end: int = 0


class Encoder:
    """Tokenizes items of the neutral form.

    Args:
        tokenizer: a fast transformers tokenizer.
        train_on: ``completions``, or ``all`` tokens of each row.

    Raises:
        DataError: the tokenizer is not a fast one, or has no EOS.
    """

    def __init__(self, tokenizer: Any, train_on: Literal["completions", "all"] = "completions") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer is not a fast one, so characters cannot be traced to tokens", hint="use a model with a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end",
                hint="set eos_token in the model's tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self._locator: Locator | None = None
        probe = self._ids("a\nb")
        self._in_pieces = self._ids("a\n") + self._ids("b") == probe
        whole: list[int] = tokenizer("a\nb", verbose=False)["input_ids"]
        # Everything that the tokenizer puts before raw text; a BOS in the first place, for some also a language code.
        self.prefix: list[int] = whole[: whole.index(probe[0])] if probe and probe[0] in whole else []

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode(self, items: Sequence[TextItem], *, exact_prompts: bool = False, faults: Faults | None = None) -> list[Encoded]:
        """Tokenize rows, in their order and uncut.

        Args:
            items: rows in the neutral form.
            exact_prompts: ``prompt_ids`` are to be fed to the model. Inference tokenizes the turns before the last answer
                together, which can differ from the row's ids where an earlier answer starts with white space.
            faults: where rows that cannot be rendered are noted; they are left out.

        Raises:
            DataError: up to ten conversations that the template cannot render, or whose assistant turns cannot be located.
        """
        faults = faults or Faults()
        encoded: list[Encoded] = []
        for first in range(0, len(items), _BATCH):
            plans = []
            for item in items[first : first + _BATCH]:
                try:
                    plans.append(self._plan(item))
                except RenderFault as fault:
                    faults.add(
                        str(fault),
                        at=item.origin,
                        hint="choose another template with dataset.chat_template, or correct the rows; nothing was trained",
                    )
            encoded.extend(self._encode(plans, exact_prompts))
        faults.raise_if_any()
        return encoded

    def _plan(self, item: TextItem) -> _Plan:
        match item:
            case Document():
                return _Plan(item.text, [], [(0, len(item.text))], True, True, None, "", "", item.origin)
            case Completion():
                text, cut = item.prompt + item.completion, len(item.prompt)
                return _Plan(text, [cut], [(cut, len(text))], True, True, cut, item.request, item.completion, item.origin)
            case Conversation():
                return self._plan_conversation(item)

    def _plan_conversation(self, item: Conversation) -> _Plan:
        if self._locator is None:
            self._locator = Locator(Renderer(self.tokenizer))
        last = max(index for index, message in enumerate(item.messages) if message.role == "assistant")
        # Messages behind the last answer have no influence on any supervised token.
        item = replace(item, messages=item.messages[: last + 1])
        rendered = self._locator.locate(item)
        final = rendered.spans[-1]
        request = next((message.content for message in reversed(item.messages) if message.role == "user"), "")
        return _Plan(
            text=rendered.text if final.closed else rendered.text[: final.end],
            cuts=[span.start for span in rendered.spans],
            ranges=[(span.start, span.end) for span in rendered.spans if span.train],
            raw=False,
            add_eos=not final.closed,
            prompt_end=final.start,
            request=request,
            reference=item.messages[last].content,
            origin=item.origin,
            turn_end=final.end,
        )

    def _encode(self, plans: Sequence[_Plan], exact_prompts: bool) -> list[Encoded]:
        pieces: list[str] = []
        bounds: list[list[int]] = []
        for plan in plans:
            ends = [cut for cut in plan.cuts if 0 < cut < len(plan.text)] if self._in_pieces else []
            bounds.append([0, *ends, len(plan.text)])
            pieces.extend(plan.text[start:end] for start, end in zip(bounds[-1], bounds[-1][1:], strict=False))
        if not pieces:
            return []
        tokens = self.tokenizer(
            pieces,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids, offsets = iter(tokens["input_ids"]), iter(tokens["offset_mapping"])
        return [
            self._row(plan, [(start, next(ids), next(offsets)) for start in bound[:-1]], exact_prompts)
            for plan, bound in zip(plans, bounds, strict=True)
        ]

    def _row(self, plan: _Plan, pieces: list[tuple[int, list[int], list[tuple[int, int]]]], exact_prompts: bool) -> Encoded:
        ids: Ids = np.fromiter((token for _, piece, _ in pieces for token in piece), np.int32)
        places = np.concatenate([np.asarray(offsets, np.int64).reshape(-1, 2) + start for start, _, offsets in pieces])
        starts, ends = places[:, 0], places[:, 1]
        supervised: Mask = np.zeros(len(ids), np.bool_)
        for first, stop in plan.ranges:
            supervised |= (starts >= first) & (ends <= stop) & (ends > starts)
        prompt: Ids = np.zeros(0, np.int32)
        if plan.prompt_end is not None:
            again = (exact_prompts and len(plan.cuts) > 1) or bool(((starts < plan.prompt_end) & (ends > plan.prompt_end)).any())
            prompt = np.array(self._ids(plan.text[: plan.prompt_end]), np.int32) if again else ids[starts < plan.prompt_end]
        if plan.raw:
            whole = self._with_prefix(ids)
            supervised = np.concatenate([np.zeros(len(whole) - len(ids), np.bool_), supervised])
            ids, prompt = whole, prompt if plan.prompt_end is None else self._with_prefix(prompt)
        if plan.add_eos and not (len(ids) and ids[-1] == self.eos and supervised[-1]):
            ids, supervised = np.append(ids, np.int32(self.eos)), np.append(supervised, True)
        if self.train_on == "all":
            learned = np.ones(len(ids), np.bool_)
            if plan.ranges and not plan.raw and not plan.add_eos:
                # What a template writes behind the last turn's end (often a line break) is nothing that a model is asked to write.
                learned[len(ids) - int((starts >= plan.turn_end).sum()) :] = False
            supervised = learned
        supervised[:1] = False
        return Encoded(ids, supervised, plan.origin, prompt, plan.request, plan.reference)

    def _with_prefix(self, ids: Ids) -> Ids:
        """The tokenizer's prefix before raw text; data that spell the BOS out themselves have it already."""
        given = len(ids) > 0 and bool(self.prefix) and self.prefix[-1] == ids[0] == self.bos
        return np.concatenate([np.array(self.prefix[:-1] if given else self.prefix, np.int32), ids])
