"""How a program begins and ends: a mistake of the user's is one line and a status, a bug keeps its traceback."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Callable, NoReturn

from sst2_xlmr.util import versions
from sst2_xlmr.util.output import discard_output

# torchrun and SLURM send SIGTERM, a terminal SIGINT, and batch scripts ask for SIGUSR1 before a time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what to do.

    It ends the program with `status`. One that `is_shared` is raised on every rank, and reported by rank 0; one that
    `is_own` is raised by this rank alone, which reports it.
    """

    def __init__(self, text: str, is_shared: bool = False, is_own: bool = False, status: int = 2) -> None:
        super().__init__(text)
        self.is_shared, self.is_own, self.status = is_shared, is_own, status


class Interrupted(Exception):
    """A signal came, on any rank: save the run, and end."""


class Collapsed(Exception):
    """Training has collapsed, and how that shows: save the run, and end."""


def raise_on_all(text: str) -> NoReturn:
    """Raise a `UserError` that every rank raises, and rank 0 reports."""
    raise UserError(text, is_shared=True)


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`, a whole program; a `UserError`, a path without permission and a full disk become one line.

    Of several processes, rank 0 reports an error that all of them know, the first process of a node one that the node
    finds before the processes communicate (a missing file, say), and a rank one that concerns it alone.
    """
    try:
        _prepare_process()
        main()
        if sys.stdout is not None:  # None if it is closed
            sys.stdout.flush()
    except UserError as error:
        _end_with(error)
    except PermissionError as error:  # on looking at a path; where one is written, more is said
        if error.filename is None:
            raise
        _end_with(UserError(f"no permission for {error.filename}; ask its owner, or choose another place"))
    except SystemExit as stop:  # of argparse, or of a run that was stopped, and has been saved and has said so
        end_among_others(int(stop.code or 0))
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has ended
        discard_output()
        _end_at_once(141)  # 128 + SIGPIPE, as of any program
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        discard_output()
        _end_with(UserError(f"cannot write {error.filename or 'the output'}: {error.strerror}; free some space"))
    end_among_others(0)


def _prepare_process() -> None:
    """Make the console take any text, and refuse a Python or torch that cannot work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # torch reads this when it first allocates, and asks for large pages: the optimizer walks through gigabytes.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if problem := versions.unusable():
        raise UserError(problem)


def _end_with(error: UserError) -> NoReturn:
    if error.is_own or os.environ.get("RANK" if error.is_shared else "LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if error.is_own:
        _end_at_once(error.status)  # an orderly exit would wait for the others, which wait for this one, or are lost
    sys.exit(error.status)


def end_among_others(status: int) -> None:
    """End the process at once if it is one of several; all that it has opened must be closed.

    The threads of gloo groups may still be freeing tensors, which needs Python: one run in ten was aborted at its end.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_at_once(status)


def _end_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
