"""Pairs of texts: each side with its own special tokens, the target learned to its end, nothing cut or dropped uncounted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peftcli.data.audit import plain_example
from peftcli.data.prepare import Prepared, prepare, prepare_eval
from peftcli.data.seq2seq_rows import PairAudit, Seq2SeqRows
from peftcli.data.splits import PairSplit
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

PAD, EOS, START, LANGUAGE = 0, 1, 2, 3


def tokenizer(kind: str = "t5") -> Any:
    """Byte-level, with what a family puts around a text: ``t5`` EOS, ``bart`` a start token and EOS, ``mbart`` EOS and the language,
    ``bare`` nothing."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "</s>", "<s>", "en_XX", *bytes_])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "</s>", "<s>", "en_XX"])
    around = {"t5": "$A </s>", "bart": "<s> $A </s>", "mbart": "$A </s> en_XX"}.get(kind)
    if around is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("</s>", EOS), ("<s>", START), ("en_XX", LANGUAGE)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False)


def prepared(rows: list[dict[str, Any]], folder: Path, kind: str = "t5", most: int | None = None, **options: Any) -> Prepared:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = DatasetSection(train="rows.jsonl", eval="rows.jsonl", **options)  # type: ignore[arg-type]
    return prepare(Seq2SeqRows(section, tokenizer(kind), most), base_dir=folder, seed=1)


def texts(data: Prepared, kind: str = "t5") -> list[tuple[str, str]]:
    split, decode = data.train, tokenizer(kind).decode
    assert isinstance(split, PairSplit)
    return [(decode(source.tolist()), decode(target.tolist())) for source, target in zip(split.input_ids, split.target_ids, strict=True)]


