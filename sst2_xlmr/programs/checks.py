"""Checks of a program's options, before any work."""

from __future__ import annotations

import os
from pathlib import Path

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import scratch_folder, writing


def refuse(*cases: tuple[object, str]) -> None:
    """Raise UserError with the text of the first (condition, text) whose condition holds."""
    for condition, text in cases:
        if condition:
            raise UserError(text)


def check_output(option: str, path: Path, overwrite: bool | None = None, makes_parents: bool = False) -> None:
    """Raise UserError if an output file or folder already exists, or cannot be written.

    Args:
        overwrite: whether an existing file or link may be replaced; None if the program has no --overwrite.
        makes_parents: whether to create missing parent folders.
    """
    if os.path.lexists(path) and (not overwrite or not path.is_file()):
        cure = ", or replace it with --overwrite" if overwrite is False and path.is_file() else ""
        raise UserError(f"{option} {path} already exists; choose another name{cure}")
    with writing(path):
        path = path.absolute()
        if makes_parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path):
            pass
