"""Lines on standard output, whose reader may have gone."""

from __future__ import annotations

import contextlib
import os
import sys


def discard_output(descriptor: int = 1) -> None:
    """Discard all further output, and what Python still buffers."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def say(text: str) -> None:
    """Print a line. If standard output has gone, its reader ended or its disk full, go on without it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            discard_output(sys.stdout.fileno())
            reason = f"cannot write to standard output: {getattr(error, 'strerror', error)}"
            print(f"warning: {reason}; continuing without it", file=sys.stderr)


def print_text(text: str) -> bool:
    """Print lines; returns whether anyone reads them, `head` may have ended. An OSError if the disk is full."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        discard_output(sys.stdout.fileno())
        return False
    return True
