"""Token cache on disk: ids, labels and text digests of a file's rows, computed once per version of the file."""

import contextlib
import functools
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sst2_xlmr.data.containers import source_digest
from sst2_xlmr.data.formats import Layout
from sst2_xlmr.data.rows import Inspection, Row, in_chunks, inspect, read_rows
from sst2_xlmr.data.sniff import ReadOptions
from sst2_xlmr.model.tokenizer import LongTexts, Tokenizer, window_starts
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import Task
from sst2_xlmr.util import downloads
from sst2_xlmr.util.cores import available_cores
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of, scratch_folder

TOKENIZER_THREADS = 4  # more would wait for rows, which are read in Python
_CHUNK_ROWS = 1000
_PER_ROW = ("starts", "lengths", "labels", "text_digests", "is_cut", "files", "lines", "weights")
Arrays = dict[str, np.ndarray]  # by name of a field of `TokenCache`


@dataclass
class TokenCache:
    """The tokenized rows of one or more files, or some of them; all but the arrays of a part are memory-mapped."""

    ids: np.ndarray  # int32 [tokens], the concatenated rows of the files, with `<s>` and `</s>`
    distinct_ids: np.ndarray  # int32 [distinct ids], those that occur, ascending
    starts: np.ndarray  # int64 [rows], row i is ids[starts[i]:starts[i] + lengths[i]]
    lengths: np.ndarray  # int32 [rows], in tokens
    labels: np.ndarray  # [rows, ...], of the task's dtype and shape; int32 [rows], class ids, for a single label
    text_digests: np.ndarray  # uint64 [rows], equal for equal texts (or pairs of texts)
    is_cut: np.ndarray  # bool [rows], whether the row was cut to `max_length`
    files: np.ndarray  # int32 [rows], the number of each row's file, from 0
    lines: np.ndarray  # int32 [rows], the line of each row in its file, from 1
    vocab_size: int  # the tokenizer's largest id + 1
    digest: str  # SHA-256 of the file, or of the files, hexadecimal
    weights: np.ndarray | None = None  # fp32 [rows], factors on the rows' losses; None if all are 1

    def __len__(self) -> int:
        return len(self.labels)

    def windows(self) -> np.ndarray:
        """Return int64 [rows], windows per row."""
        before = np.concatenate([[0], np.cumsum(window_starts(self.ids))])  # the windows before each token
        return np.asarray((before[self.starts + self.lengths] - before[self.starts]).clip(1))

    def part(self, rows: np.ndarray) -> "TokenCache":
        """Return a cache of the given rows, int64, ascending."""
        arrays = {name: array[rows] for name in _PER_ROW if (array := getattr(self, name)) is not None}
        digest = hashlib.sha256(self.digest.encode() + rows.tobytes()).hexdigest()
        return replace(self, digest=digest, **arrays)


def tokenize_files(
    paths: list[Path],
    settings: tuple[Path, int, LongTexts],
    read_options: ReadOptions,
    task: Task,
    load: Callable[[Path, int, LongTexts], Tokenizer] = Tokenizer,
) -> TokenCache:
    """Return the token cache of one or more files, as if they were concatenated.

    It is computed once, with the tokenizer that `load` returns for `settings` (file, maximum length, long texts), and
    then read from disk; all parameters except `load` are part of the cache key. UserError for a bad row (see
    `rows.read_rows`), a file that changes while it is read, or a cache folder that is not writable.
    """
    of_labels = task.problem_type, replace(task, thresholds=())
    inputs = read_options, tokenizer_digest(settings[0]), settings[1:], of_labels
    return _cached(paths, inputs, lambda to: _write_cache(to, paths, load(*settings), read_options, task), _open_cache)


def cached_inspection(path: Path, read_options: ReadOptions) -> Inspection:
    """Return `inspect(path, read_options)`, from the cache if the file has not changed."""

    def write(folder: Path) -> None:
        (folder / "inspection.json").write_text(json.dumps(vars(inspect(path, read_options))), encoding="utf-8")

    def read(folder: Path, digest: str) -> Inspection:
        stored = json.loads((folder / "inspection.json").read_text(encoding="utf-8"))
        return Inspection(**{**stored, "layout": Layout(*stored["layout"]), "digest": digest})

    return _cached([path], read_options, write, read)


