"""Output files that grow by whole blocks of rows, survive a kill, and get their names once they are complete.

Until then a process of rank R writes `answers.tsv` into `.answers.tsv.shard-R`. Beside it lies its state, JSON lines:
the first one names the shard, which marks it as ours, and says what its rows are made of; every other one says how many
blocks were on the disk at some time. Nothing without that mark is touched, and no symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import cannot_write, sync_folder

_SECONDS_BETWEEN_NOTES = 5.0


class Shards:
    """One process's shards of some output files; see `open_shards`.

    Attributes:
        blocks: how many blocks are in them, those of an earlier process included.
    """

    def __init__(
        self, paths: Sequence[Path], fingerprint: Any, rank: int, resume: bool, overwrite: bool, opened: ExitStack
    ) -> None:
        self._paths, self._shards = paths, [shard_of(path, rank) for path in paths]
        self._made_of = json.loads(json.dumps({"outputs": [path.name for path in paths], "fingerprint": fingerprint}))
        self._may_replace = overwrite
        self._states = [opened.enter_context(_locked_state(path, rank)) for path in paths]
        noted = self._read_state() if resume else None
        if rank == 0:
            self._check_names()
        if noted is None:  # before anything else, so that no other rows, nor a file that is there, pass for the result
            for state, shard in zip(self._states, self._shards):
                state.seek(0)
                _write_line(state, {"shard": shard.name, **self._made_of, "may_replace": self._may_replace})
        self.blocks: int = noted["blocks"] if noted else 0
        sizes = noted["bytes"] if noted else [0] * len(paths)
        self._files = [opened.enter_context(_open(shard)) for shard in self._shards]
        for file, size in zip(self._files, sizes):
            file.truncate(size)  # what was written after the last note may be half a row
            file.seek(size)
        self._is_worth_keeping, self._noted_at = noted is not None, time.monotonic()

    def _read_state(self) -> dict[str, Any] | None:
        """Return what was noted last; None if nothing was, or if it is damaged."""
        content = self._states[0].read()
        whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
        try:
            first, *notes = [json.loads(line) for line in whole.splitlines()]
            made_of = {key: first[key] for key in self._made_of}
            # One that is complete may have been killed while the files got their names.
            self._may_replace = first["may_replace"] or any(note["is_complete"] for note in notes)
            is_whole = all(shard.stat().st_size >= size for shard, size in zip(self._shards, notes[-1]["bytes"]))
        except (OSError, ValueError, LookupError, TypeError):
            made_of, is_whole = self._made_of, False
        if made_of != self._made_of:
            raise UserError(
                f"the rows in {self._shards[0]} belong to another model, input, machine or other options; start again"
                " with --overwrite instead of --resume"
            )
        if not is_whole:
            return None
        self._states[0].seek(len(whole))
        return dict(notes[-1])

    def _check_names(self) -> None:
        """Refuse to replace a file that has got an output's name since."""
        for path in self._paths:
            if os.path.lexists(path) and not self._may_replace:
                raise UserError(f"{path} already exists; move it away, then continue with --resume")

    def append(self, texts: Sequence[str]) -> None:
        """Add one block to every file, and every few seconds note on the disk how far they are."""
        for file, path, text in zip(self._files, self._paths, texts):
            # JSON can hold a lone surrogate, which UTF-8 cannot; it is written as JSON's escape.
            content = text.encode("utf-8", errors="backslashreplace")
            # Compressed block by block, so that a file that was continued has the same bytes.
            file.write(gzip.compress(content, mtime=0) if _is_gzipped(path) else content)
        self.blocks += 1
        if time.monotonic() - self._noted_at > _SECONDS_BETWEEN_NOTES:
            self.note()

    def note(self, is_complete: bool = False) -> None:
        """Make what is there survive a kill."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        sizes = [file.tell() for file in self._files]
        _write_line(self._states[0], {"blocks": self.blocks, "bytes": sizes, "is_complete": is_complete})
        self._is_worth_keeping, self._noted_at = True, time.monotonic()

    def finish(self, ranks: int) -> None:
        """Make the shards of all ranks, in their order, the output files; on rank 0, once all have noted theirs.

        Raises:
            UserError: if they cannot be written, or a file has got an output's name since that may not be replaced.
        """
        self._check_names()
        try:
            self.note(is_complete=True)
            for file, path in zip(self._files, self._paths):
                for rank in range(1, ranks):
                    with _open(shard_of(path, rank)) as other:
                        shutil.copyfileobj(other, file, 1 << 20)
                if _is_gzipped(path) and file.tell() == 0:
                    file.write(gzip.compress(b"", mtime=0))  # nothing at all is no gzip file
                file.flush()
                os.fsync(file.fileno())
            for path, shard in zip(self._paths, self._shards):
                shard.replace(path)
                sync_folder(path.parent)
        except OSError as error:
            raise cannot_write(self._paths[0], error) from None
        for path in self._paths:  # also those that more processes have left, which were killed
            _remove(shards_of(path))

    def drop_if_empty(self) -> None:
        """Remove the shards if no rows were noted.

        They stay if an output file is there already: without the note, `--resume` would take that file for the result.
        """
        if not self._is_worth_keeping and not any(path.exists() for path in self._paths):
            _remove(self._shards)


@contextlib.contextmanager
def open_shards(
    paths: Sequence[Path], fingerprint: Any, rank: int = 0, resume: bool = False, overwrite: bool = False
) -> Iterator[Shards]:
    """Open this process's shards of the output files `paths`, and keep other processes from them.

    Args:
        fingerprint: JSON that says what makes the rows; shards that were begun with another are not continued.
        rank: of the process; the shards are joined in this order.
        resume: whether to continue after the blocks that are there.
        overwrite: whether output files may be replaced.

    Raises:
        UserError: if a shard cannot be written or continued, or another process is writing it.
    """
    try:
        with ExitStack() as opened:
            shards = Shards(paths, fingerprint, rank, resume, overwrite, opened)
            opened.callback(shards.drop_if_empty)
            yield shards
    except (OSError, UserError) as error:
        problem = error if isinstance(error, UserError) else cannot_write(paths[0], error)
        problem.is_own = rank > 0 and not problem.is_shared  # or nobody would say it
        raise problem from None


def shard_of(path: Path, rank: int) -> Path:
    """Return where a process's shard of an output file lies."""
    return path.with_name(f".{path.name}.shard-{rank}")


