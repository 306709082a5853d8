"""Rows 3 to 11 of the list of known bugs, for every template that is shipped, on conversations of any shape; and packing, masking
and collating of what comes out."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from peftcli.data.audit import audit_rows
from peftcli.data.batching import Plan, collate
from peftcli.data.neutral import Conversation, Message
from peftcli.data.templates import Renderer, install, shipped
from peftcli.data.tokenize import Encoded, Encoder
from peftcli.data.truncation import fit
from peftcli.errors import DataError
from peftcli.kernels import attention
from peftcli.tasks.causal_lm import CausalLM

MARKS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|user|>", "<|assistant|>", "<|end|>")  # fmt: skip
# A template of one's own: with the blocks that say what is generated, and tools.
OWN = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = (*shipped(), "own", "own without marks")


@cache
def tokenizer_of(name: str) -> Any:
    tokenizer = byte_tokenizer(adds_bos=True, marks=MARKS)
    if name.startswith("own"):
        tokenizer.chat_template = OWN if name == "own" else OWN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    else:
        assert install(name, tokenizer, Path()) == []
    return tokenizer


WORDS = st.text(st.sampled_from("ab é三\n."), min_size=1, max_size=12).filter(str.strip).map(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
CHATS = st.builds(
    lambda turns, system: Conversation(
        [*([Message("system", system)] if system else []), *(Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True))],
        "r:1",
    ),
    TURNS,
    st.none() | WORDS,
)  # fmt: skip


def check(row: Encoded, tokenizer: Any, item: Conversation) -> None:
    bos = tokenizer.bos_token_id
    assert int((row.input_ids == bos).sum()) == 1 and row.input_ids[0] == bos, "row 4: one BOS"
    assert 0 < row.supervised.sum() < len(row.input_ids) and not row.supervised[0], "row 6"
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = int(np.flatnonzero(row.supervised)[-1])
    assert int(row.input_ids[last]) in special, "row 3: the end of the last answer is learned"
    asked = [message.for_template() for message in item.messages[:-1]]
    first = next(place for place, message in enumerate(item.messages) if message.role == "assistant")
    prompt = Renderer(tokenizer).render(item, first, prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert not row.supervised[: len(ids)].any() and row.input_ids[: len(ids)].tolist() == ids, "row 5"
    given = tokenizer.apply_chat_template(asked, tools=item.tools, add_generation_prompt=True, return_dict=False)
    assert row.prompt_ids.tolist() == given, "row 5: what inference feeds"
    learned, position = tokenizer.decode(row.input_ids[row.supervised], skip_special_tokens=False), 0
    for message in item.messages:
        if message.role == "assistant":
            position = learned.index(message.content, position) + len(message.content)
    audit = audit_rows([row], tokenizer, train_on="completions", truncated=0, dropped=0)
    assert audit.eos_supervised == audit.complete_rows == audit.bos_rows == 1


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(item=CHATS)
def test_rows_3_to_6_of_any_conversation(name: str, item: Conversation) -> None:
    tokenizer = tokenizer_of(name)
    (row,) = Encoder(tokenizer).encode([item], exact_prompts=True)
    check(row, tokenizer, item)


SPOILED = {
    "another mark": ("", "{%- if add_generation_prompt -%}BOT:{%- endif -%}"),
    "no answers": ("{%- set messages = messages | rejectattr('role', 'equalto', 'assistant') | list -%}", ""),
    "backwards": ("{%- set messages = messages | reverse | list -%}", ""),
}


# Of a template with marks the marks are believed, whatever the order of the messages.
@pytest.mark.parametrize(
    ("name", "spoiled"), [(name, spoiled) for name in TEMPLATES for spoiled in SPOILED if (name, spoiled) != ("own", "backwards")]
)
def test_row_7_an_answer_that_is_not_found_where_inference_writes_it_is_refused(name: str, spoiled: str) -> None:
    tokenizer = copy.deepcopy(tokenizer_of(name))
    item = Conversation(
        [Message("user", "ask"), Message("assistant", "answer"), Message("user", "more"), Message("assistant", "last")], "r:1"
    )
    assert Encoder(tokenizer).encode([item])[0].supervised.any()
    before, behind = SPOILED[spoiled]
    tokenizer.chat_template = before + tokenizer.chat_template + behind
    with pytest.raises(DataError, match=r"r:1: .*(cannot be located|does not stand before|the template marks)"):
        Encoder(tokenizer).encode([item])


@pytest.mark.parametrize("name", ["own", "own without marks"])
def test_tool_calls(name: str) -> None:
    tokenizer = tokenizer_of(name)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    messages = [
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "", (call,)),
        Message("tool", "9 C"),
        Message("assistant", "cold"),
    ]
    item = Conversation(messages, "r:1", [{"type": "function", "function": {"name": "weather"}}])
    (row,) = Encoder(tokenizer).encode([item], exact_prompts=True)
    check(row, tokenizer, item)
    learned = tokenizer.decode(row.input_ids[row.supervised], skip_special_tokens=False)
    assert learned == '[weather {"city": "Ulm"}]</s>cold</s>'
    assert "9 C" not in learned


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "drop"])
def test_row_8_truncation_never_leaves_a_row_that_learns_nothing(name: str, mode: Any) -> None:
    tokenizer = tokenizer_of(name)
    items = [
        Conversation([Message("user", "a " * size), Message("assistant", "b " * (30 - size) + "b")], f"r:{size}") for size in range(1, 30)
    ]
    rows = Encoder(tokenizer).encode(items)
    longest = max(len(row.input_ids) for row in rows)
    for length in (longest // 2, longest - 5, longest):
        try:
            fitted = fit(rows, max_length=length, mode=mode, bos=tokenizer.bos_token_id)
        except DataError as error:
            assert "none of 29 rows has a supervised token left" in str(error) and length < longest
            continue
        kept = {row.origin for row in fitted.rows} | set(fitted.too_long) | set(fitted.unsupervised)
        assert kept == {item.origin for item in items} and len(fitted.rows) + len(fitted.too_long) + len(fitted.unsupervised) == len(items)
        assert all(row.supervised.any() and len(row.input_ids) <= length for row in fitted.rows)


@cache
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).double().eval()


def some_rows(name: str) -> list[Encoded]:
    said = ["a", "b b b", "c", "d d d d d", "e"]
    items = [Conversation([Message("user", "x" * size), Message("assistant", said[size % 5])], f"r:{size}") for size in range(1, 12)]
    return Encoder(tokenizer_of(name)).encode(items)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_10_and_11_no_leak_and_no_influence_of_the_batch(name: str) -> None:
    rows, task = some_rows(name), CausalLM(model())
    whole = []
    with torch.no_grad():
        for packed in (True, False):
            for size in (1, 4, 16):
                parts = [rows[start : start + size] for start in range(0, len(rows), size)]
                measured = [
                    task.measure(collate([r.input_ids for r in part], [r.supervised for r in part], packed=packed)) for part in parts
                ]
                whole.append(torch.cat([m["loss"] for m in measured]))
        edited = [np.full_like(rows[0].input_ids, 7), *(row.input_ids for row in rows[1:])]
        masks = [row.supervised for row in rows]
        before = task.measure(collate([row.input_ids for row in rows], masks, packed=True))["loss"]
        after = task.measure(collate(edited, masks, packed=True))["loss"]
    assert all(torch.allclose(loss, whole[0], rtol=1e-10, atol=0) for loss in whole)
    assert torch.equal(before[1:], after[1:]) and before[0] != after[0]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=40), seed=st.integers(0, 99), size=st.one_of(st.none(), st.integers(1, 7)),
    accumulation=st.integers(1, 3), processes=st.integers(1, 3), packed=st.booleans(), group=st.booleans(), data=st.data(),
)  # fmt: skip
def test_an_epoch_holds_each_token_once_and_labels_are_the_token_or_nothing(
    lengths: list[int], seed: int, size: int | None, accumulation: int, processes: int, packed: bool, group: bool, data: st.DataObject
) -> None:
    chance = np.random.default_rng(seed)
    ids = [chance.integers(0, 99, length).astype(np.int32) for length in lengths]
    masks = [chance.random(length) < 0.5 for length in lengths]
    plan = Plan(
        lengths=lengths, batch_size=size, batch_tokens=None if size else 40, accumulation=accumulation, processes=processes, seed=seed,
        group_by_length=group,
    )  # fmt: skip
    steps = plan.epoch(data.draw(st.integers(0, 3)))
    tokens = supervised = 0
    seen: list[int] = []
    for step in steps:
        for share in step.shares:
            for micro in filter(None, share):
                batch = collate([ids[row] for row in micro], [masks[row] for row in micro], packed=packed, pad_id=5)
                labels = torch.full((batch.input_ids.numel(),), -100)
                labels[batch.positions + 1] = batch.targets
                flat = batch.input_ids.flatten()
                assert bool(((labels == -100) | (labels == flat)).all()), "a label is the token of its place, or nothing"
                tokens += batch.tokens
                supervised += int((labels != -100).sum())
                seen.extend(micro)
                assert batch.counts == tuple(int(masks[row][1:].sum()) for row in micro)
    assert sorted(seen) == list(range(len(lengths))), "each row in exactly one batch"
    assert tokens == sum(lengths) and supervised == sum(int(mask[1:].sum()) for mask in masks)
    other = replace(plan, lengths=tuple(lengths))
    assert plan.digest(2) == other.digest(2), "the order is a pure function of the seed"
