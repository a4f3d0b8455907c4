"""Token cache on disk: the ids of a file's rows, and digests of their texts, computed once per content of the file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, TypeVar

import numpy as np

from sst2_xlmr.data.duplicates import find_repeats, text_digests
from sst2_xlmr.data.formats import kind_of
from sst2_xlmr.data.rows import Columns, Row, find_label_names, in_chunks, read_rows
from sst2_xlmr.model.tokenizer import Tokenizer, load_tokenizer
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of, digest_of_input

CACHE_FORMAT = 8
TOKENIZER_THREADS = 4  # reading and writing rows, in Python, cannot keep more of them busy
_CHUNK_ROWS = 1000
_DAMAGED = (OSError, ValueError, KeyError, TypeError)
Result = TypeVar("Result")
# Tokenized rows: ids, int32 [tokens], tokens per row, labels, digests of the texts, and how many were cut.
Chunk = tuple[np.ndarray, np.ndarray, list[Any], np.ndarray, int]
_DTYPES = {"offsets": np.int64, "text_digests": np.uint64}  # int32 elsewhere, but for labels


@dataclass
class TokenCache:
    """The ids of a file's rows; mapped from disk, so the operating system pages in what is read.

    Attributes:
        ids: int32 [tokens], all rows one after another, `<s>` and `</s>` included.
        offsets: int64 [rows + 1], row i is ids[offsets[i]:offsets[i + 1]].
        labels: of the rows, of the task's dtype and shape; int32 [rows], the class's number, for a single label.
        distinct_ids: int32 [distinct ids], the ids that occur, ascending; empty unless the cache is on disk.
        text_digests: uint64 [rows], equal for equal texts (pairs of texts); empty unless the cache is on disk.
        repeats, contradictions: int32 [found]; see `duplicates.find_repeats`.
        truncated: how many rows were cut to the longest length.
        vocab_size: every id that the tokenizer can give is below it; 0 unless the cache is on disk.
        digest: SHA-256 of the file, hexadecimal.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    distinct_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    text_digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    repeats: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    contradictions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    truncated: int = 0
    vocab_size: int = 0
    digest: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Return int32 [rows], tokens per row."""
        lengths = np.empty(len(self), np.int32)
        return np.subtract(self.offsets[1:], self.offsets[:-1], out=lengths, casting="unsafe")


def tokenize_file(
    path: Path,
    tokenizer_file: Path,
    columns: Columns,
    task: Task,
    max_length: int,
    cache_dir: Path,
    load: Callable[[Path, int], Tokenizer] = load_tokenizer,
) -> TokenCache:
    """Return a file's token cache, computed on the first call with this content and read from disk after that.

    The result depends on all parameters but the last two, and these make up the cache key. UserError for a bad row (see
    `rows.read_rows`), a file that changes while it is read, or a cache folder that cannot be written.

    Args:
        max_length: longest input in tokens.
        load: loads the tokenizer, if the file has no cache yet; pass one that caches its result for several files.
    """
    depends_on = (tokenizer_digest(tokenizer_file), max_length, task.problem_type, task.label_names)
    return _cached(
        cache_dir,
        (path, columns, *depends_on),
        lambda folder: _write_cache(folder, path, load(tokenizer_file, max_length), columns, task),
        lambda folder, digest: _open_cache(folder, digest, task),
    )


def label_names_of(path: Path, columns: Columns, cache_dir: Path) -> list[str]:
    """Return the names of a training file's classes, found once per content of the file, as its ids are."""

    def write(folder: Path) -> None:
        (folder / "label_names.json").write_text(json.dumps(find_label_names(path, columns)), encoding="utf-8")

    def read(folder: Path, _: str) -> list[str]:
        names: list[str] = json.loads((folder / "label_names.json").read_text(encoding="utf-8"))
        return names

    return _cached(cache_dir, (path, columns), write, read)


