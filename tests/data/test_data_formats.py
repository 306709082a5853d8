"""Detection, column mapping and conversion of every format, with faults that name row and column."""

from __future__ import annotations

from typing import Any

import pytest

from peftcli.data.formats import Converter, check_format, check_mapping, convert_rows, detect
from peftcli.data.neutral import Completion, Conversation, Document, Item, Message, keys
from peftcli.data.readers import Row
from peftcli.errors import DataError
from peftcli.recipe.tasks import CausalLMTask

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def convert(
    values: dict[str, Any], format: str = "auto", mapping: dict[str, str] | None = None, chat: bool = True, system: str | None = None
) -> Item:
    mapping = mapping or {}
    check_mapping(mapping, values, "rows")
    name = detect(values, mapping, "rows", CausalLMTask.formats) if format == "auto" else format
    items, empty = convert_rows([Row(values, "rows:1")], Converter(name, mapping, chat=chat, system=system))
    assert not empty
    return items[0]


def fault(values: dict[str, Any], format: str = "auto", mapping: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        convert(values, format, mapping)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "mapping", "expected"),
    [
        (["messages"], {}, "messages"),
        (["prompt", "prompt_id", "messages"], {}, "messages"),
        (["conversations", "tools"], {}, "sharegpt"),
        (["instruction", "input", "output"], {}, "alpaca"),
        (["instruction", "output"], {}, "alpaca"),
        (["prompt", "completion"], {}, "prompt_completion"),
        (["question", "answer"], {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        (["question", "answer"], {"instruction": "question", "output": "answer"}, "alpaca"),
        (["text", "url"], {}, "text"),
        (["body"], {"text": "body"}, "text"),
    ],
)
def test_detection(columns: list[str], mapping: dict[str, str], expected: str) -> None:
    assert detect(columns, mapping, "rows", CausalLMTask.formats) == expected


def test_unknown_columns_say_what_is_known_and_how_to_map() -> None:
    with pytest.raises(DataError) as caught:
        detect(["question", "answer"], {}, "rows.jsonl", CausalLMTask.formats)
    message = str(caught.value)
    assert "rows.jsonl: no known format has the columns question, answer" in message
    assert "dataset.columns, for example {prompt: question, completion: answer}" in message
    assert "alpaca (instruction, output)" in message


def test_preference_data_are_not_taken_for_chats() -> None:
    assert "preference pairs" in fault({"conversations": [], "chosen": {}, "rejected": {}})
    assert "column 'label'" in fault({"messages": CHAT, "label": False})
    assert isinstance(convert({"messages": CHAT, "label": False}, "messages"), Conversation)


def test_mapping_faults_name_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        check_mapping({"promt": "question", "completion": "anser"}, ["question", "answer"], "rows.jsonl")
    message = str(caught.value)
    assert "'promt' is no column of ours; did you mean 'prompt'?" in message
    assert "there is no column 'anser'; did you mean 'answer'?" in message
    with pytest.raises(DataError, match="format alpaca has no column 'prompt'; it has instruction, output, input, system"):
        check_format({"prompt": "question"}, "alpaca")


def test_messages() -> None:
    assert convert({"messages": CHAT}) == Conversation([Message("user", "hi"), Message("assistant", "hello")], "rows:1")
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, CHAT[1]]
    assert convert({"messages": parts}) == convert({"messages": CHAT})
    weighted = convert({"messages": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1]]})
    assert isinstance(weighted, Conversation)
    assert [message.train for message in weighted.messages] == [True, False, True, True]


def test_system_prompt_is_put_before_conversations_that_have_none() -> None:
    added = convert({"messages": CHAT}, system="Be brief.")
    own = convert({"messages": [{"role": "system", "content": "Own."}, *CHAT]}, system="Be brief.")
    assert isinstance(added, Conversation) and isinstance(own, Conversation)
    assert [message.content for message in added.messages] == ["Be brief.", "hi", "hello"]
    assert [message.content for message in own.messages] == ["Own.", "hi", "hello"]


