"""Train the same rows in one, two and four processes over gloo, in float64, and write what each number of them ends with.

    OMP_NUM_THREADS=1 python tests/train/worlds.py FOLDER

Each process is a fork of this one, which has imported everything and computed nothing: starting seven would take longer than the rest.
``FOLDER/<processes>.safetensors`` holds the trained weights of the first process and the learning rate and the rows of each step.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import helpers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from peftcli.data.batching import Plan
from peftcli.methods.kinds import trainable_state

ROWS, STEPS = 8, 5  # in a step, over all processes and both accumulation steps
LENGTHS = [3, 20, 5, 11, 2, 17, 9, 4, 13, 6, 8]  # 11: the last step of an epoch leaves processes without a row


def train(folder: Path) -> None:
    """What one process of ``WORLD_SIZE`` does."""
    processes = int(os.environ["WORLD_SIZE"])
    split = helpers.make_split(LENGTHS)
    model, method = helpers.adapted("lora", "llama", torch.float64, rank=4)
    helpers.stir(model)
    size = ROWS // 2 // processes
    loop = helpers.make_loop(
        model, method, split, folder / "unused", steps=STEPS, batch_size=size, gradient_accumulation_steps=2, scheduler="linear"
    )
    AcceleratorState._reset_state(True)
    loop.accelerator = Accelerator(cpu=True)
    assert loop.accelerator.num_processes == processes
    loop.module = loop.accelerator.prepare_model(loop.module)
    loop.plan = Plan(lengths=split.lengths, batch_size=size, batch_tokens=None, accumulation=2, processes=processes, seed=42)
    rates: list[float] = []
    loop.method.before_step = lambda model, tick: rates.append(loop.optimizer.param_groups[0]["lr"])
    loop.run()
    if loop.accelerator.is_main_process:
        steps = [step for epoch in range(3) for step in loop.plan.epoch(epoch)]
        # As they are taken: all processes in the first accumulation step, then all in the second.
        order = [[row for micro in zip(*step.shares, strict=True) for part in micro for row in part] for step in steps]
        rows = [[*taken, *[-1] * (ROWS - len(taken))] for taken in order]
        found = {name: parameter.detach().clone() for name, parameter in trainable_state(model).items()}
        traced = {"rates": torch.tensor(rates, dtype=torch.float64), "rows": torch.tensor(rows[:STEPS])}
        save_file({**found, **traced}, folder / f"{processes}.safetensors")
    loop.accelerator.wait_for_everyone()


def launch(processes: int, folder: Path) -> None:
    """Fork ``processes`` processes that find each other, and wait for them."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
            try:
                train(folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes


if __name__ == "__main__":
    for count in (1, 2, 4):
        launch(count, Path(sys.argv[1]))
