"""Several adapters on one base: each has a name, one acts at a time, and switching loads nothing.

An adapter is applied once, when it is added. What it changed of the model is remembered as references, to modules and to the
tensors that parameters hold, and put in place or taken out again when it is switched; no weight is copied or computed with, so
the base comes back bit for bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcli.errors import CheckpointError, UsageError, nearest
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context, Method
from peftcli.model.load import Base, load_base, load_tokenizer, open_base
from peftcli.model.source import Source, resolve
from peftcli.quantization import is_quantized
from peftcli.recipe.schema import BaseModelSection
from peftcli.result import Place, default_device, locate

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class _State:
    """What a model is made of at one moment: its modules' children and parameters, and the tensors that the parameters hold."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules = [(module, dict(module._modules), dict(module._parameters)) for module in root.modules()]
        # Quantized weights never change, and bitsandbytes moves them about by itself.
        codes = {id(module.weight) for module in root.modules() if is_quantized(module)}
        self._values = [(p, p.data, p.requires_grad) for p in root.parameters() if id(p) not in codes]
        self._config = getattr(root, "config", None)
        self._tied = getattr(self._config, "tie_word_embeddings", None)

    def put(self) -> None:
        """Let the model be made of this again."""
        for module, children, parameters in self._modules:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        for parameter, value, moves in self._values:
            parameter.data = value
            parameter.requires_grad_(moves)
        if self._tied is not None:
            self._config.tie_word_embeddings = self._tied  # type: ignore[union-attr]


@dataclass(frozen=True)
class Named:
    """One adapter of several.

    Attributes:
        tokenizer: its own; chat templates and added tokens may differ from one to the next.
        method: ``None`` for a whole model.
    """

    name: str
    tokenizer: Any
    method: Method[Any] | None
    state: _State


class Adapters:
    """One loaded base and any number of named adapters over it.

    Args:
        base: loaded without an adapter. Its model belongs to this object from now on.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._plain = _State(base.model)
        self._named: dict[str, Named] = {}
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._named)

    @property
    def model(self) -> Any:
        """The base with the active adapter, in evaluation mode."""
        return self._state.root

    @property
    def tokenizer(self) -> Any:
        """The active adapter's, or the one that the base was loaded with."""
        return self.base.tokenizer if self.active is None else self._named[self.active].tokenizer

    @property
    def _state(self) -> _State:
        return self._plain if self.active is None else self._named[self.active].state

    def __getitem__(self, name: str) -> Named:
        try:
            return self._named[name]
        except KeyError:
            near = nearest(name, self._named)
            known = ", ".join(self._named) or "none"
            raise UsageError(
                f"no adapter is called {name!r}; there are: {known}", hint=f"did you mean {near!r}?" if near else None
            ) from None

    def add(self, name: str, adapter: hf_peft.AdapterFile | nn.Module, tokenizer: Any = None, method: Method[Any] | None = None) -> None:
        """Apply ``adapter`` once and keep what it changes under ``name``; which adapter acts stays as it is.

        Args:
            adapter: an adapter's file, or a whole model of the base's architecture, whose weights take the base's place.
            tokenizer: default: the base's.
            method: default: the file's.

        Raises:
            UsageError: the name is taken or cannot be one, or a whole model is to stand in for a quantized base.
            CheckpointError: the adapter does not fit the base. The others are untouched.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be an adapter's name; allowed: 1 to 64 of A-Z a-z 0-9 . _ -", hint="--adapter NAME=PATH")
        if name in self._named:
            raise UsageError(f"two adapters are called {name!r}", hint="give them names: --adapter NAME=PATH")
        if isinstance(adapter, nn.Module) and self.base.quantization is not None:
            raise UsageError(f"{name} is a whole model, and the base is quantized ({self.base.quantization})", hint="--quantization none")
        before = self.active
        self.use(None)
        try:
            if isinstance(adapter, nn.Module):
                root = _take_weights(self.base.model, adapter, name)
            else:
                context = Context(frozen_quantized=self.base.quantization is not None, fresh=self.base.fresh)
                root = hf_peft.apply_adapter(self.base.model, adapter, context).eval()
                method = method or adapter.method
            tokenizer = self.base.tokenizer if tokenizer is None else tokenizer
            self._named[name] = Named(name, tokenizer, method, _State(root))
        finally:
            self.use(before)

    def use(self, name: str | None) -> Any:
        """Let the adapter called ``name`` act, or none of them; returns :attr:`model`.

        Raises:
            UsageError: none is called so; names the nearest.
        """
        state = self._plain if name is None else self[name].state
        self._plain.put()
        state.put()
        self.active = name
        return self.model


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each result, after its folder: ``runs/poet/adapter`` is ``poet``; equal ones are numbered."""
    named: dict[str, Path] = {}
    for path in paths:
        whole = path.resolve()
        folder = whole.parent if (whole.parent / "recipe.yaml").is_file() else whole
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", folder.name)[:60] or "adapter"
        numbered = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
        named[next(name for name in numbered if name not in named)] = path
    return named


