"""``peftcli export``: an adapter's weights in the layout of another library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn

from peftcli.commands.merge import SPACE, check_output
from peftcli.errors import UsageError
from peftcli.interchange import adapter_hub, hf_peft
from peftcli.methods.base import Context
from peftcli.model.load import load_base, open_base
from peftcli.output import put_in_place
from peftcli.result import Place, locate

FORMATS = ("adapters", "peft")


def run(path: Path, output: Path, *, form: str, name: str, base_model: str | None, overwrite: bool, trust_remote_code: bool) -> None:
    """Read, convert and write; see the command's help for the arguments."""
    if form not in FORMATS:
        raise UsageError(f"--format: {form!r} is not one of {', '.join(FORMATS)}")
    check_output(output, None, overwrite=overwrite)
    place = locate(path, base_model)
    if place.adapter is None:
        raise UsageError(f"{path} holds a whole model, not an adapter", hint="it is an ordinary model folder already.")
    opened = open_base(place.section.model_copy(update={"new_tokens": []}), base_dir=place.base_dir, trust_remote_code=trust_remote_code)
    write: Callable[[Path], object]
    if form == "peft":
        write = partial(_write_peft, place=place, base=load_base(opened, auto_model=place.task.auto_model, head=place.task.head()).model)
    else:
        config = opened.config
        write = partial(
            adapter_hub.write,
            adapter=place.adapter,
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            model_class=(config.architectures or [type(config).__name__.replace("Config", "Model")])[0],
            name=name,
        )
    put_in_place(output, write, hint=SPACE)
    Console().print(f"{output}", markup=False)


def _write_peft(folder: Path, *, place: Place, base: nn.Module) -> None:
    assert place.adapter is not None
    model = hf_peft.apply_adapter(base, place.adapter, Context())
    section = place.section
    hf_peft.save_adapter(
        folder, model, place.adapter.method, base_model=section.name, revision=section.revision, task_type=place.task.peft_type
    )
