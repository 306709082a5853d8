"""What each method can do, found by doing it on tiny random models of every family: nothing here is believed, not even ``caps``.

``python -m peftcli.probe --write`` brings ``capabilities.json`` up to date, from which `peftcli methods` and the README's table are made;
a method from outside the package is probed when it is asked for.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftcli.errors import PeftcliError
from peftcli.kernels import attention
from peftcli.merge import merge
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.model.load import quantize

__all__ = ["FAMILIES", "Capabilities", "Family", "capabilities", "probe", "stored", "stored_text"]

FILE = Path(__file__).with_name("capabilities.json")
_VOCABULARY, _SEED = 264, 7
# Largest difference of two float64 logits, relative to the largest logit, that is rounding.
_MERGED = 1e-9


@dataclass(frozen=True)
class Family:
    """An architecture to try methods on.

    Attributes:
        title: of the family, for a table's head.
        auto_model, config: names of classes of transformers.
        tiny: the config's values for a model that is probed with real numbers.
        real: those of a well-known model, called ``real_name``, whose parameters are counted without weights.
    """

    title: str
    auto_model: str
    config: str
    tiny: dict[str, Any]
    real_name: str
    real: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LLaMA",
        "AutoModelForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
        },
        "Llama-3.2-1B",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        },
    ),
    "gpt2": Family(
        "GPT-2",
        "AutoModelForCausalLM",
        "GPT2Config",
        {
            "vocab_size": _VOCABULARY, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1,
        },
        "GPT-2 (124M)",
        {},
    ),
    "bert": Family(
        "BERT",
        "AutoModelForSequenceClassification",
        "BertConfig",
        {
            "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 256, "num_labels": 3, "initializer_range": 0.1,
        },
        "BERT-base",
        {},
    ),
    "t5": Family(
        "T5",
        "AutoModelForSeq2SeqLM",
        "T5Config",
        {
            "vocab_size": _VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "T5-small",
        {"decoder_start_token_id": 0},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Capabilities:
    """What a method was seen to do with its default options.

    Attributes:
        families: by family, ``None`` where it was applied, ran, and every trained parameter got a gradient; else why not.
        nf4: the same over an NF4 base, for the families that it works on.
        mergeable: ``None`` where the merged model has the base's kinds of layers and its logits in every family that it works on; else why
            not.
        trained, parameters: numbers trained and of the base, on the model called ``counted_on``.
    """

    families: dict[str, str | None]
    nf4: dict[str, str | None]
    mergeable: str | None
    trained: int
    parameters: int
    counted_on: str

    @property
    def share(self) -> float:
        """Trained numbers for each of the base's."""
        return self.trained / self.parameters

    @property
    def works_on(self) -> list[str]:
        """The families without a reason against them."""
        return [name for name, reason in self.families.items() if reason is None]

    @property
    def works_over_nf4(self) -> list[str]:
        """The families that it trains on with an NF4 base."""
        return [name for name, reason in self.nf4.items() if reason is None]


def capabilities(name: str) -> Capabilities:
    """What is stored of the method called ``name``, or, for one from outside the package, what a probe finds.

    Raises:
        UsageError: there is no such method.
    """
    registry.get(name)
    return stored().get(name) or probe(name)


@lru_cache(maxsize=1)
def stored() -> dict[str, Capabilities]:
    """The shipped results by method."""
    return {name: Capabilities(**facts) for name, facts in json.loads(FILE.read_text(encoding="utf-8")).items()}


def stored_text() -> str:
    """What the shipped file should hold: a fresh probe of every registered method."""
    own = [name for name in registry.names() if registry.get(name).__module__.startswith(f"{__package__}.")]
    found = {name: asdict(probe(name)) for name in own}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def probe(name: str) -> Capabilities:
    """Try the method called ``name`` on every family, dense and over NF4, merge it, and count what it trains."""
    cls = registry.get(name)
    kind = cls.recommended.get("base_model.quantization")
    families = {family: _tried(name, family, str(kind) if kind else None) for family in FAMILIES}
    works = [family for family, reason in families.items() if reason is None]
    first = works[0] if works else next(iter(FAMILIES))
    trained, parameters = _count(name, first)
    refusal = None if cls.caps.quantized_base else "it trains the base's weights, and quantized ones cannot be trained"
    nf4 = {family: refusal or _tried(name, family, "nf4") for family in works}
    return Capabilities(families, nf4, _merged(name, works), trained, parameters, FAMILIES[first].real_name)