def _cached(
    cache_dir: Path, depends_on: tuple[Any, ...], write: Callable[[Path], None], read: Callable[[Path, str], Result]
) -> Result:
    """Return what is read from a folder of the cache, which is written first unless it is there and whole.

    Args:
        depends_on: a file, the columns, and what else makes the cache key.
        read: takes the folder and the file's digest.
    """
    path, columns, *further = depends_on
    digest = digest_of_input(path)
    key = json.dumps([CACHE_FORMAT, digest, kind_of(path), dataclasses.astuple(columns), further])
    folder = cache_dir / hashlib.sha256(key.encode()).hexdigest()[:32]
    with contextlib.suppress(*_DAMAGED):  # absent or damaged: computed again
        return read(folder, digest)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unfinished = Path(scratch, "unfinished")
            unfinished.mkdir()
            write(unfinished)
            if digest_of_input(path) != digest:
                raise UserError(f"{path} changed while it was being read; start again when it is completely written")
            try:
                unfinished.rename(folder)
            except OSError:  # another process was faster, or what is there is damaged
                with contextlib.suppress(*_DAMAGED):
                    return read(folder, digest)
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)
    except OSError as error:
        cure = "set SST2_XLMR_CACHE to a folder that can be written"
        raise UserError(f"cannot write the token cache in {folder.parent}: {error.strerror}; {cure}") from None
    return read(folder, digest)


def _tokenize_chunks(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Tokenize on several threads, in the order of the rows; only a few chunks are in memory at a time."""

    def tokenize(rows: list[Row]) -> Chunk:
        texts, pairs, labels, _ = zip(*rows)
        ids, lengths = tokenizer.flat_ids(list(texts), None if pairs[0] is None else list(pairs))
        cut = sum(tokenizer.is_longer(*rows[row][:2]) for row in np.flatnonzero(lengths == tokenizer.max_length))
        return ids, lengths, list(labels), text_digests(texts, pairs), cut

    threads = min(TOKENIZER_THREADS, len(os.sched_getaffinity(0)))
    pending: deque[Future[Chunk]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for chunk in in_chunks(rows, _CHUNK_ROWS):
            pending.append(pool.submit(tokenize, chunk))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_cache(folder: Path, path: Path, tokenizer: Tokenizer, columns: Columns, task: Task) -> None:
    rows = tokens = truncated = 0
    occurs = np.zeros(tokenizer.vocab_size, bool)
    with contextlib.ExitStack() as stack:
        names = ("ids", "offsets", "labels", "text_digests")
        files = [stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names]
        files[1].write(np.int64(0).tobytes())
        for ids, lengths, labels, digests, cut in _tokenize_chunks(read_rows(path, columns, task), tokenizer):
            arrays = (ids, tokens + np.cumsum(lengths), np.asarray(labels, task.label_dtype), digests)
            for file, array in zip(files, arrays):
                file.write(array.tobytes())
            occurs[ids] = True
            rows, tokens, truncated = rows + len(lengths), tokens + len(ids), truncated + cut
    all_digests = np.fromfile(folder / "text_digests.bin", np.uint64)
    all_labels = np.fromfile(folder / "labels.bin", task.label_dtype).reshape(rows, *task.label_shape)
    repeats, contradictions = find_repeats(all_digests, task.label_keys(all_labels))
    found = {"distinct_ids": np.flatnonzero(occurs), "repeats": repeats, "contradictions": contradictions}
    for name, numbers in found.items():
        (folder / f"{name}.bin").write_bytes(numbers.astype(np.int32).tobytes())
    counts = {"truncated": truncated, "vocab_size": tokenizer.vocab_size}
    digests_of_files = {file.name: digest_of(file) for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"counts": counts, "sha256": digests_of_files}), encoding="utf-8")


def _open_cache(folder: Path, digest: str, task: Task) -> TokenCache:
    """Map a cache's files into memory; ValueError if one is not what `manifest.json` says."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    arrays: dict[str, Any] = {}
    for name, expected in manifest["sha256"].items():
        file, name = folder / name, Path(name).stem
        dtype = task.label_dtype if name == "labels" else _DTYPES.get(name, np.int32)
        if digest_of(file) != expected:
            raise ValueError(f"{file} is damaged")
        arrays[name] = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
    arrays["labels"] = arrays["labels"].reshape(-1, *task.label_shape)
    return TokenCache(**arrays, **manifest["counts"], digest=digest)
