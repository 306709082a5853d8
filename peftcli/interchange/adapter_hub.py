"""Adapter files of AdapterHub's ``adapters`` library, for the bottleneck adapters that both know: Houlsby (``double_seq_bn``), Pfeiffer
(``seq_bn``) and parallel (``par_bn``), in its own layout (``adapter_config.json`` and ``adapter.safetensors``).

Its other file, ``pytorch_adapter.bin``, is a pickle, which can run code; it is not read. Save with ``use_safetensors=True`` there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from peftcli.errors import CheckpointError, UsageError
from peftcli.interchange import hf_peft
from peftcli.methods import registry

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
# The version of the library whose files these are.
VERSION = "adapters.1.3.0"
_PREFIX = "base_model.model."
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ACTIVATIONS = {"silu": "swish", "relu": "relu", "gelu": "gelu", "tanh": "tanh"}
_PARTS = {
    "adapter_down.weight": "adapter_down.0.weight",
    "adapter_down.bias": "adapter_down.0.bias",
    "adapter_up.weight": "adapter_up.weight",
    "adapter_up.bias": "adapter_up.bias",
}
# What the library's configuration says of each variant, and what all three share.
_VARIANTS: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "is_parallel": False, "original_ln_before": False},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "is_parallel": False, "original_ln_before": True},
    "parallel": {"mh_adapter": False, "output_adapter": True, "is_parallel": True, "original_ln_before": False},
}
_DEFAULTS: dict[str, tuple[float, str, float]] = {"houlsby": (16, "silu", 1.0), "pfeiffer": (16, "relu", 1.0), "parallel": (2, "relu", 4.0)}
_COMMON: dict[str, Any] = {
    "original_ln_after": True, "ln_before": False, "ln_after": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "use_gating": False, "inv_adapter": None, "inv_adapter_reduction_factor": None, "cross_adapter": False, "phm_layer": False,
    "stochastic_depth": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class _Names:
    """Ends of the names of our adapters' modules in a family, and of the library's for the same places."""

    attention: tuple[str, str]
    forward: Mapping[str, str]
    forward_there: str

    def pairs(self, variant: str) -> list[tuple[str, str]]:
        """(ours, theirs); attention first, because in BERT its name ends like the other's."""
        return [*([self.attention] if variant == "houlsby" else []), (self.forward[variant], self.forward_there)]


_LLAMA = _Names(
    ("self_attn.o_proj", "attention_adapters"), {"houlsby": "mlp.down_proj", "pfeiffer": "mlp", "parallel": "mlp"}, "output_adapters"
)
_GPT2 = _Names(("attn.c_proj", "attention_adapters"), {"houlsby": "mlp.c_proj", "pfeiffer": "mlp", "parallel": "mlp"}, "output_adapters")
_BERT = _Names(
    ("attention.output.dense", "attention.output"),
    {"houlsby": "output.dense", "pfeiffer": "output.LayerNorm", "parallel": "output"},
    "output",
)
FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "gpt2": _GPT2, "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "electra": _BERT}