def state_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.state")


def shards_of(path: Path) -> list[Path]:
    """Return the shards of an output file that have our mark, of however many processes."""
    shards = []
    for state in path.parent.glob(f".{glob.escape(path.name)}.shard-*.state"):
        with contextlib.suppress(OSError, UserError), _open(state, os.O_RDONLY) as file:
            if _has_mark(file, state.with_suffix("")):
                shards.append(state.with_suffix(""))
    return shards


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _has_mark(state: BinaryIO, shard: Path) -> bool:
    mark = json.dumps({"shard": shard.name})[:-1].encode()
    found = state.read(len(mark)) == mark
    state.seek(0)
    return found


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} already exists and is not a shard of ours; move it away, or choose another --output")


def _open(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> BinaryIO:
    """Open a file, not truncated and never through a symbolic link."""
    if path.is_symlink():  # the flag is for one that comes at this moment
        raise _foreign(path)
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW, 0o666), "r+b" if flags & os.O_RDWR else "rb")


@contextlib.contextmanager
def _locked_state(path: Path, rank: int) -> Iterator[BinaryIO]:
    """Open the state of a shard, and lock it for as long as it is open and this process lives.

    Raises:
        UserError: if another process holds it, or the shard is not ours.
    """
    shard = shard_of(path, rank)
    with _open(state_of(shard)) as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have ended since it was opened, and removed it.
            is_free = os.path.samestat(os.fstat(state.fileno()), state_of(shard).stat())
        except (BlockingIOError, FileNotFoundError):
            is_free = False
        if not is_free:
            raise UserError(f"another process is writing {path}; wait for it, stop it, or choose another --output")
        is_empty = os.fstat(state.fileno()).st_size == 0
        try:
            if not _has_mark(state, shard) and (not is_empty or os.path.lexists(shard)):
                raise _foreign(shard if is_empty else state_of(shard))
            yield state
        finally:
            if os.fstat(state.fileno()).st_size == 0:
                state_of(shard).unlink(missing_ok=True)


def _write_line(state: BinaryIO, content: dict[str, Any]) -> None:
    """Write a line where the state is open, which then ends there, and sync it to disk."""
    state.write(json.dumps(content).encode() + b"\n")
    state.flush()
    state.truncate()
    os.fsync(state.fileno())


def _remove(shards: Sequence[Path]) -> None:
    for file in (*shards, *map(state_of, shards)):  # the marks last
        with contextlib.suppress(OSError):
            file.unlink()
