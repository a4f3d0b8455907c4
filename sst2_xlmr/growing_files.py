"""Output files that grow by whole blocks of rows, survive a kill, and get their names once they are complete."""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from sst2_xlmr.errors import UserError
from sst2_xlmr.files import cannot_write, sync_folder, write_text

_SECONDS_BETWEEN_NOTES = 5.0


class GrowingFiles:
    """One process's parts of some output files, each beside its place; see `open_parts`.

    Attributes:
        blocks: how many blocks are in the parts, those of an earlier process included.
    """

    def __init__(self, paths: Sequence[Path], order: Any, rank: int, resume: bool) -> None:
        self._parts = [part_of(path, rank) for path in paths]
        self._is_gzipped = [path.suffix.lower() == ".gz" for path in paths]
        self._state = state_of(self._parts[0])
        self._order = {"files": [path.name for path in paths], "order": order}
        state = self._read_state() if resume else None
        self._has_note = state is not None
        if state is None:
            self._state.unlink(missing_ok=True)  # or a kill before the next note would resume it over other rows
            state = {"blocks": 0, "bytes": [0] * len(paths)}
        self.blocks: int = state["blocks"]
        self._files: list[BinaryIO] = []
        with ExitStack() as stack:
            for part, size in zip(self._parts, state["bytes"]):
                file = stack.enter_context(part.open("r+b" if size else "wb"))
                file.truncate(size)  # what was written after the last note may be half a row
                file.seek(size)
                self._files.append(file)
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
        if state["order"] != json.loads(json.dumps(self._order)):
            raise UserError(
                f"{self._parts[0]} was begun with another model, input, machine or other options; leave out --resume"
                " to begin again"
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
        sizes = [file.tell() for file in self._files]
        write_text(self._state, json.dumps({"order": self._order, "blocks": self.blocks, "bytes": sizes}))
        self._has_note, self._noted_at = True, time.monotonic()

    def close(self) -> None:
        """Close the parts, and remove them if nothing has been noted."""
        with contextlib.suppress(OSError):
            self._opened.close()
        if not self._has_note:
            _remove(self._parts)


def part_of(path: Path, rank: int) -> Path:
    """Return where a process's part of an output file lies."""
    return path.with_name(f"{path.name}.part-{rank}")


def state_of(part: Path) -> Path:
    """Return where the parts' state lies; it is named after that of the first file."""
    return part.with_name(f"{part.name}.json")


def is_begun(path: Path) -> bool:
    """Whether there are parts that can be continued, given the first output file."""
    return state_of(part_of(path, 0)).is_file()


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


@contextlib.contextmanager
def open_parts(paths: Sequence[Path], order: Any, rank: int, resume: bool) -> Iterator[GrowingFiles]:
    """Open this process's parts of the output files `paths`.

    Args:
        order: JSON that says what makes the rows; parts that were begun with another are not continued.
        rank: of the process; the parts are joined in this order.
        resume: whether to continue after the blocks that are there.

    Raises:
        UserError: if a part cannot be written or continued.
    """
    growing = None
    try:
        growing = GrowingFiles(paths, order, rank, resume)
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
        parts = list(path.parent.glob(f"{glob.escape(path.name)}.part-*"))
        _remove([file for file in parts if file.suffix == ".json"])
        _remove(parts)
