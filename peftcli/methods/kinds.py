"""The kinds of methods: what a method of each kind shares, so that one file with a few lines is a whole method.

``Select`` lets a choice of the base's own parameters move. ``LayerMethod`` replaces modules by adapter layers that hold them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.errors import UsageError, nearest
from peftcli.methods import targets
from peftcli.methods.base import C, Context, Method, MethodConfig
from peftcli.quantization import is_quantized


class AdapterLayer(nn.Module):
    """A module that holds the base module and adds to what it computes. It never subclasses it, so the base may be
    dense, quantized or of another library; only :meth:`fold` needs the dense weight.

    Trainable parameters are direct attributes of the layer; their names key the file formats.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype or device."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The dense weight and bias that compute what base and adapter compute together.

        Args:
            weight: of the base, [out, in] for linear layers and [vocabulary, width] for embeddings, float32 or float64.
            bias: [out] or ``None``.
        """
        raise NotImplementedError


def features(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, whatever its storage."""
    if type(base).__name__ == "Conv1D":  # GPT-2: weight is [in, out]
        weight = cast(Tensor, base.weight)
        return weight.shape[0], weight.shape[1]
    if not hasattr(base, "in_features"):
        raise UsageError(f"method.target_modules: {type(base).__name__} is no linear layer, and this method adapts linear layers only")
    return cast(int, base.in_features), cast(int, base.out_features)


def freeze(model: nn.Module) -> None:
    """No parameter of ``model`` gets a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def unfreeze(parameter: nn.Parameter) -> None:
    """Let ``parameter`` move, in float32: half-precision weights lose small updates."""
    parameter.data = parameter.data.to(torch.float32)
    parameter.requires_grad_(True)


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give ``module`` a weight of its own where it shares it (tied input and output embeddings), so that changing one
    does not change the other."""
    weight = module.weight
    for other in model.modules():
        if other is not module and getattr(other, "weight", None) is weight:
            module.weight = nn.Parameter(cast(Tensor, weight).detach().clone(), requires_grad=False)
            config = getattr(model, "config", None)
            if config is not None and getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
            return


