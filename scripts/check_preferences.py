"""Compare the preference tasks with TRL, in an environment of its own:

    python scripts/check_preferences.py FOLDER [--write]

makes (or finds) the environment FOLDER/trl, gives both sides the same tiny policy, reference and rows as text, lets TRL's own trainers
tokenize, batch and judge them, and compares loss, rewards and the gradients of all parameters. `--write` records the result in
scripts/results/preferences.json. The exit code is 1 where a difference is above its limit.

ORPO's TRL trainer averages the better answers' loss over the tokens of a batch; here every pair counts as one, so it gets batches of
one pair. TRL's KTO takes its unrelated answers from within a batch, so it gets one batch of all rows.

Needs a package index, so it is no part of `make test`; the tests compare with the same formulas, written out.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from peftcli.data.prepare import prepare
from peftcli.data.splits import Split
from peftcli.kernels import attention
from peftcli.recipe.load import parse_recipe
from peftcli.tasks import registry
from peftcli.tasks.base import Layout

HERE = Path(__file__).parent
RESULT = HERE / "results" / "preferences.json"
PINS = ["torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0"]
LIMIT = 1e-5  # float32
PAIRS = [
    {"prompt": "Name a colour. ", "chosen": "Green, as grass.", "rejected": "A horse"},
    {"prompt": "2 + 2? ", "chosen": "4", "rejected": "It may be five, or perhaps not."},
    {"prompt": "Is water wet? ", "chosen": "Yes, it is.", "rejected": "no"},
    {"prompt": "Greet me. ", "chosen": "Hello there!", "rejected": "Go away, you."},
]
MARGINS = [{**row, "margin": margin} for row, margin in zip(PAIRS, (0.5, 0.0, 1.0, 0.25), strict=True)]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row, kind in zip(PAIRS, ("chosen", "rejected", "rejected", "chosen"), strict=True)
]


def case(task: str, trainer: str, module: str, theirs: dict[str, Any], **other: Any) -> dict[str, Any]:
    """How both sides are told the same: our ``task`` section, and TRL's trainer with its options."""
    found = {"task": task, "trainer": trainer, "module": module, "options": theirs, "rows": PAIRS, "batch": 4, "reference": False}
    return {**found, "train_on": "completions", **other}


def dpo(loss: str, **more: Any) -> dict[str, Any]:
    ours = ", ".join(f"{key}: {value}" for key, value in {"loss_type": loss, "beta": 0.3, **more}.items())
    theirs = {"loss_type": [loss], "beta": 0.3, "max_length": None, **more}
    return case(f"{{name: dpo, {ours}}}", "DPO", "trl", theirs, reference=True)


def kto(**weights: float) -> dict[str, Any]:
    ours = "".join(f", {key}: {value}" for key, value in weights.items())
    theirs = {"beta": 0.3, "max_length": None, **weights}
    return case(f"{{name: kto, beta: 0.3{ours}}}", "KTO", "trl", theirs, rows=JUDGED, reference=True)


def scored(margins: bool, coefficient: float | None) -> dict[str, Any]:
    rows = MARGINS if margins else PAIRS
    whole = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]
    theirs = [{**text, **({"margin": row["margin"]} if margins else {})} for text, row in zip(whole, MARGINS, strict=True)]
    ours = f"{{name: reward, center_rewards_coefficient: {'null' if coefficient is None else coefficient}}}"
    options = {"max_length": None, "center_rewards_coefficient": coefficient}
    return case(ours, "Reward", "trl", options, rows=theirs, own=rows)


CASES = {
    "dpo-sigmoid": dpo("sigmoid"),
    "dpo-hinge": dpo("hinge"),
    "dpo-ipo": dpo("ipo"),
    "dpo-robust": dpo("robust", label_smoothing=0.1),
    "orpo": case("{name: orpo, beta: 0.3}", "ORPO", "trl.experimental.orpo", {"beta": 0.3, "max_length": 512}, batch=1, train_on="all"),
    "simpo": case(
        "{name: simpo, beta: 2.0, gamma: 0.7}",
        "CPO",
        "trl.experimental.cpo",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7, "max_length": 512},
    ),
    "kto": kto(),
    "kto-weights": kto(desirable_weight=1.5, undesirable_weight=0.5),
    "reward": scored(False, None),
    "reward-margin-centred": scored(True, 0.01),
}


def run(python: Path, *arguments: str) -> str:
    """What an interpreter of another environment prints."""
    done = subprocess.run([str(python), *arguments], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own scripts
    return done.stdout


def environment(root: Path) -> Path:
    """The interpreter of ``root/trl``, made with the pinned packages where it does not exist."""
    python = root / "trl" / "bin" / "python"
    if not python.is_file():
        venv.create(root / "trl", with_pip=True)
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS)
    return python


