"""What ends a run, and how it is said: one line on stderr and an exit status, or a traceback for a bug."""

from __future__ import annotations

import os
import sys
from typing import Callable


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong, where, and what to do.

    Attributes:
        is_shared: whether every rank raises it, because `distributed` has passed it on.
        is_own: whether only this rank raises it, so that it must say it, whatever its number.
    """

    is_shared = False
    is_own = False


class LostContact(Exception):
    """Another process died or hangs; one line, exit status 1."""


class Stopped(Exception):
    """A signal ended the run; it was saved, and said.

    Attributes:
        status: the exit status, 128 + the signal's number, as shells have it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.status = 128 + signal_number


def own_error(text: str) -> UserError:
    """Return an error of this rank alone, which it says itself."""
    error = UserError(text)
    error.is_own = True
    return error


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a `UserError` becomes one line on stderr and exit status 2, anything else keeps its traceback.

    Of several processes only rank 0 says what all know; what a node finds before they talk to one another (a folder
    that is missing there, say), its first process says; what befalls one rank alone, that rank says.
    """
    try:
        main()
    except UserError as error:
        if error.is_own or os.environ.get("RANK" if error.is_shared else "LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if error.is_own:
            sys.stdout.flush()
            os._exit(2)  # leaving in order would wait for the others, who wait for this one
        sys.exit(2)
    except LostContact as error:
        print(f"error: rank {os.environ.get('RANK', '0')}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # leaving in order would wait for the lost process once more
    except Stopped as stop:
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(130)
