"""Combine several adapters of one base into one change of its weights.

Each adapter is looked at as what it does to each weight, ``delta = fold(W) - W``, so methods can be mixed. One layer at a time is
computed, in float32. With deltas d_i and weights w_i, the rules are:

* ``linear``: ``sum w_i d_i`` (task arithmetic, Ilharco et al., https://arxiv.org/abs/2212.04089);
* ``ties``: keep the largest entries of each d_i, elect a sign for each place by the sum over i, and take the mean of ``w_i d_i`` over
  those that have it (Yadav et al., https://arxiv.org/abs/2306.01708);
* ``dare``: drop entries at random, scale up what is left by 1 / density, and sum as in ``linear`` (Yu et al.,
  https://arxiv.org/abs/2311.03099);
* ``svd``: ``linear``, and of the result only the ``rank`` largest singular values.

They are PEFT's ``svd``-type rules (``add_weighted_adapter``): its ``linear`` is *not* ``linear`` here, because it averages the factors
A and B by themselves, and the product of two averages is not the average of the products. As in PEFT entries are trimmed within
each tensor, where the TIES paper trims over the whole model.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftcli.adapters import Adapters
from peftcli.errors import UsageError
from peftcli.interchange.low_rank import exact_factors
from peftcli.methods.kinds import AdapterLayer, adapter_layers
from peftcli.methods.lora_layers import weight_of
from peftcli.methods.targets import is_linear, replace
from peftcli.quantization import is_quantized

RULES = ("linear", "ties", "dare", "svd")


@dataclass(frozen=True)
class Rule:
    """How deltas become one.

    Attributes:
        name: one of :data:`RULES`.
        density: share of the entries that ``ties`` and ``dare`` keep, in (0, 1].
        seed: of the entries that ``dare`` drops; which they are depends on it, on the tensor's name and on the adapter's place alone.
        rank: that ``svd`` keeps.
    """

    name: str
    density: float = 1.0
    seed: int = 0
    rank: int | None = None

    def __call__(self, deltas: Mapping[int, Tensor], weights: Sequence[float], tensor: str) -> Tensor:
        """One delta from those of the adapters that change the tensor called ``tensor``, by their places in ``weights``."""
        if self.name == "ties":
            return ties([trimmed(delta, self.density) for delta in deltas.values()], [weights[i] for i in deltas])
        if self.name == "dare":
            deltas = {i: dropped(delta, self.density, self._generator(tensor, i)) for i, delta in deltas.items()}
        total = sum((weights[i] * delta for i, delta in deltas.items()), torch.zeros(()).to(next(iter(deltas.values()))))
        assert isinstance(total, Tensor)
        if self.name == "svd" and total.ndim == 2:
            assert self.rank is not None
            best = truncated(total, self.rank)
            return best.wide @ best.narrow
        return total

    def _generator(self, tensor: str, index: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{index}:{tensor}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """``delta`` with zeros in all but the ``density`` share of entries with the largest magnitude."""
    keep = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    keep[delta.abs().flatten().topk(int(density * delta.numel())).indices] = True
    return delta * keep.view_as(delta)


def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """``delta`` with each entry kept with probability ``density`` and scaled by ``1 / density``, else zero."""
    mask = torch.bernoulli(torch.full(delta.shape, density), generator=generator)
    return delta * mask.to(delta) / density


def ties(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect signs and take the mean of those that agree; the deltas are trimmed before."""
    elected = torch.where(sum(deltas[1:], deltas[0]) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() == elected
        total += weight * delta * agrees
        count += agrees
    return total / count.clamp(min=1.0)


class Truncated(NamedTuple):
    """Factors A [rank, in] and B [out, rank] of a matrix's best approximation; ``energy`` is the sum of the matrix's squared entries,
    ``lost`` the part of it that they leave out."""

    narrow: Tensor
    wide: Tensor
    lost: float
    energy: float


def truncated(delta: Tensor | tuple[Tensor, Tensor], rank: int) -> Truncated:
    """The best approximation of rank ``rank`` of a matrix [out, in], or of the product of factors A [k, in] and B [out, k].

    Factors are decomposed without forming their product.
    """
    if isinstance(delta, Tensor):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        narrow, wide = delta
        q_wide, r_wide = torch.linalg.qr(wide)
        q_narrow, r_narrow = torch.linalg.qr(narrow.t())
        left, values, right = torch.linalg.svd(r_wide @ r_narrow.t(), full_matrices=False)
        left, right = q_wide @ left, right @ q_narrow.t()
    energy = values.double().square()
    return Truncated(right[:rank], left[:, :rank] * values[:rank], float(energy[rank:].sum()), float(energy.sum()))


class Combination(AdapterLayer):
    """A module that several adapters change, with their combined change.

    Args:
        base: the module that the base has there.
        tensors: the names by which its weight and bias are known, for the random rules.
        members: what stands there under each adapter that changes it, by the adapter's place in ``weights``.

    The members are not submodules: folding replaces this layer as a whole.
    """

    def __init__(
        self, base: nn.Module, tensors: Mapping[str, str], members: Mapping[int, nn.Module], weights: Sequence[float], rule: Rule
    ) -> None:
        super().__init__(base)
        self.tensors, self.members, self.weights, self.rule = dict(tensors), dict(members), list(weights), rule

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Combination:
        cast(Any, super())._apply(fn, recurse)
        for member in self.members.values():
            cast(Any, member)._apply(fn, recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """What ``linear`` computes, from the adapters' own forward passes and not from folded weights: linear layers, embeddings and
        norms are linear in their weights."""
        assert self.rule.name == "linear", "the other rules exist as weights only"
        plain: Tensor = self.base(x)
        result = plain
        for index, member in self.members.items():
            result = result + self.weights[index] * (member(x) - plain)
        return result

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factors = self.factors() if self.rule.name == "svd" else None
        if factors is not None:
            assert self.rule.rank is not None
            best = truncated(factors, self.rule.rank)
            return self._finite(weight + (best.wide @ best.narrow).to(weight)), bias
        changed = {index: _folded(member, weight, bias) for index, member in self.members.items()}
        combined = self._one("weight", weight, {i: w for i, (w, _) in changed.items()})
        biases = {i: b for i, (_, b) in changed.items() if b is not None}
        return combined, None if bias is None else self._one("bias", bias, biases)

    def _one(self, key: str, before: Tensor, after: Mapping[int, Tensor]) -> Tensor:
        wide = before if before.dtype == torch.float64 else before.float()
        deltas = {i: tensor.to(wide) - wide for i, tensor in after.items() if not torch.equal(tensor.to(wide), wide)}
        return self._finite(wide + self.rule(deltas, self.weights, self.tensors[key])) if deltas else before

    def _finite(self, tensor: Tensor) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise UsageError("the combined weights are not finite", hint="take smaller --weights.")
        return tensor

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``(A, B)`` of the exact weighted sum, A [sum of the ranks, in] and B [out, sum of the ranks]; ``None`` where a member is no
        sum of a base and a product of two factors."""
        pairs = [(self.weights[index], exact_factors(member)) for index, member in self.members.items()]
        if any(pair is None or bias_moved(member, self.base) for (_, pair), member in zip(pairs, self.members.values(), strict=True)):
            return None
        narrow = [weight * pair[0] for weight, pair in pairs if pair is not None]
        return torch.cat(narrow), torch.cat([pair[1] for _, pair in pairs if pair is not None], dim=1)


def bias_moved(member: nn.Module, base: nn.Module) -> bool:
    """Whether the bias below ``member`` is another than the base's."""
    below = getattr(member, "base", None)
    mine, theirs = getattr(below, "bias", None), getattr(base, "bias", None)
    return mine is not None and theirs is not None and not torch.equal(mine.to(theirs), theirs)


def _folded(member: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if isinstance(member, AdapterLayer):
        own = getattr(member.base, "bias", None)
        return member.fold(weight, bias if own is None else own.detach().to(weight))
    own_weight = cast(Tensor, member.weight).detach().to(weight)
    own_bias = cast("Tensor | None", getattr(member, "bias", None))
    return own_weight.t() if type(member).__name__ == "Conv1D" else own_weight, own_bias


def combine(adapters: Adapters, weights: Sequence[float], rule: Rule) -> Any:
    """Put a :class:`Combination` in the place of every module of the base that one of the adapters changes; returns the model.

    Folding it (``peftcli.merge.merge``) streams: the deltas of one layer exist at a time.

    Args:
        weights: one for each adapter, in the order of ``adapters.names``.

    Raises:
        UsageError: an adapter's method cannot be folded into weights, their vocabularies differ, or one changes a parameter that is
            neither a weight nor a bias.
    """
    assert len(weights) == len(adapters.names)
    for name in adapters.names:
        method = adapters[name].method
        if method is not None and not method.caps.mergeable:
            raise UsageError(
                f"{name} is a result of {method.config.name}, which cannot be folded into weights, so it cannot be combined",
                hint="`peftcli chat` switches between results of any method.",
            )
    first, *others = [(name, adapters[name].tokenizer.get_vocab()) for name in adapters.names]
    for name, vocabulary in others:
        if vocabulary != first[1]:
            apart = sorted({token for token, _ in set(vocabulary.items()) ^ set(first[1].items())})
            raise UsageError(
                f"{first[0]} and {name} have different vocabularies ({len(apart)} tokens, such as {apart[0]!r}): one row of the embeddings "
                "would mean two tokens",
                hint="train both with the same base_model.new_tokens.",
            )
    model = adapters.use(None)
    plain = {path: module for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    before = {path: {key: p.data for key, p in module.named_parameters(recurse=False)} for path, module in plain.items()}
    known: dict[int, str] = {}  # tied weights have one name
    for path, module in plain.items():
        for key, parameter in module.named_parameters(recurse=False):
            known.setdefault(id(parameter), f"{path}.{key}")
    labels = {path: {k: known[id(p)] for k, p in module.named_parameters(recurse=False)} for path, module in plain.items()}
    members: dict[str, dict[int, nn.Module]] = {}
    for index, name in enumerate(adapters.names):
        root = adapters.use(name)
        moved = {path: _moved(module, before[path]) for path, module in plain.items()}
        still = {id(module) for path, module in plain.items() if not moved[path]}
        for path, module in plain.items():
            now = root.get_submodule(path)
            if now is module and any(key not in ("weight", "bias") for key in moved[path]):
                raise UsageError(
                    f"{name} changes {moved[path][0]} of {path}, which is neither a weight nor a bias; that cannot be combined"
                )
            if now is not module or moved[path]:
                members.setdefault(path, {})[index] = _as_it_is(now, still)
    model = adapters.use(None)
    for path, changed in members.items():
        replace(model, path, Combination(plain[path], labels[path], changed, weights, rule).eval())
    if rule.name == "svd" and rule.rank is None:
        rank = _largest_rank(combinations(model).values())
        for layer in combinations(model).values():
            layer.rule = dataclasses.replace(rule, rank=rank)
    return model


def combinations(model: nn.Module) -> dict[str, Combination]:
    """Every layer that :func:`combine` has put into ``model``, by dotted name."""
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, Combination)}


def _largest_rank(layers: Iterable[Combination]) -> int:
    pairs = [exact_factors(member) for layer in layers for member in layer.members.values()]
    if not pairs or any(pair is None for pair in pairs):
        raise UsageError("there is no rank to go by, because not all of the adapters are LoRAs", hint="say it: --rank 16")
    return max(pair[0].shape[0] for pair in pairs if pair is not None)


def _moved(module: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Names of the module's own parameters that have other values than ``before``, or are gone."""
    now = dict(module._parameters)
    if is_quantized(module):
        return [key for key in before if now[key] is None]
    return [key for key, old in before.items() if (p := now[key]) is None or not _equal(p.data, old)]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype == other.dtype and one.data_ptr() == other.data_ptr():
        return True
    return torch.equal(one.to(other), other)


def _as_it_is(module: nn.Module, still: Collection[int]) -> nn.Module:
    """``module`` with the parameters that it has now, whatever becomes of it: a view on the same tensors. Modules whose ids are in
    ``still`` are as they are in the base, and taken themselves."""
    if id(module) in still:
        return module
    view = copy.copy(module)
    view._modules = {key: None if child is None else _as_it_is(child, still) for key, child in module._modules.items()}
    own = module._parameters
    if is_quantized(module):
        view._parameters = dict(own)
    else:
        view._parameters = {key: None if p is None else nn.Parameter(p.data, requires_grad=False) for key, p in own.items()}
    return view


class LowRank(NamedTuple):
    """A combination as LoRA factors.

    Attributes:
        factors: by module name, A [rank, in] and B [out, rank].
        exact: they are the combination itself, not an approximation.
        discarded: share of the energy (sum of the squares) of all changes that they leave out.
        worst, worst_layer: the same of the layer that loses most.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    exact: bool
    discarded: float = 0.0
    worst: float = 0.0
    worst_layer: str | None = None


def low_rank(model: nn.Module, rank: int | None, *, exact: bool) -> LowRank:
    """The combined change of ``model``, from :func:`combine` by any rule but ``svd``, as LoRA factors.

    Args:
        rank: of an approximation; default: the largest rank among the LoRAs (PEFT's choice).
        exact: give the exact sum where there is one: for ``linear`` over LoRAs, of all their ranks together.

    Raises:
        UsageError: something else than weights of linear layers changes, or there is no rank to go by.
    """
    layers = combinations(model)
    for name, layer in layers.items():
        if not is_linear(layer.base):
            raise UsageError(
                f"{name} ({type(layer.base).__name__}) changes, and an adapter's file holds changes of linear layers only",
                hint="write a merged model: --as model",
            )
    factors = {name: layer.factors() if layer.rule.name == "linear" else None for name, layer in layers.items()}
    sums = {name: pair for name, pair in factors.items() if pair is not None}
    if exact and len(sums) == len(layers):
        return LowRank(sums, exact=True)
    rank = rank or _largest_rank(layers.values())
    best = {name: truncated(factors[name] or _change(name, layer), rank) for name, layer in layers.items()}
    energy = sum(one.energy for one in best.values())
    shares = {name: one.lost / one.energy if one.energy > 0.0 else 0.0 for name, one in best.items()}
    worst = max(shares, key=lambda name: shares[name])
    discarded = sum(one.lost for one in best.values()) / energy if energy > 0.0 else 0.0
    return LowRank({name: (one.narrow, one.wide) for name, one in best.items()}, False, discarded, shares[worst], worst)


def _change(name: str, layer: Combination) -> Tensor:
    """What the combination adds to the weight [out, in] of a linear layer."""
    weight = weight_of(layer.base).float()
    bias = None if layer.bias is None else layer.bias.detach().float()
    after, moved = layer.fold(weight, bias)
    if bias is not None and (moved is None or not torch.equal(moved, bias)):
        raise UsageError(
            f"{name}.bias changes, and an adapter's file holds changes of weights only", hint="write a merged model: --as model"
        )
    return after - weight
