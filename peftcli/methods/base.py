"""The one interface that every fine-tuning method implements.

A method is one file: a subclass of :class:`Method` (usually through a kind of ``peftcli.methods.kinds``) with its
options, and a line in ``peftcli.methods.registry``. The loop, the report, ``eval``, ``merge`` and resume know methods
only through this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from peftcli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class MethodConfig(BaseModel):
    """Options of a method. Subclasses add theirs; unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    name: str = Field(description="Name of the method; `peftcli methods` lists them.")


C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True, slots=True)
class Caps:
    """What the rest of the program may rely on. Each claim is probed by the contract test, none is guessed by name.

    Attributes:
        mergeable: the result can be folded into the base weights.
        quantized_base: trains over a frozen 4-bit or 8-bit base.
        identity_at_init: before the first step the model computes exactly what the base computes.
        whole_model: the result is a complete model folder, not an adapter.
    """

    mergeable: bool
    quantized_base: bool
    identity_at_init: bool
    whole_model: bool = False


class Loss(NamedTuple):
    """What one forward pass yields, summed over the batch's supervised tokens (never averaged: the caller divides by
    the number of supervised tokens of the whole optimizer step, over all accumulation steps and processes).

    Attributes:
        total: scalar float32 tensor, the sum of the token losses in nats.
        correct: scalar int64 tensor, how many supervised tokens were the most likely one.
        parts: further named scalars for the log, summed likewise and logged as means; the same names in every batch.
    """

    total: Tensor
    correct: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Tick:
    """Where the run stands: ``step`` (1-based, of the optimizer) out of ``total_steps``; the loop is its only source."""

    step: int
    total_steps: int
    epoch: int


