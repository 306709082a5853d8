"""Run recipes one after another in every process of one launch, and write what each process holds at the end of each.

    python -m torch.distributed.run --nproc-per-node 2 tests/train/many_runs.py ONE.yaml TWO.yaml ...

Starting processes costs more than a tiny run, so that one launch serves all methods. Beside ``recipe.yaml`` of a run in ``DIR`` each
process leaves ``DIR.rank-N.safetensors``: every parameter of its model, frozen ones too, and the method's own state.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from peftcli.recipe.load import load_recipe
from peftcli.report.progress import NullProgress
from peftcli.run import Options, train
from peftcli.train.loop import Loop


def main() -> None:
    """Run every recipe that the command line names."""
    plain = Loop.run
    held: dict[str, Any] = {}

    def run(self: Loop, resumed: Any = None) -> Any:
        progress = plain(self, resumed)
        held.update({f"model.{name}": p.detach().clone() for name, p in self.model.named_parameters()})
        held.update({f"state.{name}": t.clone() for name, t in self.method.state().items()})
        return progress

    Loop.run = run  # type: ignore[method-assign]
    # A run's end leaves the group of processes, and a process cannot join it again: it stays for the next run.
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    for path in sys.argv[1:]:
        held.clear()
        loaded = load_recipe(Path(path))
        train(loaded, NullProgress(), Options())
        out = loaded.recipe.output_dir
        save_file({name: t.contiguous() for name, t in held.items()}, f"{out}.rank-{os.environ['RANK']}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
