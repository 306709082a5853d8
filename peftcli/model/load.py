"""Load the base model and its tokenizer, dense or quantized, ready to be adapted, merged and saved."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli import collector, quantization
from peftcli.errors import ModelError
from peftcli.kernels import attention
from peftcli.methods.targets import output_layers, replace
from peftcli.model.fused import fuse
from peftcli.model.heads import poolers, start_afresh, unfilled
from peftcli.model.source import Source, resolve
from peftcli.recipe.schema import BaseModelSection
from peftcli.tasks.base import Head

CAUSAL_LM, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class Opened:
    """A base model that has been found, before its weights are read.

    Attributes:
        section: of the recipe. ``source``: where it lies. ``config``: transformers' config.
        tokenizer: with a pad token and the recipe's new tokens; ``new_token_ids`` are theirs.
        dtype: of the computation. ``device``: where the weights will go.
        trust_remote_code: allowed on the command line.
    """

    section: BaseModelSection
    source: Source
    config: Any
    tokenizer: Any
    new_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool = False

    @property
    def max_positions(self) -> int | None:
        """Longest row that the model's positions allow, in tokens."""
        return max_positions(self.config)


def max_positions(config: Any) -> int | None:
    """Longest row that the positions of a model with this config allow, in tokens; ``None`` where nothing limits it."""
    value = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(value) if value and not getattr(config, "relative_attention_num_buckets", None) else None


