"""Which tokens carry loss, and where rows start and end: rows 3 to 8 of the list of known bugs, for every shipped template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_tokenizer, space_tokenizer
from transformers import AutoTokenizer

from peftcli.data.audit import audit_rows, plain_example, render_example, runs
from peftcli.data.neutral import Completion, Conversation, Document, Message
from peftcli.data.templates import install, load, shipped
from peftcli.data.tokenize import Encoded, Encoder
from peftcli.errors import DataError

HERE = Path()
ASSISTANT_ONLY = "{% for m in messages %}{{ m.content }}{% endfor %}"


def chat(*contents: str, system: str | None = None) -> Conversation:
    """user, assistant, user, assistant, ..."""
    messages = [Message("user" if place % 2 == 0 else "assistant", content) for place, content in enumerate(contents)]
    return Conversation([Message("system", system), *messages] if system else messages, "rows:1")


def encode(tokenizer: Any, item: Conversation | Completion | Document, train_on: Any = "completions") -> Encoded:
    return Encoder(tokenizer, train_on).encode([item])[0]


def supervised_pieces(row: Encoded, tokenizer: Any) -> list[str]:
    return [text for text, supervised in runs(row, tokenizer) if supervised]


def templated(name: str, *, adds_bos: bool = False) -> Any:
    marks = (
        "<|im_start|>",
        "<|im_end|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
    )
    tokenizer = byte_tokenizer(adds_bos=adds_bos, marks=marks)
    assert install(name, tokenizer, HERE) == []
    return tokenizer


ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}
SPACED = {"mistral", "vicuna", "plain"}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", shipped())
def test_every_turn_of_every_shipped_template(name: str, adds_bos: bool) -> None:
    tokenizer = templated(name, adds_bos=adds_bos)
    row = encode(tokenizer, chat("Say a.", "a", "Say b.", "b b", system="Be brief."))
    lead = " " if name in SPACED else ""
    end = ENDS.get(name, "</s>")
    assert supervised_pieces(row, tokenizer) == [f"{lead}a{end}", f"{lead}b b{end}"]
    assert "Be brief." in tokenizer.decode(row.input_ids)
    assert (row.request, row.reference) == ("Say b.", "b b")


def test_template_without_generation_markers_masks_exactly() -> None:
    """Row 6: 0 < supervised < total, and the prompts carry none."""
    for name in shipped():
        tokenizer = templated(name)
        item = chat("question", "answer")
        row = encode(tokenizer, item)
        assert "generation %}" not in load(name, HERE)
        assert 0 < row.supervised.sum() < len(row.input_ids)
        assert not row.supervised[: len(row.prompt_ids)].any()
        assert "question" not in "".join(supervised_pieces(row, tokenizer))


@pytest.mark.parametrize("name", shipped())
def test_training_ids_start_with_the_saved_tokenizers_generation_prompt(name: str, tmp_path: Path) -> None:
    """Row 5."""
    tokenizer = templated(name, adds_bos=True)
    several = chat("one\n\ntwo", "answer ", "three", "\nfour")
    single = chat("one\n\ntwo", "\n\n answer")
    # Inference tokenizes an earlier answer together with its header; a row cuts there, since that turn is learned too.
    awkward = chat("one", "\n\n answer", "two", "\nthree")
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for item in (several, single, awkward):
        row = Encoder(tokenizer).encode([item], exact_prompts=True)[0]
        asked = [message.for_template() for message in item.messages[:-1]]
        prompt = saved.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert row.prompt_ids.tolist() == prompt
        first = saved.apply_chat_template(asked[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert row.input_ids[: len(first)].tolist() == first
        # llama3's header ends in two line breaks, which this tokenizer merges at the end of a text only.
        if item is single or (item is several and name != "llama3"):
            assert row.input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", shipped())
def test_eos_is_supervised_in_every_row_where_pad_is_eos(name: str) -> None:
    """Row 3."""
    tokenizer = templated(name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    items = [chat("q", "a" * length) for length in range(1, 30)]
    rows = Encoder(tokenizer).encode(items)
    audit = audit_rows(rows, tokenizer, train_on="completions", truncated=0, dropped=0)
    assert audit.eos_supervised == audit.complete_rows == len(items)
    raw = Encoder(tokenizer).encode([Completion("q", "a", "r:1", "q"), Document("text", "r:2"), Completion("q", "a</s>", "r:3", "q")])
    for row in raw:
        assert row.input_ids[-1] == tokenizer.eos_token_id and row.supervised[-1]
        assert (row.input_ids == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize("name", shipped())
def test_exactly_one_bos_in_each_row(name: str) -> None:
    """Row 4."""
    for adds_bos in (True, False):
        tokenizer = templated(name, adds_bos=adds_bos)
        items = [
            chat("q", "a", "r", "b"),
            Completion("q", "a", "r:2", "q"),
            Document("t", "r:3"),
            Document("<s>t", "r:4"),
            Completion("<s>q", "a", "r:5", "q"),
        ]
        rows = Encoder(tokenizer).encode(items)
        counts = [int((row.input_ids == tokenizer.bos_token_id).sum()) for row in rows]
        assert counts == ([1, 1, 1, 1, 1] if adds_bos else [0, 0, 0, 1, 1])
        assert audit_rows(rows, tokenizer, train_on="completions", truncated=0, dropped=0).bos_rows == sum(counts)


def test_doubled_bos_is_refused() -> None:
    """Row 4: a template that writes the BOS twice."""
    tokenizer = byte_tokenizer(template="{{ bos_token }}{{ bos_token }}" + load("chatml", HERE))
    rows = Encoder(tokenizer).encode([chat("q", "a")])
    with pytest.raises(DataError, match="rows:1 starts with two BOS"):
        audit_rows(rows, tokenizer, train_on="completions", truncated=0, dropped=0)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    ],
    ids=["other marker", "answer left out", "reversed"],
)
def test_response_that_cannot_be_located_is_refused(template: str) -> None:
    """Row 7: refuse, never warn."""
    tokenizer = byte_tokenizer(template=template)
    with pytest.raises(DataError, match=r"rows:1: .*(cannot be located|does not stand before it)"):
        encode(tokenizer, chat("ask", "answer"))


def test_fully_masked_rows_are_refused() -> None:
    """Row 8: the audit never lets nothing pass as something."""
    tokenizer = templated("chatml")
    row = encode(tokenizer, chat("q", "a"))
    with pytest.raises(DataError, match=r"none of .* tokens in 1 rows carries loss"):
        audit_rows([replace(row, supervised=np.zeros_like(row.supervised))], tokenizer, train_on="completions", truncated=0, dropped=0)
    with pytest.raises(DataError, match="every token of rows:1 carries loss"):
        audit_rows([replace(row, supervised=np.ones_like(row.supervised))], tokenizer, train_on="completions", truncated=0, dropped=0)
    unlearned = row.supervised.copy()
    unlearned[np.flatnonzero(unlearned)[-1]] = False
    with pytest.raises(DataError, match="the end of the answer carries no loss in 1 of 1"):
        audit_rows([replace(row, supervised=unlearned)], tokenizer, train_on="completions", truncated=0, dropped=0)


def test_generation_blocks_of_the_template_are_used() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}BLOCK{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template=template)
    row = encode(tokenizer, chat("q", "a", "r", "b"))
    # The blocks leave the end-of-turn token out; without it a model would never stop.
    assert supervised_pieces(row, tokenizer) == ["aBLOCK<|im_end|>", "bBLOCK<|im_end|>"]
    header_inside = template.replace(
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}",
        "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
    ).replace("{% else %}", "{% else %}{{ '<|im_start|>' + m.role + '\n' }}")
    tokenizer.chat_template = header_inside
    assert supervised_pieces(encode(tokenizer, chat("q", "a")), tokenizer) == ["aBLOCK<|im_end|>"]


def test_default_system_prompt_and_an_assistant_who_speaks_first() -> None:
    template = "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nDefault<|im_end|>\n{% endif %}" + load("chatml", HERE)
    tokenizer = byte_tokenizer(template=template)
    row = encode(tokenizer, Conversation([Message("assistant", "Welcome!"), Message("user", "q"), Message("assistant", "a")], "rows:1"))
    assert supervised_pieces(row, tokenizer) == ["Welcome!<|im_end|>", "a<|im_end|>"]


def test_template_that_strips_earlier_reasoning() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template=template)
    row = encode(tokenizer, chat("q", "plain", "r", "<think>x</think>b"))
    assert supervised_pieces(row, tokenizer) == ["plain<|im_end|>", "<think>x</think>b<|im_end|>"]
    row = encode(tokenizer, chat("q", "<think>x</think>a", "r", "b"))
    assert supervised_pieces(row, tokenizer) == ["a<|im_end|>", "b<|im_end|>"]


def test_system_prompt_moved_to_the_last_user_message() -> None:
    template = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {% if loop.index >= messages | length - 1 %}{{ system }} {% endif %}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template=template)
    row = encode(tokenizer, chat("q", "a", "r", "b", system="S"))
    assert supervised_pieces(row, tokenizer) == ["a</s>", " b</s>"]


def test_template_that_ends_no_turn_gets_eos() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = byte_tokenizer(template=template)
    row = encode(tokenizer, chat("q", "a", "r", "b"))
    assert supervised_pieces(row, tokenizer) == [" a", " b</s>"]
    assert tokenizer.decode(row.input_ids).endswith(" b</s>")


def test_named_template_whose_marks_are_no_tokens() -> None:
    tokenizer = byte_tokenizer(marks=())
    notes = install("chatml", tokenizer, HERE)
    assert "<|im_start|>, <|im_end|> are no tokens of this vocabulary" in notes[0]
    row = encode(tokenizer, chat("q", "a"))
    assert supervised_pieces(row, tokenizer) == ["a<|im_end|></s>"]


def test_turns_without_loss() -> None:
    tokenizer = templated("chatml")
    item = chat("q", "a", "r", "b")
    item = replace(item, messages=[message.without_loss() if place == 1 else message for place, message in enumerate(item.messages)])
    assert supervised_pieces(encode(tokenizer, item), tokenizer) == ["b<|im_end|>"]


def test_messages_after_the_last_answer_are_cut() -> None:
    tokenizer = templated("chatml")
    row = encode(tokenizer, chat("q", "a", "unanswered"))
    assert "unanswered" not in tokenizer.decode(row.input_ids)
    assert row.request == "q"


def test_tools_are_rendered_or_refused() -> None:
    call = Message("assistant", "", ({"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},))
    messages = [Message("user", "weather?"), call, Message("tool", "20"), Message("assistant", "20 C")]
    tokenizer = templated("chatml")
    with pytest.raises(DataError, match="message 1 calls a function, and the chat template does not render the call"):
        encode(tokenizer, Conversation(messages, "rows:1"))
    with pytest.raises(DataError, match="it has tools, and the chat template renders none"):
        encode(tokenizer, Conversation(messages[:1] + messages[3:], "rows:1", [{"type": "function", "function": {"name": "weather"}}]))
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = encode(tokenizer, Conversation(messages, "rows:1", [{"type": "function", "function": {"name": "weather"}}]))
    first, second = supervised_pieces(row, tokenizer)
    assert '"weather"' in first and "Rome" in first and second == "20 C<|im_end|>"


def test_a_template_that_refuses_a_conversation_names_the_row() -> None:
    tokenizer = templated("gemma")
    item = Conversation([Message("user", "q"), Message("tool", "x"), Message("assistant", "a")], "rows:9")
    with pytest.raises(DataError, match=r"rows:9: the chat template cannot render it .*not tool"):
        encode(tokenizer, item)


def test_conversations_need_a_template() -> None:
    with pytest.raises(DataError, match=r"no chat template(.|\n)*dataset.chat_template: chatml"):
        encode(byte_tokenizer(), chat("q", "a"))


def test_completion_documents_and_train_on_all() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    row = encode(tokenizer, Completion("2+2=", "4", "r:1", "2+2="))
    assert supervised_pieces(row, tokenizer) == ["4</s>"]
    assert tokenizer.decode(row.prompt_ids) == "<s>2+2="
    assert row.input_ids[: len(row.prompt_ids)].tolist() == row.prompt_ids.tolist() == tokenizer("2+2=")["input_ids"]
    document = encode(tokenizer, Document("once", "r:1"))
    assert tokenizer.decode(document.input_ids) == "<s>once</s>"
    assert document.supervised.tolist() == [False] + [True] * (len(document.input_ids) - 1)
    chatml = templated("chatml")
    everything = encode(chatml, chat("q", "a"), "all")
    assert everything.supervised[1:-1].all() and not everything.supervised[0]
    assert chatml.decode(everything.input_ids[-1:]) == "\n" and not everything.supervised[-1], "behind the end of the last turn"
    audit = audit_rows([everything], chatml, train_on="all", truncated=0, dropped=0)
    assert audit.complete_rows == audit.eos_supervised == 1


def test_prompt_and_completion_that_would_merge_stay_apart() -> None:
    tokenizer = byte_tokenizer()
    joined = tokenizer("the quick")["input_ids"]
    row = encode(tokenizer, Completion("the qu", "ick", "r:1", ""))
    assert row.input_ids[:-1].tolist() != joined
    assert row.input_ids[: len(row.prompt_ids)].tolist() == tokenizer("the qu")["input_ids"]
    assert supervised_pieces(row, tokenizer) == ["ick</s>"]


def test_tokenizer_that_puts_a_space_before_each_text() -> None:
    tokenizer = space_tokenizer()
    install("chatml", tokenizer, HERE)
    row = encode(tokenizer, chat("the fox", "the dog", "what", "can do"))
    whole = tokenizer(
        tokenizer.apply_chat_template(
            [message.for_template() for message in chat("the fox", "the dog", "what", "can do").messages], tokenize=False
        ),
        add_special_tokens=False,
    )
    assert row.input_ids.tolist() == whole["input_ids"]
    assert [piece.strip() for piece in supervised_pieces(row, tokenizer)] == ["the dog<|im_end|>", "can do<|im_end|>"]
    raw = encode(tokenizer, Completion("the qu", "ick", "r:1", ""))
    assert raw.prompt_ids.tolist() == tokenizer("the qu")["input_ids"]
    covered = np.flatnonzero(raw.supervised)
    assert len(covered) and "u" not in tokenizer.decode(raw.input_ids[covered])


def test_no_eos_and_slow_tokenizers_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Encoder(tokenizer)
    with pytest.raises(DataError, match="not a fast one"):
        Encoder(object())


PROPERTY_TOKENIZER = byte_tokenizer(adds_bos=True)
install("chatml", PROPERTY_TOKENIZER, HERE)
# What spells out a special token is one; that is the tokenizer's doing and not looked at here.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_supervised_pieces_decode_to_the_assistants_content(turns: list[tuple[str, str]]) -> None:
    row = encode(PROPERTY_TOKENIZER, chat(*[text for turn in turns for text in turn]))
    assert supervised_pieces(row, PROPERTY_TOKENIZER) == [f"{answer}<|im_end|>" for _, answer in turns]
    start = len(row.prompt_ids)
    assert not row.supervised[start - 1]
    assert row.supervised[start:-1].all()


@settings(max_examples=150, deadline=None)
@given(TEXT, TEXT)
def test_completion_ids_decode_to_both_texts(prompt: str, completion: str) -> None:
    row = encode(PROPERTY_TOKENIZER, Completion(prompt, completion, "r:1", prompt))
    assert PROPERTY_TOKENIZER.decode(row.input_ids) == f"<s>{prompt}{completion}</s>"
    assert supervised_pieces(row, PROPERTY_TOKENIZER) == [f"{completion}</s>"]


def test_example_renderings() -> None:
    tokenizer = templated("chatml")
    audit = audit_rows([encode(tokenizer, chat("q", "a"))], tokenizer, train_on="completions", truncated=0, dropped=0, notes=["n"])
    assert plain_example(audit) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    text = render_example(audit)
    assert text.plain == plain_example(audit).replace("⟦", "").replace("⟧", "")
    assert [str(span.style) for span in text.spans] == ["dim", "bold green", "dim"]
    values = audit.to_dict()
    assert values["example"][1] == ["a<|im_end|>", True]
    assert values["supervised_tokens"] + values["prompt_tokens"] == values["tokens"]


@pytest.mark.parametrize("name", ["smollm2-135m", "minimind2-small"])
def test_real_chat_tokenizers(name: str, load_model_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = load_model_tokenizer(name)
    item = chat("Hello?\n\n", "\n\nHi there! 你好", "More", " and more \n")
    row = Encoder(tokenizer).encode([item], exact_prompts=True)[0]
    assert supervised_pieces(row, tokenizer) == ["\n\nHi there! 你好<|im_end|>", " and more \n<|im_end|>"]
    prompt = tokenizer.apply_chat_template(
        [message.for_template() for message in item.messages[:3]], add_generation_prompt=True, return_dict=False
    )
    assert row.prompt_ids.tolist() == prompt
    # Here BOS is the mark of each turn; it must not stand twice in a row at the start.
    assert row.input_ids[0] == tokenizer.bos_token_id != row.input_ids[1]


@pytest.mark.parametrize("name", shipped())
def test_shipped_templates_on_a_real_tokenizer(name: str, load_model_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = load_model_tokenizer("smollm2-135m")
    install(name, tokenizer, HERE)
    rows = Encoder(tokenizer).encode([chat("q", "one", "r", "two\nthree")])
    assert ["one" in rows_ for rows_ in supervised_pieces(rows[0], tokenizer)] == [True, False]
    audit = audit_rows(rows, tokenizer, train_on="completions", truncated=0, dropped=0)
    assert audit.eos_supervised == 1


def test_templates_from_a_file_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(load("chatml", HERE), "utf-8")
    tokenizer = byte_tokenizer()
    assert install("own.jinja", tokenizer, tmp_path) == []
    assert supervised_pieces(encode(tokenizer, chat("q", "a")), tokenizer) == ["a<|im_end|>"]
    with pytest.raises(DataError, match=r"'chatlm' is neither a shipped template nor a file; did you mean 'chatml'\?"):
        install("chatlm", tokenizer, tmp_path)
    (tmp_path / "bad.jinja").write_text("one\n{% for %}")
    with pytest.raises(DataError, match=r"bad.jinja:2: not a valid Jinja template"):
        install("bad.jinja", tokenizer, tmp_path)
