"""Files that are either whole or absent: digests, tensors, syncing to disk, replacing a folder."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, TextIO, Union

import torch

from sst2_xlmr.util.errors import UserError

_CHUNK_BYTES = 1 << 23
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Deferred:
    """A tensor whose rows are computed a few at a time while it is written, so that it is never in memory as a whole.

    Attributes:
        shape: its sizes, at least one.
        dtype: its type.
        rows: rows(start, stop) returns the tensor's [start:stop], on any device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    def chunk(self, count: int) -> list[Deferred]:
        """Cut into equal parts along the rows, as `torch.chunk` does."""
        size, rest = divmod(self.shape[0], count)
        if rest:
            raise ValueError(f"{self.shape[0]} rows cannot be cut into {count} equal parts")

        def part(first: int) -> Deferred:
            return Deferred(
                (size, *self.shape[1:]), self.dtype, lambda start, stop: self.rows(first + start, first + stop)
            )

        return [part(number * size) for number in range(count)]


Storable = Union[torch.Tensor, Deferred]


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Return a file's digest, hexadecimal; `kind` is a name that hashlib knows."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_input(path: Path) -> str:
    """Return the SHA-256 of a file that the user has named.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return digest_of(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parts(tensor: Storable) -> Iterator[torch.Tensor]:
    """Yield a tensor's values in order, in contiguous pieces on the CPU."""
    if isinstance(tensor, torch.Tensor):
        yield tensor.detach().cpu().contiguous()
        return
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0])).detach().cpu().contiguous()


def write_tensors(tensors: Mapping[str, Storable], file: Path) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format), one tensor after another.

    safetensors' own `save_file` wants all tensors in memory, and makes the file readable by its owner only.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Wide types first, as in save_file: every tensor then starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in _parts(tensors[name]):
                assert part.dtype == tensors[name].dtype, name
                opened.write(part.view(-1).view(torch.uint8).numpy().data)
        assert opened.tell() == 8 + len(text) + end


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power failure (files are synced by themselves)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make all files of a folder, and its entries, survive a power failure."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)


@contextlib.contextmanager
def disk_errors(what: str, unfinished: Path | None = None) -> Iterator[None]:
    """Turn a failed write (a full disk, say) into a `UserError`, and remove the folder `unfinished`."""
    try:
        yield
    except OSError as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror or error
        raise UserError(f"cannot write {what}: {reason}; make room, then continue (training: with --resume)") from None


def write_text(file: Path, text: str) -> None:
    """Write a small file, synced to disk, replacing any that is there; never through a symbolic link."""
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)
    sync_folder(file.parent)


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; make room, or choose another place")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a text file, gzipped if its name ends in .gz, that gets its name once it is complete.

    Raises:
        UserError: if it cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        # JSON can hold a lone surrogate, which UTF-8 cannot; it is written as JSON's escape.
        with opener(unfinished, "wt", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _set_aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def replace_folder(new: Path, old: Path) -> None:
    """Replace the folder `old`, which may exist, by the finished folder `new`.

    A reader finds either of them whole, or neither for the moment between two renames; never a half-written one.
    """
    aside = _set_aside(old)
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    sync_folder(old.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was killed between its renames, or finish its clean-up."""
    aside = _set_aside(folder)
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


class Finisher:
    """Finishes written files (digests, syncing, renaming) on a thread, in order, while training goes on.

    Leaving the context waits for the rest.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future[Any]] = []

    def __enter__(self) -> Finisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` after all that was submitted before."""
        self._pending.append(self._thread.submit(work))

    def wait(self) -> None:
        """Wait until everything is done; raises the first error."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
