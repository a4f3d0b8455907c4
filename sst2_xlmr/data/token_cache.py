"""Token cache on disk: the ids of a file's rows, and digests of their texts, computed once per content of the file."""

from __future__ import annotations

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
from typing import Any, Callable, NamedTuple

import numpy as np

from sst2_xlmr.data.duplicates import find_repeats, text_digests
from sst2_xlmr.data.formats import kind_of
from sst2_xlmr.data.rows import Columns, Row, find_label_names, in_chunks, read_rows
from sst2_xlmr.model.tokenizer import Tokenizer, load_tokenizer
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of, digest_of_input

CACHE_FORMAT = 7
TOKENIZER_THREADS = 4  # reading and writing rows, in Python, cannot keep more of them busy
_CHUNK_ROWS = 1000
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
        repeats, contradictions: int32 [found]; see `hygiene.find_repeats`.
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

    The result depends on all parameters but the last two, and these make up the cache key.

    Args:
        max_length: longest input in tokens.
        load: loads the tokenizer, if the file has no cache yet; pass one that caches its result for several files.

    Raises:
        UserError: for a bad row (see `rows.read_rows`), a file that changes while it is read, or a cache folder that
            cannot be written.
    """
    digest, tokenizer_digest = digest_of_input(path), digest_of_input(tokenizer_file)
    folder = cache_dir / _cache_key(
        digest, path, columns, tokenizer_digest, max_length, task.problem_type, task.label_names
    )
    try:
        return _open_cache(folder, digest, task)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: computed again
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            unfinished = Path(scratch, "tokens")
            unfinished.mkdir()
            _write_cache(unfinished, path, load(tokenizer_file, max_length), columns, task)
            _check_unchanged(path, digest)
            try:
                unfinished.rename(folder)
            except OSError:  # another process was faster, or what is there is damaged
                try:
                    return _open_cache(folder, digest, task)
                except (OSError, ValueError, KeyError, TypeError):
                    shutil.rmtree(folder, ignore_errors=True)
                    unfinished.rename(folder)
    except OSError as error:
        raise _cannot_write(cache_dir, error) from None
    return _open_cache(folder, digest, task)


def label_names_of(path: Path, columns: Columns, cache_dir: Path) -> list[str]:
    """Return the names of a training file's classes, cached on disk by the file's content.

    Raises:
        UserError: see `rows.find_label_names`; or if the cache folder cannot be written.
    """
    digest = digest_of_input(path)
    file = cache_dir / (_cache_key(digest, path, columns) + ".labels.json")
    try:
        names: list[str] = json.loads(file.read_text(encoding="utf-8"))["label_names"]
        return names
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: computed again
    names = find_label_names(path, columns)
    _check_unchanged(path, digest)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            unfinished = Path(scratch, "labels")
            unfinished.write_text(json.dumps({"label_names": names}), encoding="utf-8")
            unfinished.replace(file)
    except OSError as error:
        raise _cannot_write(cache_dir, error) from None
    return names


def _check_unchanged(path: Path, digest: str) -> None:
    """Check that a file still has the content whose digest was computed before it was read.

    Raises:
        UserError: if not, because its rows must not be cached under that digest.
    """
    if digest_of_input(path) != digest:
        raise UserError(f"{path} changed while it was being read; start again when it is completely written")


def _cache_key(digest: str, path: Path, columns: Columns, *further: object) -> str:
    """Return the cache key for a result that depends on this digest and these columns, and on `further`."""
    content = [CACHE_FORMAT, digest, kind_of(path), dataclasses.astuple(columns), further]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _cannot_write(cache_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write the token cache in {cache_dir}: {error.strerror};"
        " set SST2_XLMR_CACHE to a folder that can be written"
    )


class Chunk(NamedTuple):
    """Some tokenized rows; `ids` is int32 [tokens], all else has one number per row."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: list[Any]
    text_digests: np.ndarray
    truncated: int


def _tokenize_chunks(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Tokenize on several threads, in the order of the rows; only a few chunks are in memory at a time."""

    def tokenize(rows: list[Row]) -> Chunk:
        texts, pairs, labels = zip(*rows)
        ids, lengths = tokenizer.flat_ids(list(texts), None if pairs[0] is None else list(pairs))
        full = (rows[number] for number in np.flatnonzero(lengths == tokenizer.max_length))
        truncated = sum(tokenizer.is_longer(row.text, row.pair) for row in full)
        return Chunk(ids, lengths, list(labels), text_digests(rows), truncated)

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
    with (
        (folder / "ids.bin").open("wb") as ids_file,
        (folder / "offsets.bin").open("wb") as offsets_file,
        (folder / "labels.bin").open("wb") as labels_file,
        (folder / "text_digests.bin").open("wb") as digests_file,
    ):
        offsets_file.write(np.int64(0).tobytes())
        for chunk in _tokenize_chunks(read_rows(path, columns, task), tokenizer):
            ids_file.write(chunk.ids.tobytes())
            offsets_file.write((tokens + np.cumsum(chunk.lengths)).tobytes())
            labels_file.write(np.asarray(chunk.labels, task.label_dtype).tobytes())
            digests_file.write(chunk.text_digests.tobytes())
            occurs[chunk.ids] = True
            rows, tokens, truncated = rows + len(chunk.labels), tokens + len(chunk.ids), truncated + chunk.truncated
    found = {"distinct_ids": np.flatnonzero(occurs)}
    digests = np.fromfile(folder / "text_digests.bin", np.uint64)
    labels = np.fromfile(folder / "labels.bin", task.label_dtype).reshape(rows, *task.label_shape)
    found["repeats"], found["contradictions"] = find_repeats(digests, task.label_keys(labels))
    for name, numbers in found.items():
        (folder / f"{name}.bin").write_bytes(numbers.astype(np.int32).tobytes())
    counts = {"rows": rows, "tokens": tokens, "truncated": truncated, "vocab_size": tokenizer.vocab_size}
    counts.update({name: len(numbers) for name, numbers in found.items()})
    manifest = {**counts, "sha256": {file.name: digest_of(file) for file in sorted(folder.iterdir())}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _open_cache(folder: Path, digest: str, task: Task) -> TokenCache:
    """Map a cache's files into memory; ValueError if one is not what `manifest.json` says."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = manifest["rows"]
    counts = {"ids": manifest["tokens"], "offsets": rows + 1, "labels": rows, "text_digests": rows}
    counts.update({name: manifest[name] for name in ("distinct_ids", "repeats", "contradictions")})
    arrays = {}
    for name, count in counts.items():
        dtype = task.label_dtype if name == "labels" else _DTYPES.get(name, np.int32)
        file = folder / f"{name}.bin"
        arrays[name] = np.memmap(file, dtype=dtype, mode="r") if count else np.fromfile(file, dtype)
        if name == "labels":
            arrays[name] = arrays[name].reshape(-1, *task.label_shape)
        if len(arrays[name]) != count or digest_of(file) != manifest["sha256"][file.name]:
            raise ValueError(f"{file} is damaged")
    return TokenCache(**arrays, truncated=manifest["truncated"], vocab_size=manifest["vocab_size"], digest=digest)