CASES: list[tuple[str, dict[str, Any], dict[str, Any], tuple[str, str]]] = [
    ("text_to_text", {"source": "ab", "target": "c"}, {}, ("ab", "c")),
    ("mapped", {"mr": "name[X]", "ref": "X."}, {"columns": {"source": "mr", "target": "ref"}}, ("name[X]", "X.")),
    ("prompt_completion", {"prompt": "ab ", "completion": " c"}, {}, ("ab ", " c")),
    ("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"}, {}, ("Add.\n\n1 1", "2")),
    ("alpaca_system", {"instruction": "Add.", "input": "", "output": "2", "system": "Be short."}, {}, ("Be short.\n\nAdd.", "2")),
    ("system", {"instruction": "Add.", "output": "2"}, {"system": "Short."}, ("Short.\n\nAdd.", "2")),
    ("messages", {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}, {}, ("ab", "c")),
    ("sharegpt", {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c"}], "system": "S"}, {}, ("S\n\nab", "c")),
]


@pytest.mark.parametrize(("name", "row", "options", "expected"), CASES, ids=[case[0] for case in CASES])
def test_every_format_becomes_a_pair(
    name: str, row: dict[str, Any], options: dict[str, Any], expected: tuple[str, str], tmp_path: Path
) -> None:
    data = prepared([row, row], tmp_path, **options)
    assert texts(data) == [(f"{expected[0]}</s>", f"{expected[1]}</s>")] * 2
    assert data.eval is not None
    assert [(example.reference, example.prompt_ids[-1]) for example in data.eval.generation] == [(expected[1], EOS)]
    assert data.train.generation == []
    assert data.train.stop_ids == (EOS,)


def test_rows_that_ask_the_same_share_their_answers(tmp_path: Path) -> None:
    rows = [{"source": source, "target": target} for source, target in (("a", "1"), ("b", "2"), ("a", "3"), ("a", "1"))]
    held_out = prepared(rows, tmp_path).eval
    assert held_out is not None and held_out.counts.rows == 4, "the loss is that of every row"
    assert [(found.prompt, found.references, found.origin) for found in held_out.generation] == [
        ("a", ("1", "3"), "rows.jsonl:1"),
        ("b", ("2",), "rows.jsonl:2"),
    ]
    assert held_out.generation[0].reference == "1\nor: 3"


def test_a_chat_template_puts_nothing_around_a_source(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Add.", "output": "2"}) + "\n", encoding="utf-8")
    tok = tokenizer()
    tok.chat_template = helpers.TEMPLATE
    section = DatasetSection(train="rows.jsonl", chat_template="chatml")  # type: ignore[arg-type]
    data = prepare(Seq2SeqRows(section, tok, None), base_dir=tmp_path, seed=1)
    assert texts(data) == [("Add.</s>", "2</s>")]
    assert any("dataset.chat_template has no influence" in note for note in data.audit.notes)
    assert tok.chat_template == helpers.TEMPLATE


@pytest.mark.parametrize(("kind", "source", "target"), [
    ("t5", "a</s>", "b</s>"), ("bart", "<s>a</s>", "<s>b</s>"), ("mbart", "a</s>en_XX", "b</s>en_XX"), ("bare", "a", "b</s>"),
])  # fmt: skip
def test_special_tokens_are_the_tokenizers_and_eos_is_always_learned(kind: str, source: str, target: str, tmp_path: Path) -> None:
    data = prepared([{"source": "a", "target": "b"}], tmp_path, kind)
    assert texts(data, kind) == [(source, target)]
    audit = data.audit
    assert isinstance(audit, PairAudit)
    assert (audit.eos_supervised, audit.rows) == (1, 1)


def test_units_lengths_and_audit(tmp_path: Path) -> None:
    data = prepared([{"source": "abc", "target": "de"}, {"source": "f", "target": "g"}], tmp_path)
    split, audit = data.train, data.audit
    assert split.lengths == (4 + 3, 2 + 2)
    assert [split.units(0), split.units(1)] == [3, 2]
    assert split.counts.supervised_tokens == 5
    assert split.counts.tokens == 11
    assert split.all_ids(1).tolist() == [*split.first_ids(1).tolist(), *tokenizer()("g")["input_ids"]]
    assert isinstance(audit, PairAudit)
    assert audit.supervised_tokens + audit.source_tokens == audit.tokens == 11
    assert audit.learned == "5 of 11 tokens carry loss, those of the targets (45.5 %)"
    assert plain_example(audit) == "abc</s> → ⟦de</s>⟧"
    assert "5 of 11" in audit.to_dict()["summary"]


def test_what_is_too_long_is_cut_on_its_own_side_and_counted(tmp_path: Path) -> None:
    rows = [{"source": "abcdefgh", "target": "uvwxyz"}, {"source": "a", "target": "uvwxyz"}, {"source": "abcdefgh", "target": "z"}]
    data = prepared(rows, tmp_path, most=4, max_length=5)
    # A source keeps the special tokens around it; a target that lost its end must not teach to stop there.
    assert texts(data) == [("abcd</s>", "uvwx"), ("a</s>", "uvwx"), ("abcd</s>", "z</s>")]
    audit = data.audit
    assert isinstance(audit, PairAudit)
    assert (audit.truncated, audit.sources_cut, audit.targets_cut, audit.eos_supervised) == (3, 2, 2, 1)
    assert audit.example[1] == ("z</s>", True), "the example is a whole one"
    assert "training: cut 2 sources to 5 tokens (keep_start)" in audit.notes
    assert "training: cut 2 targets to 4 tokens, without their end" in audit.notes
    assert texts(prepared(rows, tmp_path, most=4, max_length=5, truncation="keep_end"))[0] == ("efgh</s>", "uvwx")
    assert texts(prepared(rows[2:], tmp_path, "bart", max_length=5, truncation="keep_end"), "bart") == [("<s>fgh</s>", "<s>z</s>")]
    dropped = prepared([*rows, {"source": "b", "target": "c"}], tmp_path, most=4, max_length=5, truncation="drop")
    assert texts(dropped) == [("b</s>", "c</s>")]
    assert dropped.audit.dropped == 3
    assert dropped.train.dropped_origins == [f"rows.jsonl:{line}" for line in (1, 2, 3)]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the target has 7 tokens, task\.max_target_length is 4"):
        prepared(rows, tmp_path, most=4, max_length=5, truncation="error")
    with pytest.raises(DataError, match="none of 3 rows fits"):
        prepared(rows, tmp_path, most=2, max_length=3, truncation="drop")
    with pytest.raises(DataError, match="cannot be split"):
        prepared(rows, tmp_path, truncation="split")


def test_conversations_and_faults_are_named(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: an encoder-decoder learns one answer to one text") as fault:
        prepared([{"messages": turn}, {"messages": turn * 2}], tmp_path)
    assert "task: causal_lm" in str(fault.value.hint)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*source"):
        prepared([{"source": 3, "target": "b"}], tmp_path)
    with pytest.raises(DataError, match=r"no known format has the columns q, a") as fault:
        prepared([{"q": "a", "a": "b"}], tmp_path)
    assert "text_to_text (source, target)" in str(fault.value.hint)
    data = prepared([{"source": "a", "target": " "}, {"source": "a", "target": "b"}], tmp_path, train_on="all")
    assert (data.audit.rows, data.audit.dropped) == (1, 1)
    assert any("whose answer is empty" in note for note in data.audit.notes)
    assert any("dataset.train_on has no influence" in note for note in data.audit.notes)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Seq2SeqRows(DatasetSection(train="rows.jsonl"), tok, None)  # type: ignore[arg-type]


@pytest.mark.skipif("PEFTCLI_DATA_DIR" not in os.environ or "PEFTCLI_MODELS_DIR" not in os.environ, reason="needs data and models")
def test_restaurants_with_the_tokenizer_of_flan_t5() -> None:
    """All held-out rows of E2E: every target is found again in its tokens, and every one ends with EOS."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(Path(os.environ["PEFTCLI_MODELS_DIR"]) / "flan-t5-small")
    section = DatasetSection(
        train=str(Path(os.environ["PEFTCLI_DATA_DIR"]) / "e2e" / "devset.csv"), columns={"source": "mr", "target": "ref"}, max_length=128
    )  # type: ignore[arg-type]
    data = prepare(Seq2SeqRows(section, tok, 96), base_dir=Path(), seed=1)
    split, audit = data.train, data.audit
    assert isinstance(split, PairSplit)
    assert isinstance(audit, PairAudit)
    assert (audit.rows, audit.truncated, audit.dropped, audit.eos_supervised) == (4672, 0, 0, 4672)
    assert all(ids[-1] == tok.eos_token_id and not np.isin(tok.pad_token_id, ids) for ids in (*split.input_ids, *split.target_ids))
    assert tok.decode(split.target_ids[0].tolist(), skip_special_tokens=True) in audit.example[1][0]
    held_out = prepare_eval(Seq2SeqRows(section.model_copy(update={"eval": section.train}), tok, 96), base_dir=Path(), seed=1)
    assert len(held_out.generation) == 547 and sum(len(found.references) for found in held_out.generation) == 4521
