"""The commands besides training; each module has main(argv)."""

from __future__ import annotations

import os
import sys

from sst2_xlmr.util.errors import UserError


def print_text(text: str) -> bool:
    """Print lines on standard output, whatever its encoding; returns whether anyone reads them.

    Raises:
        UserError: if the disk is full. That the reader has ended, `head` say, is no error: it does not change a result.
    """
    try:
        try:
            print(text, end="", flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still buffers
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot write to standard output: {error.strerror}") from None
        return False
    return True
