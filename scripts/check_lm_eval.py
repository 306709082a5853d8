"""Compare what `peftcli eval --tasks` hands to lm-evaluation-harness with what the harness loads by itself through stock PEFT.

    python scripts/check_lm_eval.py RUN        # in an environment with peftcli and lm-eval[hf]

RUN is the folder of a finished run over a causal language model, of a method that stock PEFT knows. The harness's log-likelihoods of a few
continuations and its greedy answers must be the same both ways; a task of a local file must be found, measured and shown. Nothing is
downloaded. Exit code 1 where something differs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM

from peftcli.commands.harness import Harness
from peftcli.result import Result, open_result

QUESTIONS = {
    "The capital of France is": [" Paris", " Rome", " a small village in the north"],
    "2 + 2 =": [" 4", " 5", " 22"],
    "To boil an egg you need": [" water", " sand", " a violin"],
}
TASK = """\
task: peftcli_check
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_target: 0
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
# Largest difference of a float32 log-likelihood of some tokens that is rounding.
ROUNDING = 1e-3


def answers(lm: HFLM) -> tuple[list[float], list[str]]:
    """Log-likelihoods of the continuations, and greedy continuations."""
    pairs = [(question, choice) for question, choices in QUESTIONS.items() for choice in choices]
    likelihoods = lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    written = lm.generate_until([SimpleNamespace(args=(question, dict(settings))) for question in QUESTIONS], disable_tqdm=True)
    return [value for value, _ in likelihoods], written


def by_itself(result: Result, **more: Any) -> HFLM:
    """As the harness loads a model."""
    return HFLM(pretrained=str(result.base.source.location), tokenizer=result.base.tokenizer, dtype="float32", device="cpu", **more)


def main() -> None:
    result = open_result(Path(sys.argv[1]), dtype="float32")
    result.model.tie_weights = lambda *_, **__: None
    ours, written = answers(HFLM(pretrained=result.model, tokenizer=result.base.tokenizer, batch_size=4))
    theirs, written_theirs = answers(by_itself(result, peft=str(result.weights), batch_size=1))
    base, _ = answers(by_itself(result, batch_size=1))
    worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    moved = max(abs(one - other) for one, other in zip(ours, base, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"question": question, "choices": choices} for question, choices in QUESTIONS.items()]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (Path(folder) / "check.yaml").write_text(TASK.format(file=Path(folder) / "rows.jsonl"), encoding="utf-8")
        found = Harness(("peftcli_check",), 0, Path(folder), False).measure(result, 4, None)
    print(f"largest difference of {len(ours)} log-likelihoods to stock PEFT: {worst:.2e}; to the base model: {moved:.2e}")
    print(f"greedy answers equal: {written == written_theirs}; accuracy of the local task: {found['peftcli_check']['acc,none']:.3f}")
    if worst > ROUNDING or moved <= ROUNDING or written != written_theirs:
        sys.exit(1)


if __name__ == "__main__":
    main()