def _method(name: str) -> Method[Any]:
    cls = registry.get(name)
    return cls(cls.Config.model_validate({"name": name}))


@lru_cache(maxsize=len(FAMILIES))
def _template(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return _build(family, FAMILIES[family].tiny).float().eval()


def _build(family: str, values: dict[str, Any]) -> Any:
    import transformers

    facts = FAMILIES[family]
    config = getattr(transformers, facts.config)(**values)
    # As :func:`peftcli.model.load.load_base` does.
    ours = facts.auto_model in ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    return getattr(transformers, facts.auto_model).from_config(config, attn_implementation=attention.register() if ours else None)


def _tiny(family: str, quantization: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = copy.deepcopy(_template(family)).to(dtype)
    model.requires_grad_(False)
    if quantization is not None:
        quantize(model, quantization, double=True, compute_dtype=dtype, device=torch.device("cpu"))
    return model


def _adapted(name: str, family: str, quantization: str | None = None) -> Any:
    """A tiny model with the method, every trained parameter moved away from its initial value."""
    model = _method(name).apply(_tiny(family, quantization), Context(_SEED, frozen_quantized=quantization is not None))
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def _logits(model: Any) -> Tensor:
    ids = torch.randint(4, _VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(_SEED))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    logits: Tensor = model(**inputs).logits
    return logits


def _tried(name: str, family: str, quantization: str | None) -> str | None:
    """Why the method does not train on the family, or ``None`` where it does."""
    try:
        model = _adapted(name, family, quantization)
        _logits(model).float().pow(2).mean().backward()
    except PeftcliError as error:
        return error.message
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        return "nothing is trained"
    dead = [key for key, parameter in trained.items() if parameter.grad is None or not bool(parameter.grad.any())]
    return f"no gradient reaches {len(dead)} of {len(trained)} trained parameters, such as {dead[0]}" if dead else None


def _merged(name: str, works: list[str]) -> str | None:
    """Why the method cannot be folded into the base without a trace, or ``None``."""
    if registry.get(name).caps.whole_model:
        return "the result is a whole model already"
    if not works:
        return "it works on no family"
    for family in works:
        model = _adapted(name, family).double()
        with torch.no_grad():
            before = _logits(model)
            try:
                merged = merge(model)
            except (PeftcliError, NotImplementedError) as error:
                return str(getattr(error, "message", "")) or "its layers have no dense twin"
            more = _kinds(merged) - _kinds(_tiny(family))
            if more:
                return f"what it adds cannot be folded into the weights: {', '.join(sorted(more))} would stay"
            after = _logits(merged)
        if float((after - before).abs().max()) > _MERGED * max(1.0, float(before.abs().max())):
            return f"the merged {FAMILIES[family].title} model computes something else"
    return None


def _kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _count(name: str, family: str) -> tuple[int, int]:
    """(trained numbers, the base's numbers) on the family's real model, built of shapes without numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _build(family, FAMILIES[family].real)
        parameters = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        model = _method(name).apply(model, Context(_SEED))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), parameters


def main(arguments: list[str]) -> int:
    """Compare the shipped file with a fresh probe, or renew it (``--write``); exit code 1 says that it is out of date."""
    text = stored_text()
    if "--write" in arguments:
        FILE.write_text(text, encoding="utf-8")
        return 0
    current = FILE.is_file() and FILE.read_text(encoding="utf-8") == text
    if not current:
        sys.stderr.write("capabilities.json is out of date: python -m peftcli.probe --write\n")
    return int(not current)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
