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

_FINGERPRINT, _LOCK, _MAY_REPLACE = "fingerprint.json", "lock", "may-replace"
_BLOCK = re.compile(r"[0-9]+-[0-9]{8}")


def shards_of(path: Path) -> Path:
    """Return the folder of an output's shards."""
    return path.with_name(f".{path.name}.shards")


def is_begun(path: Path) -> bool:
    """Whether an output has shards that can be continued."""
    return not shards_of(path).is_symlink() and (shards_of(path) / _FINGERPRINT).is_file()


@contextlib.contextmanager
def open_shards(paths: Sequence[Path], fingerprint: Any, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Make the folder for the outputs' shards, or continue it, and keep other processes from it; on rank 0.

    Args:
        fingerprint: JSON that says what makes the rows; shards with another are not continued.
        resume: whether to keep the blocks that are there.
        overwrite: whether outputs may be replaced, also by whoever continues.

    Raises:
        UserError: if it cannot be written or continued, is not ours, or another process has it.
    """
    folder, content = shards_of(paths[0]), json.dumps([[path.name for path in paths], fingerprint])
    if os.path.lexists(folder) and not is_begun(paths[0]) and not _has_just_begun(folder):
        raise UserError(f"{folder} already exists and is not ours; move it away, or choose another --output")
    try:
        folder.mkdir(exist_ok=True)
        with (folder / _LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its owner may have ended since it was opened, and removed it.
                is_free = os.path.samestat(os.fstat(lock.fileno()), (folder / _LOCK).stat())
            except (BlockingIOError, FileNotFoundError):
                is_free = False
            if not is_free:
                raise UserError(
                    f"another process is writing {paths[0]}; wait for it, stop it, or choose another --output"
                )
            if resume and is_begun(paths[0]):
                if (folder / _FINGERPRINT).read_text(encoding="utf-8") != content:
                    raise UserError(
                        f"the rows in {folder} belong to another model, input, machine or other options; start again"
                        " with --overwrite instead of --resume"
                    )
            else:
                _clear(folder)
                if overwrite:
                    write_text(folder / _MAY_REPLACE, "")
                write_text(folder / _FINGERPRINT, content)
            _check_names(folder, paths)
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


def join_blocks(folder: Path, paths: Sequence[Path], blocks: int) -> None:
    """Make the blocks the output files, and remove the folder.

    Raises:
        UserError: if they cannot be written, or a file has got an output's name since that may not be replaced.
    """
    _check_names(folder, paths)
    try:
        write_text(folder / _MAY_REPLACE, "")  # it may be killed when some have got their names
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


def _check_names(folder: Path, paths: Sequence[Path]) -> None:
    """Refuse to replace a file that has got an output's name since the shards were begun."""
    for path in paths:
        if os.path.lexists(path) and not (folder / _MAY_REPLACE).exists():
            raise UserError(f"{path} already exists; move it away, then continue with --resume")


def _has_just_begun(folder: Path) -> bool:
    """Whether a folder has what a process leaves that is killed before it has written the fingerprint."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and all(file.name == _LOCK or is_scratch(file) for file in folder.iterdir())


def _clear(folder: Path) -> None:
    """Remove blocks, and what a killed process left unfinished."""
    for file in list(folder.iterdir()):
        if _BLOCK.fullmatch(file.name) or is_scratch(file) or file.name == _MAY_REPLACE:
            file.unlink()


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it stays if there is something else in it
        _clear(folder)
        for name in (_LOCK, _FINGERPRINT):
            (folder / name).unlink()
        folder.rmdir()


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"
