"""How a command ends: one message and a documented exit code, and nothing on the terminal that the environment keeps secret."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from peftcli.errors import CheckpointError, OutOfMemoryError, PeftcliError, TrainingError
from peftcli.redact import redact

# What a full, failing or read-only disk answers.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# How torch names what it refuses in deterministic mode.
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


def run(app: Callable[[], Any]) -> None:
    """Run the command line ``app``; a user's mistake ends in one message, never in a traceback."""
    with contextlib.redirect_stdout(_Clean(sys.stdout)), contextlib.redirect_stderr(_Clean(sys.stderr)):
        _run(app)


def _run(app: Callable[[], Any]) -> None:
    try:
        app()
    except PeftcliError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        _fail(_out_of_memory())
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
            _fail(_out_of_memory())
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f"{error.filename}: " if error.filename else ""
            _fail(CheckpointError(f"{where}{error.strerror}", hint="free some space, or choose another output_dir; --resume goes on."))
        if isinstance(error, RuntimeError) and (found := _NOT_DETERMINISTIC.match(str(error))):
            message = f"train.deterministic: torch has no deterministic path for {found[1]} on this device"
            _fail(
                TrainingError(message, hint="set train.deterministic=false to allow it; the same recipe then gives other bytes each time.")
            )
        # Python's own last word would go past the stream that hides secrets.
        sys.stderr.write(traceback.format_exc())
        sys.exit(1)
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None or isinstance(error, SystemExit):
            raise
        sys.stderr.write(f"{error}\nhint: --resume goes on from there.\n")
        sys.exit(code)


class _Clean:
    """A text stream from which everything that is or looks like a secret is taken out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _fail(error: PeftcliError) -> NoReturn:
    from rich.console import Console
    from rich.text import Text

    from peftcli import launch

    if launch.rank():
        # Mostly the first process fails in the same way and says so; then the launcher ends this one before it repeats it.
        time.sleep(10.0)
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), error.hint))
    sys.exit(error.exit_code)


def _out_of_memory() -> OutOfMemoryError:
    return OutOfMemoryError(
        "memory ran out",
        hint="lower train.batch_size (and raise train.gradient_accumulation_steps), lower dataset.max_length, "
        "set train.gradient_checkpointing=true, or base_model.quantization=nf4; `peftcli check RECIPE` estimates the need.",
    )
