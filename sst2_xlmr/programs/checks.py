"""Checks of a program's options before any work."""

from __future__ import annotations

import os
from pathlib import Path

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import scratch_folder, writing


def refuse(*cases: tuple[object, str]) -> None:
    """Raise a UserError with the text of the first case whose condition holds."""
    for is_wrong, text in cases:
        if is_wrong:
            raise UserError(text)


def check_output(option: str, path: Path, overwrite: bool | None = None, makes_parents: bool = False) -> None:
    """Raise UserError if a file or folder to write already exists, or cannot be written.

    Args:
        overwrite: whether a file may be replaced (or a link, not what it leads to); None if there is no such option.
        makes_parents: whether the folders that it is to be in are made.
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
