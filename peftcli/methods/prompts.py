"""The kind of methods that put virtual inputs in front of each row and leave the model itself as it is.

The wrapper takes and gives what the model alone takes and gives: packed or padded rows of real tokens, and logits at real tokens. Virtual
positions exist inside it only, so they never carry loss. Positions count them, as in PEFT: the first real token stands at position n.

Classifiers judge a row by one position. As in PEFT, encoders that take the first one (BERT's pooler) then take the first virtual token, not
[CLS]; with prefixes it is [CLS]. Decoders take the last real token; PEFT takes the last position of the batch, which is padding in the
shorter rows, so only rows of one length give the same there.

Encoder-decoders have virtual inputs in front of what the encoder reads, as in PEFT (whose files hold as many again for the decoder, which
are never used), and prefixes in the decoder's self-attention (``peftcli.methods.decoder_prefix``).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from peftcli.errors import CheckpointError, UsageError
from peftcli.kernels.attention import Prefix
from peftcli.kernels.documents import Documents
from peftcli.methods.base import C, Caps, Context, Method
from peftcli.methods.kinds import Wrapper, freeze, new_modules, train_whole
from peftcli.methods.targets import classification_heads

# The name of the values in the model, and in PEFT's files.
VALUES = "prompt_embeddings"
# What classifiers have on top of their bodies, by the names that transformers gives it. PEFT knows the first two.
HEADS = ("classifier", "score", "pre_classifier", "pooler", "classification_head", "logits_proj", "sequence_summary")


class Prompted(Wrapper):
    """A model with n virtual inputs of some width: [n, width] values, trained themselves or made by a trained encoder.

    Args:
        base: a transformers model.
        values: [n, width] float32, trained as they are; ``None`` where ``encoder`` makes them.
        encoder: a module that makes them from nothing but its own parameters.
    """

    prompt_embeddings: Tensor | None

    def __init__(self, base: nn.Module, values: Tensor | None, encoder: nn.Module | None = None) -> None:
        super().__init__(base)
        self.encoder = encoder
        if encoder is None:
            assert values is not None
            self.prompt_embeddings = nn.Parameter(values)
        else:
            self.register_buffer(VALUES, None, persistent=False)
        self._keeps = "logits_to_keep" in inspect.signature(base.forward).parameters

    def virtual(self) -> Tensor:
        """The [n, width] values as they are now."""
        if self.encoder is None:
            return cast(Tensor, self.prompt_embeddings)
        if self.prompt_embeddings is None:
            # LSTMs round differently without gradients, and products in autocast: training, evaluation and file must agree.
            device = next(self.encoder.parameters()).device.type
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                values = cast(Tensor, self.encoder())
            return values if torch.is_grad_enabled() else values.detach()
        if self.training and torch.is_grad_enabled():
            raise CheckpointError(
                "an adapter's file holds what the encoder made, not the encoder, so it cannot be trained further",
                hint="go on from a checkpoint with --resume, or train the values themselves: prompt_tuning, or no projection.",
            )
        return self.prompt_embeddings

    def result(self) -> Tensor:
        """The values without dropout and gradient."""
        if self.encoder is None:
            return self.virtual().detach()
        self.encoder.eval()
        with torch.no_grad():
            values = self.virtual().detach()
        self.encoder.train(self.training)
        return values

    def hold_result(self) -> Tensor:
        """From now on use fixed values, at first those that the encoder makes now; returns the tensor that holds them."""
        if self.prompt_embeddings is None:
            self.prompt_embeddings = self.result().clone()
        return self.prompt_embeddings

    def _run(self, keep: int | Tensor, inputs: Mapping[str, Any]) -> Any:
        """The model's output with logits at ``keep`` only: indices, or how many of the last ones."""
        if self._keeps:
            return self.base(**inputs, logits_to_keep=keep)
        out = self.base(**inputs)
        if out.logits.ndim == 3:  # else one judgement for each row
            out.logits = out.logits[:, -keep:] if isinstance(keep, int) else out.logits[:, keep]
        return out


