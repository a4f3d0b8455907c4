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
from sst2_xlmr.util.files import atomic_file, is_scratch, write_text, writing

_FINGERPRINT, _LOCK = "fingerprint.json", "lock"
_MAY_REPLACE = "may-replace"  # the outputs, as was asked for, or since they are this run's own
_BLOCK = re.compile(r"[0-9]+-[0-9]{8}")


def shards_of(path: Path) -> Path:
    """Return the folder of an output's blocks."""
    return path.with_name(f".{path.name}.shards")


def is_begun(path: Path) -> bool:
    """Whether an output has blocks that can be continued."""
    return not shards_of(path).is_symlink() and (shards_of(path) / _FINGERPRINT).is_file()


@contextlib.contextmanager
def open_shards(paths: Sequence[Path], fingerprint: Any, resume: bool, overwrite: bool = False) -> Iterator[Path]:
    """Make the folder of the outputs' blocks, or continue it, and keep other commands from it; on rank 0.

    Args:
        fingerprint: JSON that says what makes the rows; blocks with another are not continued.
        resume: whether to keep the blocks that are there.
        overwrite: whether outputs that are there may be replaced; a resumed run may what the first one might.

    Raises:
        UserError: if it cannot be written or continued, is not ours, or another command has it.
    """
    folder, content = shards_of(paths[0]), json.dumps([[path.name for path in paths], fingerprint])
    with contextlib.ExitStack() as stack:
        with writing(paths[0]):
            if os.path.lexists(folder) and not is_begun(paths[0]) and not _is_new(folder):
                raise UserError(f"{folder} already exists and is not ours; move it away, or choose another --output")
            folder.mkdir(exist_ok=True)
            lock = stack.enter_context((folder / _LOCK).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(lock.fileno()).st_nlink:  # the other one has just finished, and removed it
                    raise BlockingIOError
            except BlockingIOError:
                cure = "wait for it, stop it, or choose another --output"
                raise UserError(f"another process is writing {paths[0]}; {cure}") from None
            if not resume or not is_begun(paths[0]):
                _clear(folder)
                if overwrite:
                    write_text(folder / _MAY_REPLACE, "")
                write_text(folder / _FINGERPRINT, content)
            elif (folder / _FINGERPRINT).read_text(encoding="utf-8") != content:
                raise UserError(
                    f"the rows in {folder} belong to another model, input, machine or other options; start again with"
                    " --overwrite instead of --resume"
                )
        try:
            yield folder
        finally:  # without blocks it still says that an output which is there is not the result
            has_blocks = folder.is_dir() and any(_BLOCK.fullmatch(file.name) for file in folder.iterdir())
            if not has_blocks and not any(map(os.path.lexists, paths)):
                _remove(folder)


def write_block(folder: Path, number: int, paths: Sequence[Path], texts: Sequence[str]) -> None:
    """Write a block of rows, one text for every output; `UserError` if it cannot be written."""
    for output, (path, text) in enumerate(zip(paths, texts)):
        # JSON can hold a lone surrogate, which UTF-8 cannot; it is written as JSON's escape.
        content = text.encode("utf-8", errors="backslashreplace")
        with writing(path), atomic_file(_block(folder, output, number)) as file:
            file.write(gzip.compress(content, mtime=0) if _is_gzipped(path) else content)


def first_missing(folder: Path, first: int, last: int, outputs: int) -> int:
    """Return the number of the first block, from `first` on, that is not there for all outputs; at most `last`."""
    for number in range(first, last):
        if not all(_block(folder, output, number).is_file() for output in range(outputs)):
            return number
    return last


def join_blocks(folder: Path, paths: Sequence[Path], blocks: int) -> None:
    """Make the blocks the output files, and remove the folder.

    Raises:
        UserError: if they cannot be written, or a file has got an output's name since that may not be replaced.
    """
    for path in filter(os.path.lexists, paths):
        if not (folder / _MAY_REPLACE).exists():
            raise UserError(f"{path} already exists; move it away, then continue with --resume")
    with writing(folder):
        write_text(folder / _MAY_REPLACE, "")  # if this is killed when some have got their names
    for output, path in enumerate(paths):
        with writing(path), atomic_file(path) as file:
            if _is_gzipped(path) and blocks == 0:
                file.write(gzip.compress(b"", mtime=0))  # nothing at all is no gzip file
            for number in range(blocks):
                with _block(folder, output, number).open("rb") as block:
                    shutil.copyfileobj(block, file, 1 << 20)
    _remove(folder)


def _block(folder: Path, output: int, number: int) -> Path:
    return folder / f"{output}-{number:08d}"


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _is_new(folder: Path) -> bool:
    """Whether it is as a process leaves it that is killed before it has written the fingerprint."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and all(file.name in (_LOCK, _MAY_REPLACE) or is_scratch(file) for file in folder.iterdir())


def _clear(folder: Path) -> None:
    """Remove blocks, and what a killed process left unfinished."""
    for file in list(folder.iterdir()):
        if _BLOCK.fullmatch(file.name) or is_scratch(file) or file.name == _MAY_REPLACE:
            file.unlink()


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it stays if there is something else in it
        _clear(folder)
        for name in (_FINGERPRINT, _LOCK):
            (folder / name).unlink()
        folder.rmdir()