class NewTokens(AdapterLayer):
    """Trains the rows of added tokens only; the other rows of the embedding (or output layer) stay frozen.

    Args:
        base: an embedding [vocabulary, width], or an output layer whose weight is [vocabulary, width].
        ids: of the added tokens, n.
        shared: the layer whose rows this one uses as well (tied embeddings).

    The parameter ``trainable_tokens_delta`` [n, width] holds the rows themselves (as in PEFT's trainable tokens), so the
    values that a later resize puts into the base do not matter.
    """

    ids: Tensor

    def __init__(self, base: nn.Module, ids: Sequence[int], shared: NewTokens | None = None) -> None:
        super().__init__(base)
        weight = cast(Tensor, base.weight)
        self.register_buffer("ids", torch.tensor(list(ids), dtype=torch.long, device=weight.device), persistent=False)
        if shared is None:
            self.trainable_tokens_delta = nn.Parameter(weight.detach()[list(ids)].to(torch.float32).clone())
        else:
            self.trainable_tokens_delta = shared.trainable_tokens_delta

    def forward(self, x: Tensor) -> Tensor:
        ids = self.ids
        result = cast(Tensor, self.base(x))
        rows = self.trainable_tokens_delta.to(result.dtype)
        if isinstance(self.base, nn.Embedding):
            position = torch.full((self.base.num_embeddings,), -1, dtype=torch.long, device=x.device)
            position[ids] = torch.arange(len(ids), device=x.device)
            place = position[x]
            new = F.embedding(place.clamp(min=0), rows)
            scale = getattr(self.base, "embed_scale", None)
            if scale is not None:
                new = new * scale.to(new.dtype)
            return torch.where((place >= 0).unsqueeze(-1), new, result)
        bias = self.bias
        new = F.linear(x, rows.to(x.dtype), None if bias is None else bias[ids].to(x.dtype))
        return result.index_copy(-1, ids, new.to(result.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.ids, self.trainable_tokens_delta.to(weight)), bias


def train_new_tokens(model: Any, ctx: Context, whole: Collection[str] = ()) -> None:
    """Make the embeddings (and output rows) of the added tokens trainable; tied ones stay tied.

    Args:
        whole: names of modules that are trained whole anyway.

    Raises:
        UsageError: an id lies outside the vocabulary.
    """
    ids = ctx.new_token_ids
    if not ids:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows_there = embedding.weight.shape[0]
    if not all(0 <= i < rows_there for i in ids):
        raise UsageError(f"the new tokens' ids {min(ids)} to {max(ids)} lie outside the model's vocabulary of {rows_there}")
    tied = head is not None and head.weight is embedding.weight
    names = {id(module): name for name, module in model.named_modules()}
    shared: NewTokens | None = None
    for module in (embedding, head):
        if module is None or (name := names[id(module)]) in whole:
            continue
        if model.config.is_encoder_decoder:
            raise UsageError(
                "base_model.new_tokens: the encoder and the decoder each have the embeddings of an encoder-decoder, and new rows of "
                "them cannot be trained by themselves",
                hint="train all of them, with method full, or write the texts with the tokens that are there.",
            )
        follows = tied and shared is not None
        if ctx.new_token_layers is None or follows or any(name.endswith(end) for end in ctx.new_token_layers):
            rows = NewTokens(module, ids, shared=shared if tied else None)
            shared = shared or rows
            targets.replace(model, name, rows)


def new_modules(model: nn.Module, ctx: Context) -> list[str]:
    """Names of the modules that no method may leave as they start: a classifier's head, and what the base has no weights for."""
    return list(dict.fromkeys([*targets.classification_heads(model), *ctx.fresh]))


def train_whole(model: nn.Module, names: Sequence[str], option: str = "modules_to_save") -> None:
    """Let every parameter of the modules called ``names`` move.

    Raises:
        UsageError: one is quantized.
    """
    for name in names:
        module = model.get_submodule(name)
        if any(is_quantized(inner) for inner in module.modules()):
            raise UsageError(
                f"method.{option}: {name} is quantized, and quantized weights cannot be trained",
                hint="adapt it by target_modules instead, or load the base without quantization.",
            )
        if hasattr(module, "weight"):
            untie(model, module)
        for parameter in module.parameters():
            unfreeze(parameter)


class Wrapper(nn.Module):
    """Holds a whole model as ``base`` and adds to what goes into it. Every parameter outside ``base`` is the method's own; every
    attribute that is not the wrapper's is the base's (its config, its dtype, its embeddings)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


class Select(Method[C]):
    """Methods that train a choice of the base's own parameters. Where the result is no whole model, its file holds the
    parameters that moved."""

    def trainable(self, name: str) -> bool:
        """Whether the parameter called ``name`` moves."""
        raise NotImplementedError

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        freeze(model)
        new = tuple(f"{name}." for name in new_modules(model, ctx))
        chosen = [parameter for name, parameter in model.named_parameters() if self.trainable(name) or name.startswith(new)]
        if not all(parameter.is_floating_point() for parameter in chosen):
            raise UsageError(f"{self.config.name} chooses weights that are quantized, and quantized weights cannot be trained")
        ids = {id(parameter) for parameter in chosen}
        train_new_tokens(model, ctx, [name for name, module in model.named_modules() if id(getattr(module, "weight", None)) in ids])
        for parameter in chosen:
            unfreeze(parameter)
        # A norm wants its scale in the dtype of its bias, and takes float32 features, which trained embeddings give, only in float32.
        wide = any(isinstance(module, nn.Embedding) and module.weight.requires_grad for module in model.modules())
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if (wide or any(p.requires_grad for p in own)) and all(p.ndim < 2 for p in own):
                for p in own:
                    p.data = p.data.to(torch.float32)
        return model


class LayerMethod(Method[C]):
    """Methods that put an adapter layer in the place of each target module.

    The options must have ``target_modules``; ``exclude_modules`` and ``modules_to_save`` (names of modules that are
    trained and saved whole) are optional.
    """

    layer: ClassVar[type[AdapterLayer]]

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        """The adapter layer that holds ``base``, the module called ``name``."""
        raise NotImplementedError

    def target_names(self, model: nn.Module) -> list[str]:
        options: Any = self.config
        return targets.match(model, options.target_modules, getattr(options, "exclude_modules", ()))

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        names = self.target_names(model)
        saved, new = whole_modules(model, getattr(self.config, "modules_to_save", ())), new_modules(model, ctx)
        if getattr(self.config, "target_modules", None) == targets.ALL_LINEAR:
            names = [name for name in names if not name.startswith(tuple(f"{outer}." for outer in new))]
        whole = list(dict.fromkeys([*saved, *new]))
        both = sorted(name for name in names if any(name == outer or name.startswith(f"{outer}.") for outer in whole))
        if both:
            raise UsageError(f"method.modules_to_save: {', '.join(both)} is also adapted by target_modules; choose one of the two")
        freeze(model)
        train_new_tokens(model, ctx, whole)
        for name in names:
            base = model.get_submodule(name)
            if not isinstance(base, NewTokens):
                layer = self.make_layer(name, base, ctx)
                device = next(base.parameters()).device
                for own in layer.parameters(recurse=False):
                    if own.device != device:
                        own.data = own.data.to(device)
                layer.train(model.training)
                targets.replace(model, name, layer)
            else:
                raise UsageError(f"method.target_modules: {name} already trains the rows of the new tokens; take it out of the targets")
        train_whole(model, whole)
        return model


def whole_modules(model: nn.Module, wanted: Sequence[str], option: str = "modules_to_save") -> list[str]:
    """Dotted names of the modules that ``modules_to_save``, or another option, names by their ends.

    Raises:
        UsageError: a name fits no module.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for end in wanted:
        names = [name for name in modules if name and (name == end or name.endswith(f".{end}"))]
        if not names:
            near = nearest(end, {name.rpartition(".")[2] for name in modules})
            raise UsageError(f"method.{option}: no module is called {end!r}", hint=f"did you mean {near!r}?" if near else None)
        found += names
    return found


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapter layer of ``model`` by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter by name, sorted; shared parameters once."""
    return {name: parameter for name, parameter in sorted(model.named_parameters()) if parameter.requires_grad}


def trains_base_weights(model: nn.Module) -> bool:
    """Whether a parameter outside an adapter layer moves: its products then need autocast when computing in bfloat16."""
    owned = {id(p) for layer in adapter_layers(model).values() for p in layer.parameters(recurse=False)}
    base = model.base if isinstance(model, Wrapper) else model
    return any(p.requires_grad and id(p) not in owned for p in base.parameters())


def mixes_precision(model: nn.Module) -> bool:
    """Whether base weights that were trained, in float32, meet bfloat16 ones."""
    return trains_base_weights(model) and {p.dtype for p in model.parameters()} >= {torch.float32, torch.bfloat16}


__all__ = [
    "AdapterLayer",
    "LayerMethod",
    "MethodConfig",
    "NewTokens",
    "Select",
    "Wrapper",
    "adapter_layers",
    "features",
    "freeze",
    "mixes_precision",
    "new_modules",
    "train_new_tokens",
    "train_whole",
    "trainable_state",
    "trains_base_weights",
    "unfreeze",
    "untie",
    "whole_modules",
]