def _take_weights(model: nn.Module, other: nn.Module, name: str) -> nn.Module:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    if {key: p.shape for key, p in ours.items()} != {key: p.shape for key, p in theirs.items()}:
        raise CheckpointError(f"{name} is a whole model whose weights have other names or shapes than the base's")
    for key, parameter in ours.items():
        parameter.data = theirs[key].data
    return model


def open_adapters(
    paths: Mapping[str, Path],
    *,
    base_model: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Adapters, list[Place]]:
    """Load one base and every named result onto it.

    Args:
        paths: of runs, adapters or whole models, by the names they get. The first decides how the base is loaded.
        base_model, quantization: override what the results say; with ``base_model`` they are not asked what they are for.

    Returns:
        the adapters, none of them active, and where each was found.

    Raises:
        UsageError: they are of different bases, were trained over different quantizations, or have different vocabularies.
        CheckpointError: one is damaged or does not fit.
        ModelError: the base cannot be found.
    """
    places = {name: locate(path, base_model) for name, path in paths.items()}
    _whole_ones_have_a_base(places, base_model)
    _same_kind(places)
    if base_model is None:
        _same_base(places)
    first = next(iter(places.values()))
    section = first.section.model_copy(update={"new_tokens": [], "quantization": _quantization(places, quantization)})
    opened = open_base(
        section,
        device=default_device(),
        base_dir=first.base_dir,
        trust_remote_code=trust_remote_code,
        tokenizer_folder=first.tokenizer_folder,
    )
    base = load_base(opened, auto_model=first.task.auto_model, head=first.task.head(), seed=first.seed)
    tokenizers = {name: _tokenizer(place, base) for name, place in places.items()}
    _same_rows(tokenizers, base)
    adapters = Adapters(base)
    for name, place in places.items():
        whole = place.section.model_copy(update={"name": str(place.weights), "revision": None, "new_tokens": [], "quantization": None})
        adapter = place.adapter or _whole_model(place, whole)
        adapters.add(name, adapter, tokenizers[name], place.method)
    return adapters, list(places.values())


def _whole_model(place: Place, section: BaseModelSection) -> Any:
    opened = open_base(section, device=default_device(), base_dir=place.base_dir)
    return load_base(opened, auto_model=place.task.auto_model, head=place.task.head()).model


def _whole_ones_have_a_base(places: Mapping[str, Place], base_model: str | None) -> None:
    for name, place in places.items():
        if place.adapter is None and place.recipe is None and base_model is None:
            raise UsageError(
                f"{name} ({place.weights}) is a whole model that does not say which base it came from", hint="--base-model NAME"
            )


def _same_kind(places: Mapping[str, Place]) -> None:
    kinds = {name: place.task.auto_model for name, place in places.items()}
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise UsageError(f"the results are of different kinds of models ({each}), so they cannot share a base")


def _same_base(places: Mapping[str, Place]) -> None:
    (first, one), *others = places.items()
    found = resolve(one.section.name, one.base_dir)
    for name, place in others:
        other = resolve(place.section.name, place.base_dir)
        same = _where(found) == _where(other) or (found.is_local and other.is_local and found.sha256() == other.sha256())
        if not same or one.section.revision != place.section.revision:
            bases = [f"{n} is for {p.section.name}" + (f" at {p.section.revision}" if p.section.revision else "") for n, p in
                     ((first, one), (name, place))]  # fmt: skip
            raise UsageError(
                f"the results are of different bases: {bases[0]}, {bases[1]}",
                hint="where both names mean one model, say which to load: --base-model NAME",
            )


def _where(source: Source) -> tuple[str, str | None]:
    return str(Path(source.location).resolve()) if source.is_local else source.location, source.gguf_file


def _quantization(places: Mapping[str, Place], wanted: str | None) -> str | None:
    if wanted is not None:
        return None if wanted == "none" else wanted
    kinds = {place.section.quantization for place in places.values()}
    if len(kinds) > 1:
        each = ", ".join(f"{name}: {place.section.quantization or 'none'}" for name, place in places.items())
        raise UsageError(
            f"the results were trained over different quantizations of the base ({each})",
            hint="say over which they are to run: --quantization none, nf4, fp4 or int8",
        )
    return kinds.pop()


def _tokenizer(place: Place, base: Base) -> Any:
    folder = place.tokenizer_folder
    return base.tokenizer if folder is None else load_tokenizer(Source(str(folder), str(folder), None, True))


def _same_rows(tokenizers: Mapping[str, Any], base: Base) -> None:
    """The base has as many embeddings as each of the tokenizers asks for."""
    sizes: dict[str, int] = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    weight: Tensor = base.model.get_input_embeddings().weight
    if len(set(sizes.values())) > 1 and max(sizes.values()) >= weight.shape[0]:
        each = ", ".join(f"{name}: {size} tokens" for name, size in sizes.items())
        raise UsageError(f"the results have different vocabularies ({each}), so they cannot share the base's embeddings")


__all__ = ["Adapters", "Named", "names_of", "open_adapters"]
