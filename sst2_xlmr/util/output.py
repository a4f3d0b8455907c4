"""Printing to a standard output whose reader may be gone."""

from __future__ import annotations

import contextlib
import os
import sys


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
