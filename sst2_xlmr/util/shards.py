"""Output files that are computed in blocks of rows, survive a kill, and get their names once they are complete.

Until then every block is a file of its own, whole or absent, in a hidden folder beside the first output. The file
`fingerprint.json` in it says what the rows are made of; a folder without it is not ours, and stays as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import atomic_file, cannot_write, is_scratch, write_text

_FINGERPRINT, _LOCK, _COMPLETE = "fingerprint.json", "lock", "complete"
_BLOCK = re.compile(r"[0-9]+-[0-9]{8}")


def shards_of(path: Path) -> Path:
    """Return the folder of an output's shards."""
    return path.with_name(f".{path.name}.shards")


def is_begun(path: Path) -> bool:
    """Whether an output has shards that can be continued."""
    return not shards_of(path).is_symlink() and (shards_of(path) / _FINGERPRINT).is_file()


@contextlib.contextmanager
def open_shards(paths: Sequence[Path], fingerprint: Any, resume: bool) -> Iterator[Path]:
    """Make the folder for the outputs' shards, or continue it, and keep other processes from it; on rank 0.

    Args:
        fingerprint: JSON that says what makes the rows; shards with another are not continued.
        resume: whether to keep the blocks that are there.

    Raises:
        UserError: if it cannot be written or continued, is not ours, or another process has it.
    """
    folder, content = shards_of(paths[0]), json.dumps([[path.name for path in paths], fingerprint])
    if os.path.lexists(folder) and not is_begun(paths[0]):
        raise UserError(f"{folder} already exists and is not ours; move it away, or choose another --output")
    try:
        folder.mkdir(exist_ok=True)
        with (folder / _LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is writing {paths[0]}; wait for it, stop it, or choose another --output"
                ) from None
            if resume and is_begun(paths[0]):
                if (folder / _FINGERPRINT).read_text(encoding="utf-8") != content:
                    raise UserError(
                        f"the rows in {folder} belong to another model, input, machine or other options; start again"
                        " with --overwrite instead of --resume"
                    )
            else:
                _clear(folder)
                write_text(folder / _FINGERPRINT, content)
            try:
                yield folder
            finally:  # it says what an output that is there is not made of
                has_blocks = folder.is_dir() and any(_BLOCK.fullmatch(file.name) for file in folder.iterdir())
                if not has_blocks and not any(map(os.path.lexists, paths)):
                    _remove(folder)
    except OSError as error:
        raise cannot_write(paths[0], error) from None


def write_block(folder: Path, number: int, paths: Sequence[Path], texts: Sequence[str]) -> None:
    """Write a block of rows, one text for every output.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        for output, (path, text) in enumerate(zip(paths, texts)):
            # JSON can hold a lone surrogate, which UTF-8 cannot; it is written as JSON's escape.
            content = text.encode("utf-8", errors="backslashreplace")
            with atomic_file(folder / f"{output}-{number:08d}") as file:
                file.write(gzip.compress(content, mtime=0) if _is_gzipped(path) else content)
    except OSError as error:
        raise cannot_write(path, error) from None


def first_missing(folder: Path, first: int, last: int, outputs: int) -> int:
    """Return the number of the first block, from `first` on, that is not there for all outputs; at most `last`."""
    missing = (
        number
        for number in range(first, last)
        if not all((folder / f"{output}-{number:08d}").is_file() for output in range(outputs))
    )
    return next(missing, last)


def join_blocks(folder: Path, paths: Sequence[Path], blocks: int, overwrite: bool) -> None:
    """Make the blocks the output files, and remove the folder.

    Raises:
        UserError: if they cannot be written, or a file has got an output's name since that may not be replaced.
    """
    try:
        for path in paths:  # a run may have been killed when some had got their names
            if os.path.lexists(path) and not overwrite and not (folder / _COMPLETE).exists():
                raise UserError(f"{path} already exists; move it away, then continue with --resume")
        write_text(folder / _COMPLETE, "")
        for output, path in enumerate(paths):
            with atomic_file(path) as file:
                if _is_gzipped(path) and blocks == 0:
                    file.write(gzip.compress(b"", mtime=0))  # nothing at all is no gzip file
                for number in range(blocks):
                    with (folder / f"{output}-{number:08d}").open("rb") as block:
                        shutil.copyfileobj(block, file, 1 << 20)
    except OSError as error:
        raise cannot_write(path, error) from None
    _remove(folder)


def _clear(folder: Path) -> None:
    """Remove blocks, and what a killed process left unfinished."""
    for file in list(folder.iterdir()):
        if _BLOCK.fullmatch(file.name) or is_scratch(file) or file.name == _COMPLETE:
            file.unlink()


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it stays if there is something else in it
        _clear(folder)
        for name in (_LOCK, _FINGERPRINT):
            (folder / name).unlink()
        folder.rmdir()


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"