class PromptedInputs(Prompted):
    """Virtual embeddings [n, width of the embedding] in front of each row."""

    def __init__(self, base: nn.Module, values: Tensor | None, encoder: nn.Module | None = None) -> None:
        super().__init__(base, values, encoder)
        self._head = next(iter(classification_heads(base)), None)
        self._encodes = encodes(base)
        if self._head is not None and self._encodes:
            raise UsageError(
                f"{type(base).__name__} looks for the end of its input ids, where virtual tokens have none",
                hint="choose a method that leaves the input as it is, such as lora.",
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Documents | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the model's: [rows, length] ids, or [1, total] with ``documents``; logits at the real tokens."""
        if documents is not None:
            return self._packed(input_ids, attention_mask, position_ids, documents, logits_to_keep, kwargs)
        if self._head is not None:
            return self._judge(input_ids, attention_mask, kwargs)
        inputs, mask = self._in_front(input_ids, attention_mask)
        if self._encodes:  # the logits are the decoder's
            return self.base(inputs_embeds=inputs, attention_mask=mask, **kwargs)
        if position_ids is not None:
            count = inputs.shape[1] - input_ids.shape[1]
            ahead = torch.arange(count, device=position_ids.device).expand(position_ids.shape[0], -1)
            kwargs["position_ids"] = torch.cat([ahead, position_ids + count], dim=1)
        count = inputs.shape[1] - input_ids.shape[1]
        keep = logits_to_keep + count if isinstance(logits_to_keep, Tensor) else logits_to_keep or input_ids.shape[1]
        return self._run(keep, {"inputs_embeds": inputs, "attention_mask": mask, **kwargs})

    def _in_front(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[rows, n + length, width] embeddings and their mask."""
        own = cast(Tensor, self.base.get_input_embeddings()(input_ids))  # type: ignore[operator]
        virtual = self.virtual().to(own.dtype).expand(own.shape[0], -1, -1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(virtual.shape[:2]), attention_mask], dim=1)
        return torch.cat([virtual, own], dim=1), attention_mask

    def _judge(self, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """A classifier's output. Its head finds a row's end by the ids, and some bodies count positions by them, so it is given ids in
        front too; what the embedding makes of those is replaced."""
        values = self.virtual()
        count = values.shape[0]
        pad = cast(Any, self.base).config.pad_token_id
        ahead = input_ids.new_full((input_ids.shape[0], count), 0 if pad != 0 else 1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(ahead.shape), attention_mask], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = torch.cat([torch.zeros_like(ahead), kwargs["token_type_ids"]], dim=1)

        def replace(_: nn.Module, __: Any, found: Tensor) -> Tensor:
            return torch.cat([values.to(found.dtype).expand(found.shape[0], -1, -1), found[:, count:]], dim=1)

        handle = cast(Any, self.base).get_input_embeddings().register_forward_hook(replace)
        try:
            return self._run(
                input_ids.shape[1], {"input_ids": torch.cat([ahead, input_ids], 1), "attention_mask": attention_mask, **kwargs}
            )
        finally:
            handle.remove()

    def _packed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        documents: Documents,
        keep: int | Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        own = cast(Tensor, self.base.get_input_embeddings()(input_ids))  # type: ignore[operator]
        virtual = self.virtual().to(own.dtype)
        count, rows, device = virtual.shape[0], len(documents.lengths), own.device
        if documents.shared:
            # All rows share the virtual tokens as well.
            if position_ids is not None:
                kwargs["position_ids"] = torch.cat([torch.arange(count, device=device), position_ids[0] + count])[None]
            keep = keep + count if isinstance(keep, Tensor) else keep
            longer = Documents(documents.lengths, device, documents.shared + count)
            inputs = torch.cat([virtual, own[0]])[None]
            return self._run(keep, {"inputs_embeds": inputs, "attention_mask": attention_mask, "documents": longer, **kwargs})
        lengths = np.asarray(documents.lengths)
        # Real token p of row r moves to p + n (r + 1); the virtual ones fill what is left.
        place = np.arange(documents.total) + count * np.repeat(np.arange(1, rows + 1), lengths)
        order = np.empty(documents.total + count * rows, dtype=np.int64)
        order[np.setdiff1d(np.arange(len(order)), place)] = np.arange(count * rows)
        order[place] = count * rows + np.arange(documents.total)
        take, places = torch.from_numpy(order).to(device), torch.from_numpy(place).to(device)
        # Each row has a copy of its own, so every index is taken once and gradients add up in a fixed order.
        inputs = torch.cat([virtual.repeat(rows, 1), own[0]]).index_select(0, take)[None]
        if position_ids is not None:
            ahead = torch.arange(count, device=device).repeat(rows)
            kwargs["position_ids"] = torch.cat([ahead, position_ids[0] + count]).index_select(0, take)[None]
        # Logits of virtual positions are never computed.
        wanted = places.index_select(0, keep) if isinstance(keep, Tensor) else places[-keep:]
        longer = Documents([length + count for length in documents.lengths], device)
        return self._run(wanted, {"inputs_embeds": inputs, "attention_mask": attention_mask, "documents": longer, **kwargs})

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's ``generate``: prompts padded on the left; the result begins with ``input_ids``."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad():
            inputs, mask = self._in_front(input_ids, attention_mask)
        start = {} if self._encodes else {"input_ids": input_ids}
        if not self._encodes and "max_length" in kwargs:
            # transformers would take the length of the embeddings off it, virtual ones included.
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - input_ids.shape[1]
        return cast(Any, self.base).generate(**start, inputs_embeds=inputs, attention_mask=mask, **kwargs)


class PromptedLayers(Prompted):
    """n virtual keys and values in front of each row, in every layer: [n, 2 layers x heads x width] values, each layer's keys before its
    values.

    Args:
        layers, heads: of the model; the heads are the key-value heads.
    """

    def __init__(self, base: nn.Module, values: Tensor | None, encoder: nn.Module | None, layers: int, heads: int) -> None:
        super().__init__(base, values, encoder)
        self.layers, self.heads = layers, heads

    def prefix(self) -> Prefix:
        """The keys and values as attention takes them."""
        values = self.virtual()
        parts = values.view(values.shape[0], self.layers, 2, self.heads, -1).permute(2, 1, 3, 0, 4)
        return Prefix(parts[0], parts[1])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the model's: [rows, length] ids, or [1, total] with ``documents``."""
        prefix = self.prefix()
        if position_ids is None:
            position_ids = positions(self.base, input_ids)
        kwargs |= {"position_ids": position_ids + prefix.keys.shape[2], "prefix_states": prefix}
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else logits_to_keep or input_ids.shape[1]
        out = self._run(keep, {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})
        self._see(prefix)
        return out

    def _see(self, prefix: Prefix) -> None:
        if len(prefix.used) != self.layers:
            raise UsageError(
                f"{self.layers - len(prefix.used)} of the {self.layers} layers of {type(self.base).__name__} have an attention that "
                "takes no prefix",
                hint="choose a method that does not depend on the attention, such as prompt_tuning or lora.",
            )

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's ``generate``: prompts padded on the left; the result begins with ``input_ids``."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad(), self._attached() as prefix:
            out = cast(Any, self.base).generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self._see(prefix)
        return out

    @contextlib.contextmanager
    def _attached(self) -> Iterator[Prefix]:
        """Every forward pass of the model has the prefix, while this lasts: its cache holds real tokens only."""
        prefix = self.prefix()

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"] + prefix.keys.shape[2]
            return args, {**kwargs, "prefix_states": prefix}

        handle = self.base.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield prefix
        finally:
            handle.remove()


class PromptMethod(Method[C]):
    """Methods with virtual inputs. The options must have ``num_virtual_tokens``; the author writes :meth:`wrap`."""

    caps: ClassVar[Caps] = Caps(mergeable=False, quantized_base=True, identity_at_init=False)

    @classmethod
    def check_recipe(cls, recipe: Any) -> list[tuple[str, str]]:
        faults = super().check_recipe(recipe)
        if recipe.base_model.new_tokens:
            faults.append(("base_model.new_tokens", f"{_no_new_tokens(recipe.method.name)}; choose lora, which trains and saves them"))
        return faults

    def wrap(self, model: nn.Module, ctx: Context) -> Prompted:
        """The wrapper around the frozen ``model``; its parameters may lie on the CPU."""
        raise NotImplementedError

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if ctx.new_token_ids:
            raise UsageError(f"base_model.new_tokens: {_no_new_tokens(self.config.name)}")
        freeze(model)
        new = new_modules(model, ctx)
        wrapper = self.wrap(model, ctx)
        train_whole(model, new)
        device = cast(Any, model).get_input_embeddings().weight.device
        own = [wrapper.encoder] if wrapper.encoder is not None else []
        for parameter in [p for module in own for p in module.parameters()] + list(wrapper.parameters(recurse=False)):
            if parameter.device != device:
                parameter.data = parameter.data.to(device)
        return wrapper.train(model.training)

    def positions_taken(self) -> int:
        return int(cast(Any, self.config).num_virtual_tokens)

    def to_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        heads = {name: tensor for name, tensor in tensors.items() if name.startswith("base.")}
        return {VALUES: cast(Prompted, model).result().to("cpu", torch.float32), **heads}

    def from_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if VALUES in tensors and encodes(model):
            tensors[VALUES] = tensors[VALUES][: self.positions_taken()]
        return tensors

    def file_targets(self, model: nn.Module) -> dict[str, Tensor]:
        heads = {name: target for name, target in super().file_targets(model).items() if name.startswith("base.")}
        return {VALUES: cast(Prompted, model).hold_result(), **heads}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        config = text_config(model)
        return {
            "num_virtual_tokens": self.positions_taken(),
            "num_transformer_submodules": 1,
            "num_layers": config.num_hidden_layers,
            "token_dim": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "modules_to_save": None,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        fine = (None, 1, 2) if fields.get("task_type") == "SEQ_2_SEQ_LM" else (None, 1)
        asked = [f"num_transformer_submodules={n}" for n in [fields.get("num_transformer_submodules")] if n not in fine]
        # PEFT names both heads of classifiers, whichever the model has, and once more with every save.
        if not all(name.rpartition(".")[2] in HEADS for name in fields.get("modules_to_save") or ()):
            asked.append(f"modules_to_save={fields['modules_to_save']!r}")
        if asked:
            raise CheckpointError(f"the adapter uses {', '.join(asked)}, which this version does not compute")
        return {"num_virtual_tokens": fields["num_virtual_tokens"]}


def encodes(model: nn.Module) -> bool:
    """Whether the model is an encoder-decoder."""
    return bool(cast(Any, model).config.is_encoder_decoder)


def positions(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[1 or rows, length] positions that the model gives to ids: from zero, or by a rule of its embedding's (RoBERTa begins after the
    padding's id)."""
    for module in model.modules():
        rule = getattr(module, "create_position_ids_from_input_ids", None)
        if rule is not None:
            return cast(Tensor, rule(input_ids, module.padding_idx))
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


def _no_new_tokens(name: str) -> str:
    return f"{name} trains and saves virtual tokens only, so the embeddings of new tokens would stay at their initial values"


def text_config(model: nn.Module) -> Any:
    """The config of the language model."""
    return cast(Any, model).config.get_text_config()


def from_vocabulary(model: Any, count: int, generator: torch.Generator) -> Tensor:
    """[count, width] float32 embeddings of tokens drawn from the vocabulary."""
    return embeddings(model, torch.randint(0, model.get_input_embeddings().weight.shape[0], (count,), generator=generator))


def embeddings(model: Any, ids: Tensor) -> Tensor:
    """[count, width] float32 embeddings of ``ids``, through the layer: some models scale what the table holds."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        values: Tensor = embedding(ids.to(embedding.weight.device))
        return values.detach().to(torch.float32).clone()


def start_at(last: nn.Linear, hidden: Tensor, values: Tensor) -> None:
    """Change an encoder's last layer by as little as makes it give ``values`` [n, out] for ``hidden`` [n, in], or come closest where the
    encoder is narrower than n. As layers come, they make inputs of the wrong size that hardly differ, and nothing that the model knows."""
    with torch.no_grad():
        missing = values.to(hidden).double() - last(hidden).double()
        change = torch.linalg.pinv(nn.functional.pad(hidden.double(), (0, 1), value=1.0)) @ missing
        last.weight.add_(change[:-1].T)
        last.bias.add_(change[-1])


def initialised(module: nn.Module, ctx: Context, name: str) -> nn.Module:
    """Give every layer of an encoder torch's (and so PEFT's) kind of initial values, as a function of the seed and its name: embeddings are
    normal, linear layers and LSTMs uniform within one over the root of their width."""
    for path, inner in module.named_modules():
        width = cast(int, getattr(inner, "hidden_size", 0) or getattr(inner, "in_features", 0))
        for key, parameter in inner.named_parameters(recurse=False):
            generator = ctx.generator(f"{name}.{path}.{key}")
            with torch.no_grad():
                if isinstance(inner, nn.Embedding):
                    parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator))
                else:
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-1, 1, generator=generator) / math.sqrt(width))
    return module
