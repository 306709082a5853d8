"""``recipe.lock``: everything that the bytes of a run follow from, by hash and by version.

Two locks that are equal stand for the same run. It holds no path and no clock, so the same recipe over the same files gives the same
text on every machine of one kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from peftcli import environment
from peftcli.data.prepare import Prepared
from peftcli.errors import CheckpointError, NotRepeatable
from peftcli.interchange import hf_peft
from peftcli.model.load import Opened
from peftcli.model.source import file_sha256
from peftcli.plan import count_steps, decisive, epochs_of, make_plan
from peftcli.recipe.schema import Recipe
from peftcli.report.files import write_text_atomically
from peftcli.report.schema import Environment, Part, Sha256

NAME = "recipe.lock"
# Facts of the environment that no byte of a result depends on.
_IDLE = ("platform", "fingerprint")


class LockedModel(Part):
    """The base model."""

    revision: str | None = Field(description="Commit of a hub model.")
    weights_sha256: Sha256 | None = Field(description="Of the weight file(s) of a local model.")
    config_sha256: Sha256 | None = Field(description="Of a local model's config.json.")
    dtype: str


class LockedTokenizer(Part):
    """What turns text into tokens."""

    sha256: Sha256
    chat_template_sha256: Sha256 | None


class LockedFile(Part):
    """A data file, in the order of reading."""

    name: str
    sha256: Sha256


class Lock(Part):
    """The whole lock; the fields in the order in which differences are told."""

    lock_version: Literal[1] = 1
    base_model: LockedModel
    tokenizer: LockedTokenizer
    data: list[LockedFile]
    init_adapter_sha256: Sha256 | None = Field(description="Of the weights that the run starts from.")
    recipe: dict[str, Any] = Field(description="Every setting that the weights depend on, by its dotted key.")
    seed: int
    processes: int
    steps: int
    batch_order_sha256: Sha256 = Field(description="Of the row numbers in the order of the steps.")
    environment: Environment

    def text(self) -> str:
        """The lock as the file holds it: the same lock, the same bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def make_lock(recipe: Recipe, opened: Opened, data: Prepared, processes: int, *, init_adapter: Path | None = None) -> Lock:
    """The lock of a run that is about to begin.

    Args:
        recipe: with what the rows have settled. ``opened``, ``data``: its base model and rows.
        init_adapter: folder of the run or adapter whose weights it starts from.

    Raises:
        CheckpointError: there is no such adapter.
    """
    plan = make_plan(recipe, data, processes)
    steps = count_steps(recipe, plan)
    source = opened.source
    config = Path(source.location) / "config.json"
    return Lock(
        base_model=LockedModel(
            revision=None if source.is_local else getattr(opened.config, "_commit_hash", None) or opened.section.revision,
            weights_sha256=source.sha256(),
            config_sha256=file_sha256(config) if source.is_local and source.gguf_file is None and config.is_file() else None,
            dtype=str(opened.dtype).removeprefix("torch."),
        ),
        tokenizer=_tokenizer(opened.tokenizer),
        data=[LockedFile(name=Path(path).name, sha256=digest) for path, digest in data.files],
        init_adapter_sha256=None if init_adapter is None else file_sha256(_weights(init_adapter)),
        recipe=decisive(recipe),
        seed=recipe.train.seed,
        processes=processes,
        steps=steps,
        batch_order_sha256=plan.digest(epochs_of(plan, steps)),
        environment=environment.describe(opened.device, deterministic=recipe.train.deterministic),
    )


def _weights(adapter: Path) -> Path:
    found = next((folder / hf_peft.WEIGHTS for folder in (adapter / "adapter", adapter) if (folder / hf_peft.WEIGHTS).is_file()), None)
    if found is None:
        raise CheckpointError(f"--init-adapter: {adapter} holds no {hf_peft.WEIGHTS}", hint="name a run's folder, or an adapter's.")
    return found


def _tokenizer(tokenizer: Any) -> LockedTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else _settled(backend)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    return LockedTokenizer(sha256=_digest([state, special]), chat_template_sha256=None if template is None else _digest(template))


def _settled(backend: Any) -> str:
    """The tokenizer as text, which lists everything in an order of its own, without truncation and padding: both are left by the last call,
    and every call of ours says for itself what it wants."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    text: str = backend.to_str()
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)
    return text


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_lock(path: Path) -> Lock:
    """Read a lock.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Lock.model_validate(value)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", hint="`peftcli lock RECIPE` writes one, and so does every run.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise CheckpointError(
            f"{path} is no lock of this version: {place}: {first['msg']}", hint="write it anew: peftcli lock RECIPE"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock, whole or not at all."""
    write_text_atomically(path, lock.text())


def differences(locked: Lock, here: Lock) -> list[str]:
    """What differs, one line each: what was locked, and what is here. Empty for equal locks."""
    before, now = dict(_facts(locked)), dict(_facts(here))
    names = dict.fromkeys([*before, *now])
    return [
        f"{name}: locked {_shown(before, name)}, here {_shown(now, name)}" for name in names if _shown(before, name) != _shown(now, name)
    ]


def refuse(locked: Lock, here: Lock, where: str) -> None:
    """Raise :class:`NotRepeatable` where the locks differ, naming everything that does.

    Args:
        where: the lock's place, for the message.
    """
    found = differences(locked, here)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise NotRepeatable(
            f"this is not what {where} locked:{lines}", hint="restore what differs, or lock anew what is there: peftcli lock RECIPE"
        )


def _facts(lock: Lock) -> Iterator[tuple[str, Any]]:
    """Name and value of everything in a lock, in the order of telling."""
    yield from _named("base model", lock.base_model)
    yield from _named("tokenizer", lock.tokenizer)
    for number, file in enumerate(lock.data, start=1):
        yield f"data file {number} ({file.name}) sha256", file.sha256
    yield "initial adapter sha256", lock.init_adapter_sha256
    yield from lock.recipe.items()
    yield "processes", lock.processes
    yield "steps", lock.steps
    yield "batch order sha256", lock.batch_order_sha256
    for name, value in _named("environment", lock.environment):
        if name.split()[-1] not in _IDLE:
            yield name, value


def _named(title: str, part: Part) -> Iterator[tuple[str, Any]]:
    for name, value in part.model_dump(mode="json").items():
        yield f"{title} {name.replace('_', ' ')}", value


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return "nothing" if name not in facts else json.dumps(facts[name], ensure_ascii=False, sort_keys=True)
