"""Files that are either whole or absent: digests, hidden scratch names, syncing to disk, renaming."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO, TypeVar

from sst2_xlmr.util.errors import UserError

File = TypeVar("File", bound=IO[Any])
SCRATCH_MARK = ".sst2_xlmr"
_SCRATCH = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}\.(new|old){re.escape(SCRATCH_MARK)}")


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Return a file's hexadecimal digest."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def read_errors(what: object, fix: str) -> Iterator[None]:
    """Turn any exception from reading a missing, damaged or forged file into a `UserError` with the fix."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        if type(error).__name__ == "UnpicklingError":  # torch's message advises running the file's code
            reason = "it holds more than tensors"
        raise UserError(f"cannot read {what}: {reason.splitlines()[0]}; {fix}") from None


def check_is_file(path: Path) -> None:
    """Raise UserError for a pipe or device: it can be read only once, and may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, not a file; save what it holds to a file first")


def digest_of_input(path: Path) -> str:
    """Return the SHA-256 of a user's file; UserError if it cannot be read."""
    check_is_file(path)
    with read_errors(path, "check the path"):
        return digest_of(path)


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return the JSON object in a user's file; UserError with the fix if there is none."""
    with read_errors(f"{path} as JSON", fix):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
        return content


def sync(path: Path) -> None:
    """Sync a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Sync a folder's files and entries to disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


@contextlib.contextmanager
def write_errors(what: object, unfinished: Path | None = None, is_resumable: bool = False) -> Iterator[None]:
    """Turn a failed write (e.g. a full disk) into a `UserError`; after any error, remove the folder `unfinished`."""
    try:
        yield
    except BaseException as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        fix = "then continue (training: with --resume)" if is_resumable else "or choose another place"
        fix = "choose another place" if isinstance(error, FileExistsError) else f"free some space, {fix}"
        raise UserError(f"cannot write {what}: {error.strerror or error}; {fix}") from None


@contextlib.contextmanager
def closing(file: File) -> Iterator[File]:
    """Close a file on exit; if a write has failed (e.g. the disk is full), raise its error, not that of closing."""
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    file.close()


def scratch_name(path: Path, kind: str = "new") -> Path:
    """Return a unique hidden path with our mark beside `path`, for its new content or, "old", its replaced one."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.{kind}{SCRATCH_MARK}")


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create a hidden folder beside `path`, and remove it on exit."""
    folder = scratch_name(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_scratch(path: Path) -> bool:
    """Whether a path's name is from `scratch_name`."""
    return _SCRATCH.fullmatch(path.name) is not None


def put_in_place(new: Path, path: Path, replaces: bool = True) -> None:
    """Sync a finished file or folder of files to disk, and rename it to `path`; OSError if that fails.

    A symbolic link is not followed: a file replaces it, for a folder it is an error. Readers find the old file or the
    new one; a folder is briefly absent between two renames. Without `replaces`, an existing target is an error.
    """
    aside = scratch_name(path, "old")
    if not replaces and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "it already exists", str(path))
    if new.is_dir():
        sync_files(new)
        if path.is_dir() and not path.is_symlink():
            path.rename(aside)
    else:
        sync(new)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo each `put_in_place` in a folder that was killed between its renames, and remove unfinished entries."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if name := _SCRATCH.fullmatch(entry.name):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
            elif name[2] == "old" and not os.path.lexists(folder / name[1]):
                entry.rename(folder / name[1])
            else:
                shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name once it is complete and synced to disk; see `put_in_place`."""
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
    """Write a small file atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a text file, gzipped if its name ends in .gz; see `atomic_file`. UserError if it cannot be written."""
    with write_errors(path), atomic_file(path) as raw:
        binary = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix.lower() == ".gz" else raw
        # A lone surrogate, which JSON can hold and UTF-8 cannot, is written as a JSON escape.
        with closing(io.TextIOWrapper(binary, "utf-8", errors="backslashreplace", newline="")) as text:
            yield text


class BackgroundWriter(contextlib.AbstractContextManager["BackgroundWriter"]):
    """Runs the last part of file writes on a thread, in order, while training continues; `__exit__` waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future[Any]] = []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` after all work submitted before."""
        self._pending.append(self._thread.submit(work))

    def wait(self) -> None:
        """Wait until all work is done; raises its first error."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