class TrainingBatch(NamedTuple):
    """One batch of the run's training rows, for methods that look at the data before they start.

    Attributes:
        forward: runs a model on the batch.
        tokens: [rows, length] bool, where there are tokens and not padding.
        supervised: [rows, length] bool, the positions whose output carries loss.
    """

    forward: Callable[[nn.Module], object]
    tokens: Tensor
    supervised: Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """What a method is told when it is applied to a model.

    Attributes:
        seed: of the recipe; initial values are a function of it and of the module's name alone.
        new_token_ids: ids of tokens that the recipe added; their embeddings have to be trained and saved.
        frozen_quantized: the base's linear layers are quantized.
        new_token_layers: ends of the names of the layers whose rows are trained; ``None``: embedding and output layer.
        encode: token ids of a text, by the model's tokenizer, where there is one.
        fresh: modules that the base has no weights for; they are trained whole, like a classifier's head.
        from_file: an adapter's file is about to give all values, so initial ones do not matter.
        shapes_only: with ``from_file``: there will be no values at all, but everything that a run trains has to be there.
        dense_weights: by module name, the weights [out, in] of quantized layers as they were before, on the CPU, where the
            method asked for them (:meth:`Method.needs_dense_weights`).
        batches: starts on the run's training batches, in the run's order, without end, and the same in every process; ``None``
            where no run is being prepared.
        resumed: the method's own state (:meth:`Method.state`) in the checkpoint that the run will go on from; empty otherwise.
    """

    seed: int = 42
    new_token_ids: tuple[int, ...] = ()
    frozen_quantized: bool = False
    new_token_layers: tuple[str, ...] | None = None
    encode: Callable[[str], list[int]] | None = None
    fresh: tuple[str, ...] = ()
    from_file: bool = False
    shapes_only: bool = False
    dense_weights: Mapping[str, Tensor] = field(default_factory=dict)
    batches: Callable[[], Iterator[TrainingBatch]] | None = None
    resumed: Mapping[str, Tensor] = field(default_factory=dict)

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for the initial values of ``name``: the same on every device and in any order of creation."""
        import torch

        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, slots=True)
class PeftFormat:
    """How a method's result is written for Hugging Face PEFT.

    Attributes:
        peft_type: PEFT's name of the method, such as ``LORA``.
        keys: our parameter's name in an adapter layer -> its suffix in the file, such as ``lora_A`` -> ``lora_A.weight``.
        empty: tensors without elements are sound (a layer whose rank was cut to zero).
        rank_is_size: layers have a side as long as the rank that the file states, so none may be longer than its tensors.
        stock: PEFT has the method; otherwise the type is ours, in the same two files.
        prefix: of all keys.
        whole: complete keys of tensors that belong to no module, by the names that :meth:`Method.file_targets` gives them.
    """

    peft_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    empty: bool = False
    rank_is_size: bool = True
    stock: bool = True
    prefix: str = "base_model.model."
    whole: Mapping[str, str] = field(default_factory=dict)


class Method(Generic[C]):
    """A fine-tuning method. Only :meth:`apply` must be written.

    Class attributes:
        Config: the validated options, kept with the method.
        paper: URL of the paper that introduced it.
        summary: one sentence for `peftcli methods`.
        solves, costs, choose: what it answers, what it asks in return, and when to take it, for `peftcli methods NAME`.
        caps: see :class:`Caps`.
        recommended: dotted recipe path -> value put where the user wrote nothing.
        peft: the twin in Hugging Face PEFT, or ``None``.
    """

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[str]
    summary: ClassVar[str]
    solves: ClassVar[str] = ""
    costs: ClassVar[str] = ""
    choose: ClassVar[str] = ""
    caps: ClassVar[Caps]
    recommended: ClassVar[dict[str, object]] = {}
    peft: ClassVar[PeftFormat | None] = None

    def __init__(self, config: C) -> None:
        self.config = config

    @classmethod
    def check_recipe(cls, recipe: Any) -> list[tuple[str, str]]:
        """Faults of a whole recipe that only this method can see, as (dotted key, message)."""
        if recipe.base_model.quantization is not None and not cls.caps.quantized_base:
            return [
                (
                    "base_model.quantization",
                    (
                        f"{recipe.method.name} trains the base weights themselves, and {recipe.base_model.quantization} weights cannot "
                        "be trained; remove the quantization or choose a method that leaves the base frozen, such as qlora"
                    ),
                )
            ]
        return []

    def needs_dense_weights(self) -> bool:
        """Whether :meth:`apply` looks at the weights as they were before the base was quantized; costs their memory until then."""
        return False

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Freeze, replace or wrap ``model`` in place and return it. Trainable parameters are float32 afterwards."""
        raise NotImplementedError

    def param_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: matrices decay, vectors (biases, norms, scales) do not. Order is that of the names."""
        named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
        matrices = [p for _, p in named if p.ndim >= 2]
        vectors = [p for _, p in named if p.ndim < 2]
        groups = [
            {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, module: nn.Module, batch: Any) -> Loss:
        """The loss of one batch. ``module`` is the *prepared* task module (DDP and the like), so that gradients are shared."""
        result: Loss = module(batch)
        return result

    def before_step(self, model: nn.Module, tick: Tick) -> None:
        """Called with the unwrapped model after the backward pass, before the optimizer."""

    def after_step(self, model: nn.Module, tick: Tick) -> None:
        """Called with the unwrapped model after the optimizer."""

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Named numbers of the method's own for the log."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of the report must know of the weights as they are, such as that a schedule was cut short."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What exact resume needs beyond the trainable parameters, as tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""

    def to_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the adapter's file holds, by parameter name.

        Args:
            tensors: the trainable parameters by name, float32 copies on the CPU; the file may need other shapes.
        """
        return tensors

    def from_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`to_file`: values of the trainable parameters from what a file holds, by name.

        Raises:
            CheckpointError: the tensors cannot be those of this model.
        """
        return tensors

    def file_targets(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of ``model`` that a file's values are copied into, by name: the trainable parameters, unless the file
        holds something made from them."""
        return {name: parameter for name, parameter in sorted(model.named_parameters()) if parameter.requires_grad}

    def positions_taken(self) -> int:
        """How many of the model's positions the method takes from each row."""
        return 0

    def row_limit(self, positions: int | None) -> int | None:
        """The longest row in tokens, in a model of so many ``positions`` (``None``: no limit).

        Raises:
            UsageError: nothing is left.
        """
        left = None if positions is None else positions - self.positions_taken()
        if left is not None and left < 2:
            raise UsageError(
                f"method.{self.config.name}: takes {self.positions_taken()} of the model's {positions} positions; nothing is left"
            )
        return left

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """The method's own fields of PEFT's ``adapter_config.json``."""
        return {}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Our options (without ``name``) from PEFT's fields.

        Raises:
            CheckpointError: the file asks for something that this method does not compute.
        """
        return {}