def write(folder: Path, adapter: hf_peft.AdapterFile, *, model_type: str, hidden_size: int, model_class: str, name: str) -> list[Path]:
    """Write an adapter of ours in the library's layout; returns the two paths.

    Args:
        adapter: of the method ``adapter``, as :func:`hf_peft.read_adapter` gives it.
        model_type, hidden_size, model_class: of the base model (its ``config.json`` and class).
        name: of the adapter there.

    Raises:
        UsageError: the file holds something that the library has no place for.
    """
    options = adapter.method.config
    if options.name != "adapter":
        raise UsageError(f"{adapter.folder}: {options.name} is no bottleneck adapter; only those go into files of the adapters library")
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} cannot name an adapter; allowed: letters, digits, _ and -")
    pairs = _family(model_type).pairs(options.variant)
    factor, activation, scaling = _DEFAULTS[options.variant]
    tensors, narrow = {}, set()
    for key, tensor in adapter.tensors.items():
        place, part = _split(key.removeprefix(_PREFIX), list(_PARTS))
        there = next((f"{place.removesuffix(ours)}{theirs}" for ours, theirs in pairs if f".{place}".endswith(f".{ours}")), None)
        if part is None or there is None:
            raise UsageError(f"{adapter.folder}: {key} has no place in a file of the adapters library")
        tensors[f"{there}.adapters.{name}.{_PARTS[part]}"] = tensor.contiguous()
        if part == "adapter_down.weight":
            narrow.add(len(tensor))
    if len(narrow) != 1:
        raise UsageError(f"{adapter.folder}: bottlenecks of several widths cannot be written; found {sorted(narrow)}")
    width = narrow.pop()
    # The library takes the floor of a floating-point quotient: 32 // (32 / 5) is 4.
    exact = options.bottleneck_size is None and int(hidden_size // (options.reduction_factor or factor)) == width
    factor = (options.reduction_factor or factor) if exact else hidden_size / width
    factor = factor if int(hidden_size // factor) == width else hidden_size / (width + 0.5)
    config = {
        **_COMMON,
        **_VARIANTS[options.variant],
        "reduction_factor": factor,
        "non_linearity": _ACTIVATIONS[options.non_linearity or activation],
        "scaling": float(options.scaling or scaling),
        "dropout": options.dropout,
        "init_weights": "mam_adapter" if options.init_weights == "zero" else "houlsby",
        "leave_out": [],
    }
    whole = {
        "config": config,
        "hidden_size": hidden_size,
        "model_class": model_class,
        "model_name": adapter.base_model,
        "model_type": model_type,
        "name": name,
        "version": VERSION,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / CONFIG, folder / WEIGHTS]


def is_theirs(folder: Path) -> bool:
    """Whether a folder's ``adapter_config.json`` is the library's and not PEFT's.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    fields = hf_peft.read_config(folder / CONFIG)
    return "peft_type" not in fields and isinstance(fields.get("config"), dict)


def read(folder: Path) -> hf_peft.AdapterFile:
    """Read an adapter of the library; :func:`hf_peft.apply_adapter` puts it to work.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter computes something that ours do not.
    """
    path = folder / CONFIG
    whole = hf_peft.read_config(path)
    config, name = whole.get("config"), whole.get("name")
    if not isinstance(config, dict) or not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise CheckpointError(f"{path} is no adapter's config of the adapters library")
    variant = next((v for v, fields in _VARIANTS.items() if all(config.get(key) == value for key, value in fields.items())), None)
    if variant is None or config.get("architecture") is not None:
        raise CheckpointError(f"{path}: this architecture is not known here; known: double_seq_bn (houlsby), seq_bn (pfeiffer), par_bn")
    for key, value in _COMMON.items():
        # Where the library leaves a residual out of a norm only matters where it adds such a norm.
        if config.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} = {config[key]!r} is not supported; allowed: {value!r}")
    activation = next((ours for ours, theirs in _ACTIVATIONS.items() if theirs == config.get("non_linearity")), None)
    scaling = config.get("scaling", 1.0)
    if activation is None or not isinstance(scaling, (int, float)):
        raise CheckpointError(f"{path}: non_linearity {config.get('non_linearity')!r} with scaling {scaling!r} is not supported")
    pairs = _family(str(whole.get("model_type"))).pairs(variant)
    tensors = {}
    if not (folder / WEIGHTS).is_file() and (folder / "pytorch_adapter.bin").is_file():
        raise CheckpointError(
            f"{folder / WEIGHTS} is missing; pytorch_adapter.bin is a pickle, which can run code and is not read",
            hint="save it again with save_adapter(..., use_safetensors=True).",
        )
    for key, tensor in hf_peft.read_tensors(folder / WEIGHTS).items():
        owner, part = _split(key, list(_PARTS.values()))
        place = owner.removesuffix(f".adapters.{name}")
        ours = next((f"{place.removesuffix(theirs)}{end}" for end, theirs in pairs if f".{place}".endswith(f".{theirs}")), None)
        if part is None or ours is None or place == owner:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is not known here")
        mine = next(here for here, there in _PARTS.items() if there == part)
        tensors[f"{_PREFIX}{ours}.{mine}"] = tensor
    cls = registry.get("adapter")
    places = sorted({key.removeprefix(_PREFIX).rpartition(".adapter_")[0] for key in tensors})
    widths = {len(tensor) for key, tensor in tensors.items() if key.endswith(".adapter_down.weight")}
    if len(widths) != 1:
        raise CheckpointError(f"{folder / WEIGHTS}: bottlenecks of several widths are not known here; found {sorted(widths)}")
    options = {
        "name": "adapter", "variant": variant, "bottleneck_size": widths.pop(), "non_linearity": activation, "scaling": scaling,
        "dropout": config.get("dropout", 0.0), "target_modules": places,
    }  # fmt: skip
    try:
        method = cls(cls.Config.model_validate(options))
    except ValueError as error:
        raise CheckpointError(f"{path} is not sound: {error}") from None
    return hf_peft.AdapterFile(folder, {"base_model_name_or_path": whole.get("model_name")}, tensors, method)


def _family(model_type: str) -> _Names:
    if model_type not in FAMILIES:
        raise UsageError(f"models of type {model_type!r} cannot be exchanged with the adapters library; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _split(key: str, parts: list[str]) -> tuple[str, str | None]:
    """(what stands in front, the part) of a key that ends in one of ``parts``."""
    part = next((part for part in parts if key.endswith(f".{part}")), None)
    return (key.removesuffix(f".{part}") if part else key), part
