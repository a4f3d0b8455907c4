"""Lines on standard output, whose reader may have gone."""

from __future__ import annotations

import contextlib
import os
import sys


def say(text: str) -> None:
    """Print a line. If standard output has gone, its reader ended or its disk full, go on without it."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also for what Python still buffers
        with contextlib.suppress(OSError):
            reason = f"cannot write to standard output: {error.strerror}"
            print(f"warning: {reason}; continuing without it", file=sys.stderr)


def print_text(text: str) -> bool:
    """Print lines; returns whether anyone reads them. A reader that has ended, `head` say, is no error.

    Raises:
        OSError: if the disk is full.
    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also for what Python still buffers
        if not isinstance(error, BrokenPipeError):
            raise
        return False
    return True
