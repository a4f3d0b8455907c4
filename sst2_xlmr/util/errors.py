"""How a run ends early: one line on stderr and an exit status, or a traceback for a bug."""

from __future__ import annotations

import os
import signal
import sys
from typing import Callable, NoReturn


# What ends a run in good order: torchrun and SLURM send SIGTERM, a terminal SIGINT; SIGUSR1 is what batch scripts ask for
# before a time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what to do.

    Attributes:
        is_shared: whether every rank raises it, because `distributed` has passed it on.
        is_own: whether only this rank raises it, and so must report it, whatever its number.
    """

    is_shared = False
    is_own = False


class Interrupted(Exception):
    """A signal came, on any rank; the run is to be saved and ended."""


class Collapsed(Exception):
    """Training has collapsed, and the run is to be saved and ended; says how that shows."""


class LostContact(Exception):
    """Another process died or hangs; one line, exit status 1."""


class Stopped(Exception):
    """A signal ended the run, which has been saved and has said so.

    Attributes:
        status: the exit status, 128 + the signal's number, as in shells.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.status = 128 + signal_number


def raise_here(text: str) -> NoReturn:
    """Raise a `UserError` of this rank alone, which reports it itself."""
    error = UserError(text)
    error.is_own = True
    raise error


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`, a whole program; a `UserError` becomes one line and exit status 2, a bug keeps its traceback.

    A path without permission, which any look at the file system may meet, becomes one line as well.

    Of several processes, rank 0 reports an error that all of them know. One that a node finds before the processes
    communicate (a missing folder, say) is reported by the first process of that node, and one that concerns a single
    rank by that rank.
    """
    try:
        main()
    except UserError as error:
        _end_with(error)
    except PermissionError as error:  # on looking at a path; where one is written, more is said
        if error.filename is None:
            raise
        _end_with(UserError(f"no permission for {error.filename}; ask its owner, or choose another place"))
    except LostContact as error:
        print(f"error: rank {os.environ.get('RANK', '0')}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        _end_at_once(1)  # an orderly exit would wait for the lost process again
    except Stopped as stop:
        end_among_others(stop.status)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(130)
    end_among_others(0)


def _end_with(error: UserError) -> None:
    if error.is_own or os.environ.get("RANK" if error.is_shared else "LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if error.is_own:
        _end_at_once(2)  # an orderly exit would wait for the others, which wait for this one
    sys.exit(2)


def end_among_others(status: int) -> None:
    """End the process at once if it is one of several; all that it has opened must be closed.

    The threads of torch's gloo groups may still be freeing tensors, which needs Python. Under torch 2.13 one run in ten
    was aborted, after its work was done, because Python was gone by then.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end_at_once(status)


def _end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
