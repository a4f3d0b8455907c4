"""Errors and output: a user's mistake becomes one line, a bug keeps its traceback, and lost output is tolerated."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from typing import Callable, NoReturn

from sst2_xlmr.util import versions

# torchrun and SLURM send SIGTERM, a terminal SIGINT, and batch scripts ask for SIGUSR1 before a time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class UserError(Exception):
    """A user's mistake: one line with the problem, its place and its cure.

    It ends the program with `status`. If it `is_shared`, every rank raises it and rank 0 reports it; if it `is_own`,
    only this rank raises and reports it. `column_option` is the option, if any, that must name another column.
    """

    def __init__(
        self, text: str, is_shared: bool = False, is_own: bool = False, status: int = 2, column_option: str = ""
    ) -> None:
        super().__init__(text)
        self.is_shared, self.is_own, self.status, self.column_option = is_shared, is_own, status, column_option


class Interrupted(Exception):
    """A rank got a signal: the run is to be saved, and ends."""


class Collapsed(Exception):
    """Training has collapsed, for the reason given: the run is to be saved, and ends."""


def raise_on_all(text: str) -> NoReturn:
    """Raise a `UserError` that every rank raises, and rank 0 reports."""
    raise UserError(text, is_shared=True)


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`, a whole program; a `UserError`, a denied permission and a full disk become one line.

    Of several processes, rank 0 reports a shared error, each rank its own error, and the first process of a node any
    other (e.g. a missing file, which all of its processes find).
    """
    # With this, torch requests huge pages: the optimizer walks through gigabytes. It is read at the first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        for stream in (sys.stdout, sys.stderr):  # let the console print any text
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if problem := versions.unusable():
            raise UserError(problem)
        main()
        if sys.stdout is not None:  # None if it is closed
            sys.stdout.flush()
    except UserError as error:
        _end_with(error)
    except ModuleNotFoundError as error:
        if (error.name or "sst2_xlmr").startswith("sst2_xlmr"):
            raise
        cure = f"run `pip install -e .` in the project's folder, or `pip install {error.name}`"
        _end_with(UserError(f"{error.name} is not installed in {sys.prefix}: {cure}"))
    except PermissionError as error:  # while reading; `disk_errors` handles writing
        if error.filename is None:
            raise
        _end_with(UserError(f"no permission for {error.filename}; ask its owner, or choose another path"))
    except SystemExit as stop:  # from argparse, or from a run that has been stopped and saved
        end_among_others(int(stop.code or 0))
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, e.g. `head`, has exited
        discard_output()
        _end_at_once(141)  # 128 + SIGPIPE, as for any program
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        discard_output()
        _end_with(UserError(f"cannot write {error.filename or 'the output'}: {error.strerror}; free some space"))
    end_among_others(0)


def _end_with(error: UserError) -> NoReturn:
    if error.is_own or os.environ.get("RANK" if error.is_shared else "LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if error.is_own:
        _end_at_once(error.status)  # a normal exit would wait for the other ranks, which wait for this one or are lost
    sys.exit(error.status)


def end_among_others(status: int) -> None:
    """Exit at once if this is one of several processes; everything must be closed by now.

    Threads of gloo groups may still be freeing tensors, which needs Python: one run in ten was aborted at its end.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_at_once(status)


def _end_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def discard_output(descriptor: int = 1) -> None:
    """Discard all further output, including what Python has buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def say(text: str) -> None:
    """Print a line. If standard output is lost (its reader has exited, its disk is full), continue without it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            discard_output(sys.stdout.fileno())
            reason = f"cannot write to standard output: {getattr(error, 'strerror', error)}"
            print(f"warning: {reason}; continuing without it", file=sys.stderr)


def print_text(text: str) -> bool:
    """Print lines; returns False if the reader (e.g. `head`) has exited. OSError if the disk is full."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        discard_output(sys.stdout.fileno())
        return False
    return True
