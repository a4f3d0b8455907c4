"""`metrics.jsonl`: an entry to a line, on the disk at once; `training.run_folder.read_metrics` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util.files import write_text


def open_metrics(path: Path, first_step: int, written_again: list[str]) -> TextIO:
    """Open the file for appending, without the entries that a run resumed at `first_step` will write again.

    Args:
        written_again: splits that will be evaluated (once more) at `first_step`.

    Raises:
        OSError: if it cannot be written.
    """
    kept = [
        entry
        for entry in read_metrics(path)
        if entry["step"] < first_step or (entry["step"] == first_step and entry.get("split") not in written_again)
    ]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return path.open("a", encoding="utf-8")


def append(file: TextIO, entry: dict[str, Any]) -> None:
    """Write an entry; a resumed run does not write again what came before its checkpoint, so nothing is held back.

    Raises:
        OSError: if it cannot be written.
    """
    file.write(json.dumps(entry) + "\n")
    file.flush()