@functools.cache
def _code_digest() -> str:
    """Return a digest of the modules that read and tokenize rows: a cache is valid only for the code that wrote it."""
    package = Path(__file__).parents[1]
    patterns = ("data/*.py", "model/tokenizer*.py", "labels.py", "task.py")
    files = sorted(file for pattern in patterns for file in package.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _cached(paths: list[Path], depends_on: Any, write: Callable[[Path], None], read: Callable[[Path, str], Any]) -> Any:
    """Return `read(folder, digest)` for these inputs' folder, which `write(folder)` fills if missing or damaged."""
    digests = [source_digest(path) for path in paths]
    digest = digests[0] if len(paths) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    suffixes = [path.suffixes[-2:] for path in paths]  # the format may depend on them
    key = json.dumps([_code_digest(), digest, suffixes, depends_on], default=astuple)
    cache_dir = downloads.cache_dir() / "tokens"
    folder = cache_dir / hashlib.sha256(key.encode()).hexdigest()[:32]
    is_there = folder.exists()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it is missing or damaged
        return read(folder, digest)
    try:
        if is_there:
            shutil.rmtree(folder)  # it is damaged
        cache_dir.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder) as unfinished:
            write(unfinished)
            if changed := [path for path, before in zip(paths, digests) if source_digest(path) != before]:
                raise UserError(f"{changed[0]} changed while it was being read; rerun when it is completely written")
            with contextlib.suppress(OSError):  # another process may have been faster
                unfinished.rename(folder)
        return read(folder, digest)
    except OSError as error:
        fix = "set SST2_XLMR_CACHE to a writable folder"
        raise UserError(f"cannot write the token cache in {cache_dir}: {error.strerror}; {fix}") from None


def text_digests(texts: Iterable[str], pairs: Iterable[str | None]) -> np.ndarray:
    """Return uint64 [rows], equal for equal texts (or pairs); any two of a million collide with probability 3e-8."""
    whole = (text if pair is None else f"{text}\0{pair}" for text, pair in zip(texts, pairs))
    digests = [hashlib.blake2b(text.encode(), digest_size=8, usedforsecurity=False).digest() for text in whole]
    return np.frombuffer(b"".join(digests), np.uint64)


def find_duplicates(digests: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row indices, int64, ascending, of duplicates and of conflicts.

    A duplicate has the text and label of an earlier row. Conflicts are all rows whose text has another label elsewhere.
    Digests are uint64 [rows], labels int [rows].
    """
    order = np.lexsort((labels, digests))  # stable: among equals, the earlier row comes first
    same_text = digests[order][1:] == digests[order][:-1]
    same_label = labels[order][1:] == labels[order][:-1]
    contradicted = digests[order][1:][same_text & ~same_label]
    return np.sort(order[1:][same_text & same_label]), np.flatnonzero(np.isin(digests, contradicted))


def _tokenize_chunks(rows: Iterator[Row], tokenizer: Tokenizer, task: Task) -> Iterator[Arrays]:
    """Tokenize on several threads, in order; only a few chunks are in memory at a time."""

    def tokenize(rows: list[Row]) -> Arrays:
        texts, pairs, labels, sources, weights = zip(*rows)
        ids, lengths = tokenizer.flat_ids(list(texts), None if pairs[0] is None else list(pairs))
        is_cut = lengths == tokenizer.max_length
        for row in np.flatnonzero(is_cut).tolist():
            is_cut[row] = tokenizer.is_longer(*rows[row][:2])
        return {
            "ids": ids,
            "lengths": lengths.astype(np.int32),
            "labels": np.asarray(labels, task.label_dtype),
            "text_digests": text_digests(texts, pairs),
            "is_cut": is_cut,
            "lines": np.array([row.line for row in sources], np.int32),
            "weights": np.array(weights, np.float32),
        }

    threads = min(TOKENIZER_THREADS, available_cores())
    pending: deque[Future[Arrays]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for chunk in in_chunks(rows, _CHUNK_ROWS):
            pending.append(pool.submit(tokenize, chunk))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_cache(folder: Path, paths: list[Path], tokenizer: Tokenizer, read_options: ReadOptions, task: Task) -> None:
    occurs, chunks = np.zeros(tokenizer.vocab_size, bool), []
    with (folder / "ids.bin").open("wb") as file:
        for number, path in enumerate(paths):
            for chunk in _tokenize_chunks(read_rows(path, read_options, task), tokenizer, task):
                ids = chunk.pop("ids")
                file.write(ids.tobytes())
                occurs[ids] = True
                chunks.append({**chunk, "files": np.full(len(chunk["lines"]), number, np.int32)})
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    arrays["starts"] = np.cumsum(arrays["lengths"], dtype=np.int64) - arrays["lengths"]
    arrays["distinct_ids"] = np.flatnonzero(occurs).astype(np.int32)
    if not read_options.weight:
        del arrays["weights"]
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    manifest = {"vocab_size": tokenizer.vocab_size, "sha256": {f.name: digest_of(f) for f in sorted(folder.iterdir())}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _open_cache(folder: Path, digest: str) -> TokenCache:
    """Memory-map a cache; ValueError if a file does not match its digest in `manifest.json`."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if digest_of(folder / name) != expected:
            raise ValueError(f"{folder / name} is damaged")
    arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
    ids = np.memmap(folder / "ids.bin", np.int32, "r")
    return TokenCache(ids, **arrays, vocab_size=manifest["vocab_size"], digest=digest)
