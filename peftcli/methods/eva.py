"""EVA: LoRA that starts from the data (Paischer et al., https://arxiv.org/abs/2410.07170). A becomes the principal directions of
each layer's inputs in the first training batches, found batch by batch; B is zero. All layers' directions together are ranked
by the share of variance that they explain in their own layer, and the best ones share the rank budget.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcli.errors import CheckpointError, UsageError
from peftcli.methods.base import Context, TrainingBatch
from peftcli.methods.incremental_pca import Directions
from peftcli.methods.kinds import features
from peftcli.methods.lora_options import LoraConfig

# The search ends after so many batches, even where directions of almost equal weight still turn among each other.
_MOST_BATCHES = 1000
# The name of the ranks in a method's state.
RANKS = "eva_ranks"


@dataclass(frozen=True)
class Findings:
    """What EVA says of the layers.

    Attributes:
        ranks: of every layer by name, in the model's order; 0 for layers that get no adapter.
        starts: initial A [rank, in] by name, float32; empty where the ranks came from a checkpoint, which has the values too.
        options: LoRA's options with the ranks and alphas written out as PEFT does, in patterns of whole names.
    """

    ranks: dict[str, int]
    starts: dict[str, Tensor]
    options: LoraConfig


def look_at_data(model: nn.Module, before: Mapping[str, tuple[int, float]], options: LoraConfig, ctx: Context) -> Findings:
    """Find each layer's rank and initial A.

    Args:
        before: (rank, alpha) that the options give to each target.

    Raises:
        UsageError: a layer sees no training row, or what it sees cannot be told from padding.
        CheckpointError: the checkpoint's ranks are those of other layers.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(
            "method.init_lora_weights: eva tells tokens from padding by one mask, and an encoder-decoder has rows of two kinds",
            hint="take another start, such as default or pissa.",
        )
    layers = [name for name in before if not isinstance(model.get_submodule(name), nn.Embedding)]
    starts: dict[str, Tensor] = {}
    if RANKS in ctx.resumed:
        stored = ctx.resumed[RANKS].tolist()
        if len(stored) != len(layers):
            raise CheckpointError(f"the checkpoint has ranks for {len(stored)} layers, and {len(layers)} are adapted")
        ranks = dict(zip(layers, stored, strict=True))
    else:
        starts = principal_directions(model, {name: before[name][0] for name in layers}, options, ctx)
        ranks = {name: len(rows) for name, rows in starts.items()}
    after = {name: (ranks.get(name, rank), alpha) for name, (rank, alpha) in before.items()}
    if options.eva_adjust_scaling_factors:
        after = {name: (rank, alpha * rank / before[name][0]) for name, (rank, alpha) in after.items()}
    update = {
        "rank_pattern": {name: rank for name, (rank, _) in after.items() if rank not in (0, options.rank)},
        "alpha_pattern": {name: alpha for name, (rank, alpha) in after.items() if rank and alpha != options.alpha},
    }
    return Findings(ranks, starts, options.model_copy(update=update))


def principal_directions(model: nn.Module, wanted: Mapping[str, int], options: LoraConfig, ctx: Context) -> dict[str, Tensor]:
    """The initial A of each layer, [rank, in] float32, with as many rows as EVA gives it; there may be none.

    Args:
        wanted: name of a linear layer -> its rank before; their sum is shared.
    """
    assert ctx.batches is not None, "EVA looks at the training batches"
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _search(model, wanted, options, ctx, ctx.batches())
    finally:
        model.train(training)


def _search(
    model: nn.Module, wanted: Mapping[str, int], options: LoraConfig, ctx: Context, batches: Iterator[TrainingBatch]
) -> dict[str, Tensor]:
    first = next(batches)
    groups = _groups(model, list(wanted), first)
    found: dict[str, Directions] = {}
    for names in groups.values():
        count = min(max(round(wanted[name] * options.eva_rho) for name in names), features(model.get_submodule(names[0]))[0])
        shared = Directions(count, options.eva_tau, ctx.generator(names[0]))
        found |= dict.fromkeys(names, shared)
    # In the model's order, which decides between equal shares.
    found = {name: found[name] for name in wanted}
    ranks = {name: directions.count for name, directions in found.items()}

    def turning(names: list[str]) -> bool:
        return not found[names[0]].settled[: max(ranks[name] for name in names)].all()

    for _, batch in zip(range(_MOST_BATCHES), itertools.chain([first], batches), strict=False):
        active = [head for head, names in groups.items() if turning(names)]
        if not active:
            break

        def learn(name: str, x: Tensor, batch: TrainingBatch = batch) -> None:
            found[name].update(_vectors(name, x, batch, options))

        with _watching(model, active, learn):
            batch.forward(model)
        if all(directions.components is not None for directions in found.values()):
            ranks = _share({name: directions.ratios for name, directions in found.items()}, sum(wanted.values()))
    result = {}
    for name, directions in found.items():
        rank = ranks[name]
        assert directions.components is not None
        rows = directions.components[:rank]
        rows = rows / directions.values[:rank].sqrt().unsqueeze(1) if options.eva_whiten else rows
        # Decompositions return columns side by side; products over another layout end in other bits.
        result[name] = rows.clone(memory_format=torch.contiguous_format)
    return result


@contextmanager
def _watching(model: nn.Module, names: list[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, ``see`` gets every input of the modules called ``names``."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(model: nn.Module, names: list[str], batch: TrainingBatch) -> dict[str, list[str]]:
    """Layers that one after another get the very same input (query, key and value) share one search: by the first one's name."""
    groups: dict[str, list[str]] = {}
    seen: set[str] = set()
    last: tuple[Tensor | None, str] = (None, "")

    def see(name: str, x: Tensor) -> None:
        nonlocal last
        if name in seen:
            return
        seen.add(name)
        last = last if x is last[0] else (x, name)
        groups.setdefault(last[1], []).append(name)

    with _watching(model, names, see):
        batch.forward(model)
    unseen = [name for name in names if name not in seen]
    if unseen:
        raise UsageError(
            f"method.init_lora_weights: eva looks at what goes into each layer, and nothing goes into {unseen[0]}",
            hint="leave it out of method.target_modules, or take another start.",
        )
    return groups


def _vectors(name: str, x: Tensor, batch: TrainingBatch, options: LoraConfig) -> Tensor:
    """[n, width] the inputs that count."""
    mask = batch.supervised if options.eva_use_label_mask else batch.tokens
    flat = x.flatten(0, -2)
    if len(flat) == mask.numel():
        return flat[mask.flatten()]
    if bool(batch.tokens.all()):
        return flat  # without padding every input counts: an output layer gets the supervised positions only
    raise UsageError(
        f"method.init_lora_weights: eva cannot tell which of the inputs of {name} are padding",
        hint="leave it out of method.target_modules, or take another start.",
    )


def _share(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the ``budget`` largest shares each layer has."""
    owners = [name for name, shares in ratios.items() for _ in shares]
    order = torch.cat(list(ratios.values())).argsort(descending=True, stable=True)[:budget]
    counts = Counter(owners[index] for index in order.tolist())
    return {name: counts[name] for name in ratios}