@dataclass
class Base:
    """A loaded base model.

    Attributes:
        model: a transformers model in evaluation mode, frozen linear layers quantized where asked for.
        tokenizer: with a pad token and the recipe's new tokens.
        source: where it came from.
        dtype: of the computation.
        quantization: ``nf4``, ``fp4``, ``int8`` or ``None``.
        revision: the commit, for hub models.
        new_token_ids: ids of the tokens that the recipe added.
        parameters: number of parameters of the dense model (tied ones once).
        dense_weights: of the quantized layers as they were, by module name, where they were asked for.
        fresh: names of modules that are trained whole whatever the method: a classifier's output layer, and ``anew``: those that the base
            has no weights for.
    """

    model: Any
    tokenizer: Any
    source: Source
    dtype: torch.dtype
    quantization: str | None
    revision: str | None
    new_token_ids: tuple[int, ...]
    parameters: int
    dense_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    @property
    def max_positions(self) -> int | None:
        """Longest row that the model's positions allow, in tokens."""
        return max_positions(self.model.config)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a recipe's ``dtype`` means on ``device``; ``auto`` is bfloat16 where products in it run natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Either of these multiplies bfloat16 at least twice as fast as float32; without them it is emulated, and slower.
    probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    native = any(probe is not None and probe() for probe in probes)
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def load_tokenizer(source: Source, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies with the model; a missing pad token becomes the EOS token, as is usual."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, gguf_file=source.gguf_file, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error(source, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"base_model.name: the tokenizer of {source.name} has neither a pad token nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_apart(tokenizer: Any) -> None:
    """Where the EOS token pads too, take another special token for it: a decoder that judges texts looks for the last token that is no
    padding, and would never read an EOS. A tokenizer that has no other one, as GPT-2's, keeps it."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        named = (tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
        other = next((token for token in named if token not in (None, tokenizer.eos_token_id)), None)
        if other is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)


@collector.paused()
def open_base(
    section: BaseModelSection,
    *,
    device: torch.device | str = "cpu",
    base_dir: Path | None = None,
    trust_remote_code: bool = False,
    tokenizer_folder: Path | None = None,
) -> Opened:
    """Find what a recipe's ``base_model`` section names; read its config and its tokenizer.

    Args:
        trust_remote_code: allowed on the command line, with a pinned ``revision``; a recipe cannot ask for it.
        tokenizer_folder: take the tokenizer from here (an adapter's folder) instead of from the base.

    Raises:
        ModelError: it cannot be found or read.
    """
    if trust_remote_code and not _COMMIT.fullmatch(section.revision or ""):
        # A branch or a tag may hold other code tomorrow.
        raise ModelError(
            "remote code is only run at a pinned base_model.revision", hint="set base_model.revision to a commit of the model, 40 digits."
        )
    device = torch.device(device)
    source = resolve(section.name, base_dir)
    tokens = Source(str(tokenizer_folder), str(tokenizer_folder), None, True) if tokenizer_folder else source
    tokenizer = load_tokenizer(
        tokens, None if tokenizer_folder else section.revision, trust_remote_code=trust_remote_code and not tokenizer_folder
    )
    new = list(dict.fromkeys(section.new_tokens))
    if new:
        tokenizer.add_tokens(new)
    ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in new)
    config = load_config(source, section.revision, trust_remote_code=trust_remote_code)
    return Opened(section, source, config, tokenizer, ids, resolve_dtype(section.dtype, device), device, trust_remote_code)


def load_config(source: Source, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """The model's config, without the mark of a GGUF file's packing."""
    from transformers import AutoConfig

    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(source.location, revision=revision or "main", trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _load_error(source, "config", error) from error
    if source.gguf_file is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_base(
    opened: Opened,
    *,
    auto_model: str = CAUSAL_LM,
    head: Head | None = None,
    seed: int = 0,
    master_weights: bool = False,
    keep_dense: bool = False,
) -> Base:
    """Load the weights of a base model that :func:`open_base` found.

    Args:
        auto_model: name of the class of transformers that a task needs.
        head: the output layer to put on it; one that the base has already, of the same size, is kept.
        seed: of the initial values of a fresh output layer.
        master_weights: keep the weights in float32 although the computation is in bfloat16 (every weight is trained).
        keep_dense: keep the weights of the layers that are quantized, in ``Base.dense_weights``.

    Raises:
        ModelError: it cannot be read, lacks weights, or is no model of the kind that the task needs.
    """
    section, device, dtype = opened.section, opened.device, opened.dtype
    storage = torch.float32 if master_weights and section.quantization is None else dtype
    model, revision, anew = _load_model(opened, storage, auto_model, head)
    start_afresh(model, anew, seed)
    fresh = list(dict.fromkeys([*anew, *(poolers(model) if head is not None and head.pooler else ())]))
    parameters = sum(p.numel() for p in model.parameters())
    _make_room(model, opened.tokenizer)
    if head is not None:
        # Decoders judge a text by its last token, which they find by the padding.
        pad_apart(opened.tokenizer)
        model.config.pad_token_id = opened.tokenizer.pad_token_id
    dense: dict[str, torch.Tensor] = {}
    if section.quantization is not None:
        if keep_dense:
            layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear or _is_conv1d(module)}
            dense = {name: layer.weight.data.t() if _is_conv1d(layer) else layer.weight.data for name, layer in layers.items()}
        quantize(model, section.quantization, double=section.double_quantization, compute_dtype=dtype, device=device, keep=fresh)
    model.to(device)
    model.eval()
    fuse(model)
    # Frozen until a method says otherwise.
    model.requires_grad_(False)
    return Base(
        model,
        opened.tokenizer,
        opened.source,
        dtype,
        section.quantization,
        revision,
        opened.new_token_ids,
        parameters,
        dense,
        tuple(fresh),
        tuple(anew),
    )


@collector.paused()
def _load_model(opened: Opened, dtype: torch.dtype, auto_model: str, head: Head | None) -> tuple[Any, str | None, list[str]]:
    """(model, commit of a hub model, names of modules that the base has no weights for)."""
    import transformers

    source, revision = opened.source, opened.section.revision
    extra: dict[str, Any] = {}
    if source.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Newer versions leave GGUF weights in their blocks; training, quantizing and merging need them dense.
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if auto_model in (CAUSAL_LM, SEQ2SEQ) and opened.config.is_encoder_decoder != (auto_model == SEQ2SEQ):
        one, two = (
            ("an encoder-decoder", "continue text") if opened.config.is_encoder_decoder else ("no encoder-decoder", "turn text into text")
        )
        raise ModelError(
            f"base_model.name: {source.name} is {one} ({opened.config.model_type}); it cannot be trained to {two}",
            hint="encoder-decoders learn pairs of texts: task: seq2seq; all other language models: task: causal_lm.",
        )
    if head is not None:
        extra |= {"ignore_mismatched_sizes": True, "num_labels": len(head.labels), "problem_type": head.problem}
        extra |= {"id2label": dict(enumerate(head.labels)), "label2id": {name: index for index, name in enumerate(head.labels)}}
    try:
        with quiet(gguf=source.gguf_file is not None):
            model, info = getattr(transformers, auto_model).from_pretrained(
                source.location,
                gguf_file=source.gguf_file,
                revision=revision or "main",
                dtype=dtype,
                attn_implementation=attention.register() if auto_model == CAUSAL_LM else None,
                use_safetensors=None if source.gguf_file else True,
                trust_remote_code=opened.trust_remote_code,
                output_loading_info=True,
                **extra,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _load_error(source, "model", error) from error
    fresh, missing = unfilled(model, [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    if missing or (fresh and head is None):
        lacking = missing or sorted(info["missing_keys"])
        raise ModelError(
            f"base_model.name: {source.name} lacks {len(lacking)} weights of a {type(model).__name__}, such as {lacking[0]}",
            hint="it is probably no model of this kind; those missing weights would be random numbers.",
        )
    if head is not None and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(attention.register())  # it takes prefixes
    encoder = getattr(model.config, "is_decoder", True) is False and model.config.model_type != "gpt2"
    if auto_model == CAUSAL_LM and encoder and type(model).__name__.endswith("LMHeadModel"):
        raise ModelError(
            f"base_model.name: {source.name} is an encoder ({type(model).__name__}); it cannot be trained to continue text",
            hint="encoders classify: task: sequence_classification.",
        )
    if source.gguf_file is not None:
        forget_gguf(model)
    return model, getattr(model.config, "_commit_hash", None), fresh


def checkpoint_activations(model: Any) -> None:
    """Let ``model`` recompute activations in the backward pass, whatever the version of transformers calls it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def quiet(*, gguf: bool = False) -> Iterator[None]:
    """Load or save without the library's remarks and bars: a run has its own display. Downloads keep theirs."""
    from transformers.utils import logging as shouting

    level, bars = shouting.get_verbosity(), shouting.is_progress_bar_enabled()
    shouting.set_verbosity_error()
    shouting.disable_progress_bar()
    # The bar of GGUF files knows no switch.
    silence = contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext()
    try:
        with silence:
            yield
    finally:
        shouting.set_verbosity(level)
        if bars:
            shouting.enable_progress_bar()


def forget_gguf(model: Any) -> None:
    """Weights from a GGUF file are dense once loaded; without this transformers refuses to save them as if quantized."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        model.quantization_method = None


def _make_room(model: Any, tokenizer: Any) -> None:
    """Make room for every token of the tokenizer; fresh rows start as the mean of the others."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)


def quantize(model: Any, kind: str, *, double: bool, compute_dtype: torch.dtype, device: torch.device, keep: Sequence[str] = ()) -> None:
    """Put quantized twins in the place of all linear layers but the output layer and the modules called ``keep``, one by one on ``device``.

    Raises:
        ModelError: the model has no linear layers to quantize.
    """
    names = [name for name in quantizable(model) if not name.startswith(tuple(f"{module}." for module in keep))]
    if not names:
        raise ModelError(f"base_model.quantization: {type(model).__name__} has no linear layers that {kind} could store")
    for name in names:
        module = model.get_submodule(name)
        linear = _as_linear(module) if _is_conv1d(module) else module
        replace(model, name, quantization.quantize_linear(linear.to(device), kind, double=double, compute_dtype=compute_dtype))


def quantizable(model: Any) -> list[str]:
    """Dotted names of the linear layers that :func:`quantize` stores in a few bits: not the output layer, and none that the architecture
    asks to keep wide, as transformers does. T5's feed-forward blocks cast their inputs to the dtype of such a layer's weight."""
    heads = output_layers(model)
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or _is_conv1d(module))
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
        and not any(f".{part}." in f".{name}." for part in wide)
    ]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _as_linear(module: Any) -> nn.Linear:
    """GPT-2's Conv1D (weight [in, out]) as the linear layer that it is."""
    rows, columns = module.weight.shape
    linear = nn.Linear(rows, columns, device="meta")
    linear.weight, linear.bias = nn.Parameter(module.weight.data.t().contiguous()), module.bias
    linear.train(module.training)
    return linear


def _load_error(source: Source, what: str, error: Exception) -> ModelError:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if not source.is_local:
        hint = (
            "check the id and the revision, that the machine reaches the model hub (HF_HUB_OFFLINE, HF_ENDPOINT), "
            "and HF_TOKEN for gated models."
        )
    elif source.gguf_file is not None:
        hint = "GGUF files need the `gguf` package and an architecture that transformers can read."
    else:
        hint = "the folder must hold config.json, tokenizer files and *.safetensors weights (pickled weights are not loaded)."
    return ModelError(f"the {what} of {source.name} cannot be loaded: {first}", hint=hint)
