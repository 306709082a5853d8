"""Several processes on this machine, through torch's own launcher. Imports no torch until it launches."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import uuid

_LAUNCHER = "PEFTCLI_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def inside() -> bool:
    """Whether a launcher (`torchrun`, `accelerate launch`, or ours) started this process."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def follow_launcher() -> None:
    """In a process that :func:`spawn` started: end when the launcher is killed, instead of waiting for the others for ever."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or not inside() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it was killed before this was asked for
        os._exit(128 + signal.SIGKILL)


def spawn(processes: int) -> int:
    """Run this command again in ``processes`` processes; returns the exit code of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_LAUNCHER] = str(os.getpid())
    # Processes that share the cores with as many threads as if alone only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # Accelerate passes torch the older name of an option.
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:`broadcast_buffers`:FutureWarning"]))
    # The processes say themselves what ails them; the launcher would add a page of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            run_id=uuid.uuid4().hex,
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"timeout": 300},
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "peftcli", *sys.argv[1:])
        except ChildFailedError as error:
            codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
            # The launcher ends the others by SIGTERM: they die of it (-15), or say that they were stopped (143).
            told = next((code for code in codes if 0 < code < 128), None)
            killed = next((code for code in codes if code < 0 and code != -signal.SIGTERM), None)
            if told is None and killed is not None:
                sys.stderr.write(f"error: one of the {processes} processes was killed by {signal.Signals(-killed).name}\n")
            code = told or killed or codes[0]
            return code if code > 0 else 128 - code
        except SignalException as error:
            # The launcher passed the signal on and waited: the processes have written their checkpoint.
            return 128 + int(error.sigval)
    return 0
