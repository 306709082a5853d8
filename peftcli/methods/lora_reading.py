"""LoRA's options from the ``adapter_config.json`` of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcli.errors import CheckpointError
from peftcli.methods.fields import module_options, refuse

# Starts that leave the base as it is: once the values are read, nothing is left of them. MiCA trains A alone, beside a B that
# is in the file like any other.
_HARMLESS = ("gaussian", "orthogonal", "eva", "mica")
# Starts that are a function of the base's weight alone, taken out of the base in training: our layers do the same.
_REPEATED = ("pissa", "olora")
_CHANGED = {
    "pissa_niter": "whose start depends on random numbers that are not in the file",
    "corda": "whose start depends on statistics of its data that are not in the file",
    "lora_ga": "whose start depends on gradients that are not in the file",
    "loftq": "which replaced the base by one of its own quantization",
}


def options_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our options (without ``name``) from PEFT's fields.

    Raises:
        CheckpointError: the file belongs to a base that was changed in a way that the file does not say, or asks for a
            variant that is not computed here.
    """
    refuse(
        fields,
        {
            "bias": ("none", "all", "lora_only", None),
            "lora_bias": (False, None),
            "megatron_config": (None,),
            "layer_replication": (None, []),
            "target_parameters": (None, []),
            "alora_invocation_tokens": (None, []),
            "use_qalora": (False, None),
            "arrow_config": (None,),
            "velora_config": (None,),
            "monteclora_config": (None,),
            "kasa_config": (None,),
            "use_bdlora": (None, False),
        },
    )
    return {
        "rank": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "dropout": fields.get("lora_dropout", 0.0),
        **module_options(fields),
        "adapt_embeddings": True,
        "use_rslora": fields.get("use_rslora", False),
        "use_dora": fields.get("use_dora") or False,
        "bias": fields.get("bias") or "none",
        "init_lora_weights": _start(fields.get("init_lora_weights", True)),
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }


def _start(value: Any) -> str:
    """Our start for PEFT's ``init_lora_weights``. It matters only where PEFT changes the base once more as it loads the file."""
    name = value.lower() if isinstance(value, str) else value
    if name is None or isinstance(name, bool) or name in _HARMLESS:
        return "default"
    if name in _REPEATED:
        return str(name)
    reason = next((why for kind, why in _CHANGED.items() if str(name).startswith(kind)), None)
    if reason is None:
        raise CheckpointError(f"the adapter started from init_lora_weights={value!r}, which is not known here")
    raise CheckpointError(
        f"the adapter started from init_lora_weights={value!r}, {reason}; without it, its values fit no base",
        hint="write it once more with stock peft: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START).",
    )
