"""Files that are either whole or absent: digests, hidden scratch names, syncing to disk, renaming."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, Callable, TextIO, TypeVar

from sst2_xlmr.util.errors import UserError

File = TypeVar("File", bound=IO[Any])
SCRATCH_MARK = ".sst2_xlmr"
_SCRATCH = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}\.(new|old){re.escape(SCRATCH_MARK)}")


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Return a file's digest, hexadecimal."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def reading(what: object, cure: str) -> Iterator[None]:
    """Turn whatever a missing, damaged or forged file raises while it is parsed into a `UserError` with the cure."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        if type(error).__name__ == "UnpicklingError":  # of torch, which advises to run the file's code
            reason = "it holds more than tensors"
        raise UserError(f"cannot read {what}: {reason.splitlines()[0]}; {cure}") from None


def digest_of_input(path: Path) -> str:
    """Return the SHA-256 of a file of the user's; a UserError if it cannot be read."""
    with reading(path, "check the path"):
        return digest_of(path)


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Return the JSON object in a file of the user's; a UserError with the cure if there is none."""
    with reading(f"{path} as JSON", cure):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it does not hold a JSON object")
        return found


def sync(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make all files of a folder, and its entries, survive a power failure."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


@contextlib.contextmanager
def disk_errors(
    what: object, unfinished: Path | None = None, cure: str = "then continue (training: with --resume)"
) -> Iterator[None]:
    """Turn a failed write (a full disk, say) into a `UserError`; after any error, remove the folder `unfinished`."""
    try:
        yield
    except BaseException as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {what}: {error.strerror or error}; make room, {cure}") from None


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn a failed write outside training into a `UserError`; see `disk_errors`."""
    return disk_errors(path, cure="or choose another place")


@contextlib.contextmanager
def closing(file: File) -> Iterator[File]:
    """Close a file in the end; if a write has failed (a full disk, say), its error is raised, not that of closing."""
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    file.close()


def scratch_name(path: Path, kind: str = "new") -> Path:
    """Return a new hidden name, with our mark, beside `path`: for what will have that name, or what had it ("old")."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.{kind}{SCRATCH_MARK}")


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path`, and remove it in the end."""
    folder = scratch_name(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_scratch(path: Path) -> bool:
    """Whether a name is one of `scratch_name`'s."""
    return _SCRATCH.fullmatch(path.name) is not None


def put_in_place(new: Path, path: Path, replaces: bool = True) -> None:
    """Sync a finished file, or folder of files, to disk and give it its name; an OSError if it cannot be done.

    A symbolic link is not followed: a file replaces it, and for a folder it is an error. Readers find the old file or
    the new one; of a folder there is none for the moment between two renames. What exists is an error unless it
    `replaces` that.
    """
    aside = None
    if not replaces and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "it already exists", str(path))
    if new.is_dir():
        sync_files(new)
        if path.is_dir() and not path.is_symlink():
            aside = scratch_name(path, "old")
            path.rename(aside)
    else:
        sync(new)
    new.rename(path)
    sync(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo each `put_in_place` that was killed between its renames, and remove what is unfinished, in our folder."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if found := _SCRATCH.fullmatch(entry.name):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
            elif found[2] == "old" and not os.path.lexists(folder / found[1]):
                entry.rename(folder / found[1])
            else:
                shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name once it is whole and synced to disk; see `put_in_place`."""
    scratch = scratch_name(path)
    try:
        with closing(scratch.open("xb")) as file:
            yield file
        put_in_place(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a text file, gzipped if its name ends in .gz; see `atomic_file`. A UserError if it cannot be written."""
    with writing(path), atomic_file(path) as raw:
        binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix.lower() == ".gz" else raw
        # JSON can hold a lone surrogate, which UTF-8 cannot; it is written as JSON's escape.
        with closing(io.TextIOWrapper(binary, "utf-8", errors="backslashreplace", newline="")) as text:
            yield text


class BackgroundWriter:
    """Finishes written files on a thread, in order, while training goes on; leaving the context waits for the rest."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future[Any]] = []

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` after all that came before."""
        self._pending.append(self._thread.submit(work))

    def wait(self) -> None:
        """Wait until everything is done; raises the first error."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
