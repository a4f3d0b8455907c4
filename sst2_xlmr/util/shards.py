"""Results in shards of rows that survive a kill: JSON files in a hidden folder beside the output.

Its `fingerprint.json` identifies input, model and options, and the writing process locks it; a folder without one
belongs to another program and is left alone.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import is_scratch, write_errors

_FINGERPRINT, _SHARDS = "fingerprint.json", "[0-9]" * 8 + ".json"


def shards_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.shards")


def has_shards(output: Path) -> bool:
    """Whether an unfinished output has shards."""
    return not shards_of(output).is_symlink() and (shards_of(output) / _FINGERPRINT).is_file()


@contextlib.contextmanager
def open_shards(output: Path, fingerprint: Any, resume: bool) -> Iterator[Path]:
    """Create or continue the folder of an output's shards, and lock it; UserError if it is another's, or in use."""
    folder, content = shards_of(output), json.dumps(fingerprint)
    with contextlib.ExitStack() as stack:
        with write_errors(output):
            is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
            if os.path.lexists(folder) and not is_empty and not has_shards(output):
                raise UserError(f"{folder} already exists and is not ours; move it away, or choose another --output")
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder / _FINGERPRINT, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(descriptor, "r+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(file.fileno()).st_nlink:  # the other process has just finished, and removed it
                    raise BlockingIOError
            except BlockingIOError:
                raise UserError(f"another process is writing {output}; wait, or choose another --output") from None
            previous = file.read()
            if resume and previous not in ("", content):
                problem = f"the rows in {folder} belong to another model, input, machine or other options"
                raise UserError(f"{problem}; start again with --overwrite instead of --resume")
            if not resume or not previous:
                _clear(folder)
                file.seek(0)
                file.truncate()
                file.write(content)
                file.flush()
        try:
            yield folder
        finally:  # if an older output exists, even an empty folder shows that the new one is unfinished
            if not any(folder.glob(_SHARDS)) and not os.path.lexists(output):
                remove_shards(folder)


def shard_file(folder: Path, number: int) -> Path:
    """Return the file for a chunk's results, which are JSON."""
    return folder / f"{number:08d}.json"


def remove_shards(folder: Path) -> None:
    """Remove the folder, unless it holds other files."""
    with contextlib.suppress(OSError):
        _clear(folder)
        (folder / _FINGERPRINT).unlink()
        folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove the shards, and the unfinished files of a killed process."""
    for file in [*folder.glob(_SHARDS), *filter(is_scratch, folder.iterdir())]:
        file.unlink()