def tokenizer() -> Any:
    """Bytes, an end and a padding token; no BOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", "<pad>", *letters])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")  # noqa: S106 - no secret


def build(folder: Path) -> tuple[Any, Any, Any]:
    """Reference, policy (the reference moved) and scorer, saved for the other side."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    base = AutoModelForCausalLM.from_config(LlamaConfig(**settings), attn_implementation=attention.register())
    policy = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    config = LlamaConfig(**settings)
    config.num_labels = 1
    scorer = LlamaForSequenceClassification(config)
    for name, model in (("base", base), ("policy", policy), ("scorer", scorer)):
        model.save_pretrained(folder / name)
    return base, policy, scorer


def ours(folder: Path, facts: Mapping[str, Any], base: Any, policy: Any, scorer: Any) -> dict[str, Tensor]:
    """Loss, rewards and gradients as a run of peftcli computes them."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in facts.get("own", facts["rows"])), encoding="utf-8")
    recipe = parse_recipe(
        f"base_model: x\nmethod: full\ntask: {facts['task']}\ndataset: {{train: {rows}, train_on: {facts['train_on']}}}\n", "recipe.yaml"
    ).recipe
    task = registry.make(recipe.task)
    split: Split = prepare(task.rows(recipe.dataset, tokenizer()), base_dir=folder, seed=0).train
    model, everything = (scorer if facts["trainer"] == "Reward" else policy), range(len(facts["rows"]))
    layout = Layout(task.packs(model, 264, max(split.lengths)), 1)
    if task.has_reference:
        with torch.no_grad():
            split = task.with_base(split, task.base_module(base).measure(task.batch(split, everything, layout)))
    model.zero_grad()
    module = task.module(model)
    loss = module(task.batch(split, everything, layout)).total / len(facts["rows"])
    loss.backward()
    with torch.no_grad():
        measured = task.together(module.measure(task.batch(split, everything, layout)))
    scores = task.scores(measured, split)
    found = {f"gradient.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"reward.{kind}": torch.tensor(scores[f"{kind}_reward"].value) for kind in ("chosen", "rejected")}
    return {"loss": loss.detach(), "loss of an evaluation": measured["loss"].mean(), **found}


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number (or of 1)."""
    return float((one.double() - other.double()).abs().max()) / max(1.0, float(other.abs().max()))


def main() -> int:
    """Compare, print a table, and say whether all differences are within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the environment and the cases are kept")
    parser.add_argument("--write", action="store_true", help=f"record the result in {RESULT.relative_to(HERE.parent)}")
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    python, folder = environment(root), root / "preferences"
    folder.mkdir(parents=True, exist_ok=True)
    parts = build(folder)
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    run(python, str(HERE / "references" / "trl_side.py"), str(folder))
    rows = []
    for name, facts in CASES.items():
        mine, theirs = ours(folder, facts, *parts), load_file(folder / f"{name}.safetensors")
        gradients = [difference(mine[key], theirs[key]) for key in theirs if key.startswith("gradient.")]
        rewards = [difference(mine[key], theirs[key]) for key in theirs if key.startswith("reward.")]
        row = {
            "case": name, "task": facts["task"], "trl": f"{facts['module']}.{facts['trainer']}Trainer", "loss": float(mine["loss"]),
            "their loss": float(theirs["loss"]), "difference": difference(mine["loss"], theirs["loss"]),
            "evaluation": difference(mine["loss of an evaluation"], theirs["loss"]),
            "gradients": max(gradients), "largest gradient": max(float(theirs[k].abs().max()) for k in theirs if k.startswith("gradient.")),
            **({"rewards": max(rewards)} if rewards else {}),
        }  # fmt: skip
        compared = [row[key] for key in ("difference", "evaluation", "gradients", "rewards") if key in row]
        row["passed"] = {k for k in mine if k.startswith("gradient.")} == {k for k in theirs if k.startswith("gradient.")} and all(
            value <= LIMIT for value in compared
        )
        rows.append(row)
        shown = ", ".join(f"{key} {row[key]:.1e}" for key in ("difference", "evaluation", "gradients", "rewards") if key in row)
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {name}: loss {row['loss']:.6f} and {row['their loss']:.6f}; {shown}")
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('trl', 'torch', 'transformers')}))"
    result = {
        "ours": {"torch": torch.__version__, "transformers": transformers.__version__},
        "reference": json.loads(run(python, "-c", code)),
        "meaning": "differences of loss (in training and in an evaluation), rewards and the gradients of all parameters, float32, in units "
        f"of the largest number compared or of 1; limit {LIMIT:g}",
        "rows": rows,
    }
    if arguments.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
