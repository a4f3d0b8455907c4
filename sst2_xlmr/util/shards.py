"""Output files that grow by whole blocks of rows, survive a kill, and get their names once they are complete."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import gzip
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import cannot_write, sync_folder, write_text

_SECONDS_BETWEEN_NOTES = 5.0


class GrowingFiles:
    """One process's parts of some output files, each beside its place; see `open_parts`.

    Attributes:
        blocks: how many blocks are in the parts, those of an earlier process included.
    """

    def __init__(self, paths: Sequence[Path], recipe: Any, rank: int, resume: bool) -> None:
        self._paths = paths
        self._parts = [part_of(path, rank) for path in paths]
        self._is_gzipped = [path.suffix.lower() == ".gz" for path in paths]
        self._state = state_of(self._parts[0])
        self._recipe = {"files": [path.name for path in paths], "rows": recipe}
        self.blocks = 0
        sizes = [0] * len(paths)
        with ExitStack() as stack:
            self._files = [stack.enter_context(_lock(self._parts[0]))]
            state = self._read_state() if resume else None
            self._files += [stack.enter_context(_lock(part)) for part in self._parts[1:]]
            self._is_worth_keeping = state is not None
            if state is not None:
                self.blocks, sizes = state["blocks"], state["bytes"]
            else:  # noted before anything else, so that no other rows, nor a file that is there, pass for the result
                _remove([state_of(part) for part in self._parts[1:]])
                self._write_state(sizes)
            for file, size in zip(self._files, sizes):
                file.truncate(size)  # what was written after the last note may be half a row
                file.seek(size)
            self._opened = stack.pop_all()
        self._noted_at = time.monotonic()

    def _read_state(self) -> dict[str, Any] | None:
        """Return what was noted last; None if it was killed before that."""
        try:
            state: dict[str, Any] = json.loads(self._state.read_text(encoding="utf-8"))
            is_whole = all(part.stat().st_size >= size for part, size in zip(self._parts, state["bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            return None
        if state.get("recipe") != json.loads(json.dumps(self._recipe)):
            raise UserError(
                f"{self._parts[0]} was begun with another model, input, machine or other options; --overwrite"
                " instead of --resume begins again"
            )
        return state

    def append(self, texts: Sequence[str]) -> None:
        """Add one block to every file, and every few seconds note on the disk how far they are."""
        for file, is_gzipped, text in zip(self._files, self._is_gzipped, texts):
            # JSON can hold a lone surrogate, which UTF-8 cannot; it is written as JSON's escape.
            content = text.encode("utf-8", errors="backslashreplace")
            # Compressed block by block, so that a file that was continued has the same bytes.
            file.write(gzip.compress(content, mtime=0) if is_gzipped else content)
        self.blocks += 1
        if time.monotonic() - self._noted_at > _SECONDS_BETWEEN_NOTES:
            self.note()

    def note(self) -> None:
        """Make what is there survive a kill."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._write_state([file.tell() for file in self._files])
        self._is_worth_keeping, self._noted_at = True, time.monotonic()

    def _write_state(self, sizes: list[int]) -> None:
        write_text(self._state, json.dumps({"recipe": self._recipe, "blocks": self.blocks, "bytes": sizes}))

    def close(self) -> None:
        """Close the parts, and remove them if no rows were noted.

        They stay if an output file is there already: without the note, `--resume` would take that file for the result.
        """
        if not self._is_worth_keeping and not any(path.exists() for path in self._paths):
            _remove([self._state, *self._parts])
        with contextlib.suppress(OSError):
            self._opened.close()


def _lock(part: Path) -> BinaryIO:
    """Open a part, and lock it for as long as the returned file is open and this process lives.

    The lock is that of `flock`, which closing the same file elsewhere in this process does not end (see `join_parts`).

    Raises:
        UserError: if another process holds it.
    """
    file = part.open("ab")  # does not truncate: the rows may be another process's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(file.fileno()), part.stat())  # it may just have got its final name
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    except OSError:
        file.close()
        raise
    if not is_ours:
        file.close()
        raise UserError(f"another process is writing {part}; wait for it, stop it, or choose another name")
    return file


def part_of(path: Path, rank: int) -> Path:
    """Return where a process's part of an output file lies."""
    return path.with_name(f"{path.name}.part-{rank}")


def state_of(part: Path) -> Path:
    """Return where the parts' state lies; it is named after that of the first file."""
    return part.with_name(f"{part.name}.json")


def is_begun(path: Path) -> bool:
    """Whether there are parts that can be continued, of any process, given the first output file."""
    return any(file.suffix == ".json" for file in _left_files(path))


def _left_files(path: Path) -> list[Path]:
    """Return the parts of an output file, of however many processes, and the files of their states."""
    prefix = f"{path.name}.part-"
    files = path.parent.glob(f"{glob.escape(prefix)}*")
    return [file for file in files if re.fullmatch(r"[0-9]+(\.json(\.tmp)?)?", file.name[len(prefix) :])]


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


@contextlib.contextmanager
def open_parts(paths: Sequence[Path], recipe: Any, rank: int, resume: bool) -> Iterator[GrowingFiles]:
    """Open this process's parts of the output files `paths`, and keep other processes from them.

    Args:
        recipe: JSON that says what makes the rows; parts that were begun with another are not continued.
        rank: of the process; the parts are joined in this order.
        resume: whether to continue after the blocks that are there.

    Raises:
        UserError: if a part cannot be written or continued, or another process is writing it.
    """
    growing = None
    try:
        growing = GrowingFiles(paths, recipe, rank, resume)
        yield growing
    except OSError as error:
        problem = cannot_write(paths[0], error)
        problem.is_own = rank > 0  # or nobody would say it
        raise problem from None
    except UserError as error:
        error.is_own = rank > 0 and not error.is_shared
        raise
    finally:
        if growing is not None:
            growing.close()


def join_parts(paths: Sequence[Path], world_size: int) -> None:
    """Make the parts of all processes the files `paths`.

    Raises:
        UserError: if one cannot be written.
    """
    for path in paths:
        first, *others = [part_of(path, rank) for rank in range(world_size)]
        try:
            with first.open("r+b") as joined:
                joined.seek(0, os.SEEK_END)
                for part in others:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, joined, 1 << 20)
                if path.suffix.lower() == ".gz" and joined.tell() == 0:
                    joined.write(gzip.compress(b"", mtime=0))  # nothing at all is no gzip file
                joined.flush()
                os.fsync(joined.fileno())
        except OSError as error:
            raise cannot_write(path, error) from None
    try:
        for path in paths:
            part_of(path, 0).replace(path)
            sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    for path in paths:  # also those that more processes have left, which were killed
        files = _left_files(path)
        _remove([file for file in files if file.suffix == ".json"])
        _remove(files)
