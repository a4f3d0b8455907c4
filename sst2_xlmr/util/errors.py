"""Errors and output: a user's mistake becomes one line, a bug keeps its traceback, a closed output stops nothing."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from sst2_xlmr.util import versions

# torchrun and SLURM send SIGTERM, a terminal SIGINT, and batch scripts ask for SIGUSR1 before a time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(eq=False)
class UserError(Exception):
    """A user's mistake: one line with the problem, its place and its fix."""

    text: str
    # Every rank raises it, and rank 0 reports it. If neither flag is set, local rank 0 of each node reports it.
    on_all_ranks: bool = False
    on_this_rank: bool = False  # only this rank raises it, and reports it
    status: int = 2  # with which the program ends; HTTP's for a request that is refused
    column_option: str = ""  # the option, if any, that must name another column


class Interrupted(Exception):
    """A rank got a signal: the run is to be saved, and ends."""


class Collapsed(Exception):
    """Training has collapsed, for the reason given: the run is to be saved, and ends."""


def raise_on_all(text: str) -> NoReturn:
    """Raise a `UserError` that every rank raises, and rank 0 reports."""
    raise UserError(text, on_all_ranks=True)


def refuse(*cases: tuple[object, str]) -> None:
    """Raise UserError with the text of the first (condition, text) whose condition holds."""
    for condition, text in cases:
        if condition:
            raise UserError(text)


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`, a whole program; a `UserError`, a denied permission and a full disk become one line."""
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
        if isinstance(error.__context__, BrokenPipeError):
            discard_output()
        _end_with(error)
    except ModuleNotFoundError as error:
        if (error.name or "sst2_xlmr").startswith("sst2_xlmr"):
            raise
        fix = f"run `pip install -e .` in the project's folder, or `pip install {error.name}`"
        _end_with(UserError(f"{error.name} is not installed in {sys.prefix}: {fix}"))
    except PermissionError as error:  # while reading; `write_errors` handles writing
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
    if error.on_this_rank or os.environ.get("RANK" if error.on_all_ranks else "LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if error.on_this_rank:
        _end_at_once(error.status)  # a normal exit would wait for the other ranks, which wait for this one or are lost
    sys.exit(error.status)


def end_among_others(status: int) -> None:
    """Exit at once if this is one of several processes; everything must be closed by now."""
    # Threads of gloo groups may still be freeing tensors, which needs Python: one run in ten was aborted at its end.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_at_once(status)


def _end_at_once(status: int) -> NoReturn:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it is closed
        stream.flush()
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