def test_sharegpt_roles_and_system_column() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    expected = Conversation([Message("system", "S"), Message("user", "hi"), Message("assistant", "hello")], "rows:1")
    assert convert({"conversations": turns, "system": "S"}) == expected
    assert convert({"conversations": [{"from": "system", "value": "S"}, *turns]}) == expected
    assert convert({"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}], "system": "S"}) == expected


def test_sharegpt_function_calls() -> None:
    item = convert(
        {
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": '{"c": 20}'},
                {"from": "gpt", "value": "20 C"},
            ],
            "tools": '[{"name": "weather", "parameters": {}}]',
        }
    )
    assert isinstance(item, Conversation)
    assert [message.role for message in item.messages] == ["user", "assistant", "tool", "assistant"]
    assert item.messages[1].tool_calls == ({"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},)
    assert item.tools == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_alpaca_is_a_chat_with_a_template_and_the_stanford_text_without() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert convert(row) == Conversation([Message("user", "Add.\n\n1 2"), Message("assistant", "3")], "rows:1")
    assert convert({"instruction": "Add.", "output": "3"}) == Conversation([Message("user", "Add."), Message("assistant", "3")], "rows:1")
    raw = convert(row, chat=False)
    assert isinstance(raw, Completion)
    assert raw.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert (raw.completion, raw.request) == ("3", "Add.\n\n1 2")
    bare = convert(row | {"input": ""}, chat=False)
    assert isinstance(bare, Completion) and "### Input" not in bare.prompt and bare.prompt.endswith("### Response:\n")
    assert convert(row | {"system": "S"}) == Conversation(
        [Message("system", "S"), Message("user", "Add.\n\n1 2"), Message("assistant", "3")], "rows:1"
    )


def test_prompt_completion_strings_are_raw_and_lists_are_a_conversation() -> None:
    assert convert({"prompt": "a", "completion": " b"}) == Completion("a", " b", "rows:1", "a")
    item = convert({"prompt": [*CHAT, {"role": "user", "content": "more"}], "completion": [{"role": "assistant", "content": "x"}]})
    assert isinstance(item, Conversation)
    assert [(message.role, message.train) for message in item.messages] == [
        ("user", False),
        ("assistant", False),
        ("user", False),
        ("assistant", True),
    ]
    assert convert({"prompt": [CHAT[0]], "completion": "hello"}) == Conversation(
        [Message("user", "hi", train=False), Message("assistant", "hello")], "rows:1"
    )


def test_text() -> None:
    assert convert({"text": "long ago"}) == Document("long ago", "rows:1")


@pytest.mark.parametrize(
    ("values", "format", "expected"),
    [
        ({"messages": [CHAT[0]]}, "auto", "messages: there is no assistant turn to learn (roles: user)"),
        ({"messages": []}, "auto", "messages: the list of messages is empty"),
        ({"messages": "hello"}, "auto", "messages: a list of messages is needed, found str"),
        ({"messages": ["hello"]}, "auto", "messages[0]: a message such as"),
        ({"messages": [{"content": "x"}]}, "auto", "messages[0]: the message has no role (keys: content)"),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            "auto",
            "messages[0].role: unknown role 'asistant'; did you mean 'assistant'?",
        ),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 3}]}, "auto", "messages[1].content: text is needed, found int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "auto",
            "messages[0].content: only text is supported, found parts of type image",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "auto", "messages[0].content: character 1 is half of a surrogate pair"),
        ({"conversations": [{"from": "function_call", "value": "{no"}]}, "auto", "conversations[0].value: not valid JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "auto", "conversations[0].value: a function call needs a name"),
        ({"conversations": [{"from": "human", "value": "x"}], "tools": "{}"}, "auto", "conversations: there is no assistant turn"),
        ({"instruction": "x", "output": None}, "auto", "output: text is needed, found nothing"),
        ({"instruction": " ", "output": "x"}, "auto", "instruction: empty"),
        (
            {"instruction": "x", "outptu": "y"},
            "alpaca",
            "there is no column 'output'; did you mean 'outptu'? (columns: instruction, outptu)",
        ),
        ({"prompt": 1, "completion": "x"}, "auto", "prompt: text is needed, found int"),
        ({"text": ["a"]}, "auto", "text: text is needed, found list"),
    ],
)
def test_fault_names_origin_and_column(values: dict[str, Any], format: str, expected: str) -> None:
    message = fault(values, format)
    assert f"rows:1: {expected}" in message


def test_mapped_column_is_named_as_the_user_wrote_it() -> None:
    assert "rows:1: answer: text is needed, found int" in fault(
        {"question": "a", "answer": 3}, mapping={"prompt": "question", "completion": "answer"}
    )


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ({"instruction": "x", "output": " "}, "output"),
        ({"prompt": "x", "completion": ""}, "completion"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "messages[1].content"),
        ({"text": " \n"}, "text"),
    ],
)
def test_rows_with_an_empty_answer_are_counted_not_lost(values: dict[str, Any], column: str) -> None:
    items, empty = convert_rows([Row(values, "rows:7")], Converter(detect(values, {}, "rows", CausalLMTask.formats), {}, chat=True))
    assert items == [] and empty == [("rows:7", column)]


def test_all_faulty_rows_are_named_together() -> None:
    rows = [Row({"text": value}, f"rows:{number}") for number, value in enumerate(["a", 1, "b", None], 1)]
    with pytest.raises(DataError, match=r"2 faults in the data:\n  rows:2: .*\n  rows:4: "):
        convert_rows(rows, Converter("text", {}, chat=False))


def test_digest_is_of_the_content_alone() -> None:
    assert keys(Document("a", "x:1")) == keys(Document("a", "y:2"))
    assert keys(Document("a", "x:1")) != keys(Document("b", "x:1"))
    one, other = Completion("ask", "a", "x:1", "ask"), Completion("ask", "b", "x:1", "ask")
    assert keys(one)[0] != keys(other)[0] and keys(one)[1] == keys(other)[1] != 0
    turns = [Message("user", "ask"), Message("assistant", "a")]
    assert keys(Conversation(turns, "x:1"))[1] == keys(Conversation([turns[0], Message("assistant", "b")], "y:1"))[1] != 0
    assert keys(Conversation(turns, "x:1"))[1] != keys(Conversation([Message("system", "s"), *turns], "x:1"))[1]
    assert keys(Document("a", "x:1"))[1] == keys(Completion("", "a", "x:1", ""))[1] == 0
