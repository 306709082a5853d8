"""Published datasets through real tokenizers: counts, masks and the faults that such files carry."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_tokenizer

from peftcli.data.labelled_rows import ClassAudit, LabelledRows
from peftcli.data.prepare import Prepared, prepare
from peftcli.data.splits import Split
from peftcli.data.text_rows import TextRows
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

Load = Callable[[str], Any]


def run(tokenizer: Any, **section: Any) -> Prepared:
    return prepare(TextRows(DatasetSection(**section), tokenizer), base_dir=Path(), seed=42)


def learned(split: Split, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids[mask]) for ids, mask in zip(split.input_ids, split.supervised, strict=True)]


def test_gsm8k_as_prompt_and_completion(real_data: Path, load_model_tokenizer: Load) -> None:
    tokenizer = load_model_tokenizer("smollm2-135m")
    found = run(
        tokenizer,
        train=str(real_data / "gsm8k" / "train.jsonl"),
        eval=str(real_data / "gsm8k" / "test.jsonl"),
        columns={"prompt": "question", "completion": "answer"},
        limit=500,
        eval_limit=50,
    )
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:500]]
    assert learned(found.train, tokenizer) == [row["answer"] + "<|im_end|>" for row in rows]
    assert found.train.counts.supervised_tokens == sum(len(tokenizer(row["answer"])["input_ids"]) + 1 for row in rows)
    assert found.train.counts.tokens == found.train.counts.supervised_tokens + sum(
        len(tokenizer(row["question"])["input_ids"]) for row in rows
    )
    assert (found.audit.eos_supervised, found.train.counts.truncated, found.train.counts.dropped) == (500, 0, 0)
    assert found.eval is not None and len(found.eval.generation) == 50
    assert "####" in found.eval.generation[0].reference


def test_gsm8k_through_the_chat_template(real_data: Path, load_model_tokenizer: Load) -> None:
    tokenizer = load_model_tokenizer("minimind2-small")
    found = run(
        tokenizer,
        train=str(real_data / "gsm8k" / "train.jsonl"),
        format="alpaca",
        columns={"instruction": "question", "output": "answer"},
        limit=200,
        eval_fraction=0.1,
        eval_limit=100,
    )
    assert found.eval is not None
    assert (found.train.counts.rows, found.eval.counts.rows) == (200, 100)
    example = found.eval.generation[0]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": example.prompt}], add_generation_prompt=True, return_dict=False)
    assert example.prompt_ids == asked


def test_alpaca_counts_its_empty_answers(real_data: Path, load_model_tokenizer: Load) -> None:
    tokenizer = load_model_tokenizer("smollm2-135m")
    path = real_data / "alpaca" / "alpaca_data.json.gz"
    found = run(tokenizer, train=str(path), limit=1500)
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        rows = json.load(stream)[:1500]
    empty = [f"{path}[{index}]" for index, row in enumerate(rows) if not row["output"].strip()]
    assert found.train.dropped_origins == empty and len(empty) == 3
    assert found.train.counts.rows == found.audit.eos_supervised == 1500 - 3
    assert learned(found.train, tokenizer) == [row["output"] + "<|im_end|>" for row in rows if row["output"].strip()]


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json"])
def test_alpaca_demos_without_a_template_use_the_stanford_text(name: str, real_data: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    found = run(tokenizer, train=str(real_data / "formats" / name), limit=30, max_length=4096, truncation="error")
    rows = json.loads((real_data / "formats" / name).read_text("utf-8"))[:30]
    assert learned(found.train, tokenizer) == [row["output"] + "</s>" for row in rows]
    assert tokenizer.decode(found.train.input_ids[0]).startswith("<s>Below is an instruction that describes a task.")


def test_chinese_folder(real_data: Path, load_model_tokenizer: Load) -> None:
    tokenizer = load_model_tokenizer("minimind2-small")
    found = run(tokenizer, train=str(real_data / "alpaca-zh"), limit=100)
    assert learned(found.train, tokenizer)[1] == "三原色是红色、蓝色和黄色。<|im_end|>"
    assert any("LICENSE, SOURCE.txt" in note for note in found.audit.notes)


def test_plain_text(real_data: Path, load_model_tokenizer: Load) -> None:
    tokenizer = load_model_tokenizer("minimind2-small")
    wiki = run(tokenizer, train=str(real_data / "formats" / "wiki_demo.txt"), truncation="split")
    assert wiki.train.counts.longest == 1024 and wiki.train.counts.truncated == 0
    assert sum(wiki.train.lengths) == len(tokenizer((real_data / "formats" / "wiki_demo.txt").read_text("utf-8"))["input_ids"]) + 1
    c4 = run(tokenizer, train=str(real_data / "formats" / "c4_demo.jsonl"), limit=20, truncation="drop")
    assert c4.train.counts.rows + c4.train.counts.dropped == 20


def test_tool_calls_are_rendered_or_refused(real_data: Path, load_model_tokenizer: Load) -> None:
    path = str(real_data / "formats" / "glaive_toolcall_en_demo.json")
    tokenizer = load_model_tokenizer("minimind2-small")
    found = run(tokenizer, train=path, limit=20, max_length=8192, truncation="error")
    rows = json.loads(Path(path).read_text("utf-8"))[:20]
    for text, row in zip(learned(found.train, tokenizer), rows, strict=True):
        roles = [message["from"] for message in row["conversations"]]
        assert text.count("<|im_end|>") == roles.count("gpt") + roles.count("function_call")
        assert text.count("<tool_call>\n{") == roles.count("function_call")
    with pytest.raises(DataError, match=r"glaive_toolcall_en_demo.json\[0\]: it has tools, and the chat template renders none"):
        run(load_model_tokenizer("smollm2-135m"), train=path, limit=20)


def test_preference_files_are_refused(real_data: Path) -> None:
    with pytest.raises(DataError, match="preference pairs"):
        run(byte_tokenizer(), train=str(real_data / "formats" / "dpo_en_demo.json"))
    with pytest.raises(DataError, match="column 'label'"):
        run(byte_tokenizer(), train=str(real_data / "formats" / "kto_en_demo.json"))


def test_csv_and_nested_rows(real_data: Path) -> None:
    tokenizer = byte_tokenizer()
    found = run(tokenizer, train=str(real_data / "e2e" / "trainset.csv.gz"), columns={"prompt": "mr", "completion": "ref"}, limit=100)
    assert found.train.counts.rows == 100 and found.train.origins[0].endswith("trainset.csv.gz:2")
    with pytest.raises(DataError, match="no known format has the columns id, name, instruction, instances, is_classification"):
        run(tokenizer, train=str(real_data / "self-instruct" / "seed_tasks.jsonl"))


def test_latin1_file_is_refused_with_the_line(real_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "trec.txt"
    copy.write_bytes((real_data / "trec" / "TREC.train").read_bytes())
    with pytest.raises(DataError, match=r"trec.txt:\d+: byte 0x[0-9A-F]{2} \(byte \d+ of the line\) is not UTF-8(.|\n)*encoding: latin-1"):
        run(byte_tokenizer(), train=str(copy))


def labelled(**section: Any) -> Prepared:
    return prepare(LabelledRows(DatasetSection(**section), byte_tokenizer(), None, None), base_dir=Path(), seed=42)


def audited(found: Prepared) -> ClassAudit:
    assert isinstance(found.audit, ClassAudit)
    return found.audit


def test_cola_has_no_header(real_data: Path) -> None:
    header = ["source", "label", "star", "text"]
    files = {
        split: {"path": str(real_data / "cola" / f"in_domain_{name}.tsv"), "header": header}
        for split, name in (("train", "train"), ("eval", "dev"))
    }
    found = labelled(**files)
    assert found.eval is not None
    assert (found.train.counts.rows, found.eval.counts.rows) == (8551, 527) and audited(found).problem == "single_label"
    assert audited(found).labels == {"0": 2528, "1": 6023} and found.train.origins[0].endswith("in_domain_train.tsv:1")
    with pytest.raises(DataError, match=r"the first line must name each column once(.|\n)*header: \[text, label\]"):
        labelled(train=str(real_data / "cola" / "in_domain_train.tsv"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_stsb_has_no_header_and_numbers_for_labels(real_data: Path, language: str) -> None:
    path = real_data / "stsb" / f"stsb-{language}-train.csv"
    found = labelled(train={"path": str(path), "header": ["text", "text_pair", "label"]})
    assert found.train.counts.rows == 5749 and audited(found).problem == "regression" and audited(found).target_range == (0.0, 5.0)


def test_trec_is_taken_apart_by_a_pattern(real_data: Path) -> None:
    source = {
        "path": str(real_data / "trec" / "TREC.train"),
        "pattern": r"(?P<label>\w+):(?P<fine>\w+) (?P<text>.*)",
        "encoding": "latin-1",
    }
    found = labelled(train=source, eval={**source, "path": str(real_data / "trec" / "TREC.test")})
    assert found.train.counts.rows == 5452 and sorted(audited(found).labels) == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert found.eval is not None and found.eval.counts.rows == 500
    assert found.audit.duplicates > 0 and found.audit.leaked_rows > 0, "TREC repeats questions, in the test file too"
    fine = labelled(train={**source, "columns": {"label": "fine"}})
    assert len(audited(fine).labels) == 47
    with pytest.raises(DataError, match=r"TREC.train:66: byte 0xF0 \(byte 60 of the line\) is not UTF-8"):
        labelled(train={**source, "encoding": "utf-8"})
    skipping = labelled(train={**source, "encoding": "utf-8"}, on_error="skip")
    assert skipping.train.counts.rows == 5451 and skipping.train.counts.dropped == skipping.audit.skipped == 1
    assert skipping.skipped == [(source["path"] + ":66", "byte 0xF0 (byte 60 of the line) is not UTF-8")]


def test_rte_and_sst2(real_data: Path) -> None:
    pair = labelled(train=str(real_data / "rte" / "train.tsv"), columns={"text": "sentence1", "text_pair": "sentence2"})
    assert pair.train.counts.rows == 2490 and list(audited(pair).labels) == ["entailment", "not_entailment"]
    single = labelled(
        train=str(real_data / "sst2" / "train.tsv.gz"), eval=str(real_data / "sst2" / "dev.tsv"), columns={"text": "sentence"}, limit=3000
    )
    assert single.train.counts.rows == 3000 and single.eval is not None and single.eval.counts.rows == 872


def test_a_dot_leads_into_a_column(real_data: Path, load_model_tokenizer: Load) -> None:
    path = real_data / "self-instruct" / "seed_tasks.jsonl"
    columns = {"instruction": "instruction", "input": "instances.0.input", "output": "instances.0.output"}
    tokenizer = load_model_tokenizer("smollm2-135m")
    found = run(tokenizer, train=str(path), columns=columns, max_length=4096, truncation="error")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert learned(found.train, tokenizer) == [row["instances"][0]["output"] + "<|im_end|>" for row in rows]
    with pytest.raises(DataError, match=r"there is no column 'instances.7.output'"):
        run(tokenizer, train=str(path), columns={**columns, "output": "instances.7.output"})


def test_restaurants_have_many_answers_to_one_question(real_data: Path) -> None:
    files = {"train": str(real_data / "e2e" / "trainset.csv.gz"), "eval": str(real_data / "e2e" / "devset.csv")}
    found = run(byte_tokenizer(), **files, columns={"prompt": "mr", "completion": "ref"}, limit=2000, eval_limit=200)
    assert (found.audit.leaked_rows, found.audit.leaked_inputs) == (0, 0)
    held = run(byte_tokenizer(), train=files["eval"], columns={"prompt": "mr", "completion": "ref"}, limit=400, eval_fraction=0.1)
    assert held.audit.leaked_inputs > 0 == held.audit.leaked_rows
    assert any("ask what a training row asks, word for word, with another answer" in note for note in held.audit.notes)
