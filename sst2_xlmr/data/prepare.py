"""Files -> rows -> ids: find, fetch and tokenize a run's inputs, and check them before anything slow begins."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sst2_xlmr.config import Config
from sst2_xlmr.data.containers import source_digest
from sst2_xlmr.data.duplicates import find_leaks
from sst2_xlmr.data.rows import Columns, Inspection, Row, columns_of, read_rows
from sst2_xlmr.data.splits import cut_off, find_files, share_of
from sst2_xlmr.data.token_cache import TokenCache, inspected, tokenize_file
from sst2_xlmr.labels import MISSING
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, Encoder, EncoderShape, check_tokenizer, find_encoder, lowest_layers
from sst2_xlmr.model.tokenizer import LongTexts, load_tokenizer
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import Task, find_task, task_kind
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of


@dataclass(frozen=True)
class Split:
    """The files of a split, and what was found in them.

    Attributes:
        dropped: rows that are left out, by kind, over all files.
        notes: what is to be said.
        is_labelled: whether it has a cache; a test file may have no labels.
    """

    files: list[Path]
    columns: Columns
    found: list[Inspection]
    dropped: dict[str, int]
    notes: list[str]
    is_labelled: bool = True

    def rows(self, task: Task | None) -> Iterator[tuple[Path, Row]]:
        """Yield the usable rows of all files."""
        for file in self.files:
            yield from ((file, row) for row in read_rows(file, self.columns, task))


@dataclass(frozen=True)
class Prepared:
    """A run's inputs.

    Attributes:
        splits: all that was found, by name; `files` and `caches` those that are labelled.
        leaks: split -> int64 numbers of the training rows whose text it has, too; of those that have any.
        train_rows: int64 numbers of the rows to train on; None for all.
    """

    config: Config
    task: Task
    encoder: Encoder
    splits: dict[str, Split]
    caches: dict[str, TokenCache]
    leaks: dict[str, np.ndarray]
    train_rows: np.ndarray | None

    @property
    def files(self) -> dict[str, list[Path]]:
        return {name: self.splits[name].files for name in self.caches}

    @property
    def train_labels(self) -> np.ndarray:
        """Of the rows to train on, of the task's dtype and shape."""
        labels = self.caches["train"].labels
        return labels if self.train_rows is None else labels[self.train_rows]

    @property
    def train_weights(self) -> np.ndarray | None:
        """fp32 [rows], of the rows to train on; None for ones."""
        weights = self.caches["train"].weights
        return weights if self.train_rows is None or weights is None else weights[self.train_rows]

    @property
    def train_lengths(self) -> np.ndarray:
        """int32 [rows], tokens of the rows to train on."""
        lengths = self.caches["train"].lengths()
        return lengths if self.train_rows is None else lengths[self.train_rows]

    def place_of(self, split: str, row: int) -> str:
        """Return file and line of a split's row; UserError or StopIteration if it is no longer there."""
        cache, source = self.caches[split], self.splits[split]
        row = int(row if cache.numbers is None else cache.numbers[row])
        ends = np.cumsum(cache.rows_of_files)
        number = int(np.searchsorted(ends, row, side="right"))
        row -= int(ends[number - 1]) if number else 0
        file, layout = source.files[number], source.found[number].layout
        is_plain = layout.format == "jsonl" or (layout.format == "tsv" and layout.quoting == "none")
        if is_plain and not source.dropped:  # a row is a line
            return f"{file.name}:{row + 1 + layout.header}"
        line = next(itertools.islice(read_rows(file, source.columns, self.task), row, None)).fields.line
        return f"{file.name}:{line}"

    def texts_of(self, split: str, rows: set[int]) -> dict[int, str]:
        """Return the texts of some rows by their numbers; none if the files have changed, or are just being changed."""
        cache, source = self.caches[split], self.splits[split]
        numbers = {row if cache.numbers is None else int(cache.numbers[row]): row for row in rows}
        try:
            digests = [source_digest(file) for file in source.files]
            if digests != [each.digest for each in source.found]:
                return {}
            found = {numbers[i]: row for i, (_, row) in enumerate(source.rows(self.task)) if i in numbers}
        except UserError:
            return {}
        return {number: row.text if row.pair is None else f"{row.text} / {row.pair}" for number, row in found.items()}

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of all that decides the result besides options, hexadecimal, by what it is.

        The weights' file is read whole for it, so one process of a node does that.
        """
        rows = self.caches["train"].digest
        if self.train_rows is not None:
            rows = hashlib.sha256(rows.encode() + self.train_rows.tobytes()).hexdigest()
        return {
            "training rows": rows,
            **{f"file {split}": cache.digest for split, cache in self.caches.items() if split != "train"},
            "tokenizer": tokenizer_digest(self.encoder.tokenizer_file),
            "encoder's weights": " ".join(map(digest_of, self.encoder.weights_files)),
        }


def inspect_splits(config: Config, cache_dir: Path, quiet: bool) -> tuple[Task, dict[str, Split]]:
    """Find all files and read them through; returns the task with its classes, and the splits.

    UserError for a row that cannot be used, unless these are left out, or a label that is no class.
    """
    files, said = find_files(config, quiet)
    columns = {name: columns_of(config, name) for name in files}
    found: dict[str, list[Inspection]] = {}
    for name, paths in files.items():
        try:
            found[name] = [inspected(file, columns[name], True, cache_dir) for file in paths]
        except UserError as error:
            if name == "train" or "no column" not in str(error):
                raise
            raise UserError(f"{error}, or for this file alone with --columns {name}:text=NAME,label=NAME") from None
        if name == "train" and all(label.isdecimal() for each in found[name] for label in each.labels):
            columns = {other: replace(each, keep_numbers=other != name) for other, each in columns.items()}
    labels = {label: seen for each in reversed(found["train"]) for label, seen in each.labels.items()}
    known = [*(config.label_names or ()), *(MISSING if task_kind(config, labels).may_be_empty else ())]
    for path, each in zip(files["train"], found["train"]):
        each.check(path, None, config.drop_unusable, known)
    others = {label: seen for name in found for each in found[name] for label, seen in each.labels.items()}
    own_names = found["train"][0].layout.class_names.values()
    task = find_task(config, labels, others, own_names, files["train"][0])
    splits = {}
    for name, paths in files.items():
        is_test = name not in ("train", *config.eval_splits)
        is_labelled = not (is_test and all(each.is_unlabelled for each in found[name]))
        dropped: dict[str, int] = {}
        notes = [note for each in found[name] for note in (*each.layout.notes, *task.notes(each.labels))]
        for path, each in zip(paths, found[name]) if is_labelled else ():
            for kind, count in each.check(path, task, config.drop_unusable).items():
                dropped[kind] = dropped.get(kind, 0) + count
        if not is_labelled:
            notes.append("no row has a label: unlabelled, not evaluated")
        splits[name] = Split(paths, columns[name], found[name], dropped, notes, is_labelled)
    splits["train"].notes.extend(said)  # what has no split of its own
    return task, splits


def long_texts_of(config: Config) -> LongTexts:
    is_windows = config.long_texts == "windows"
    return LongTexts(config.long_texts, (config.stride or (config.max_length - 2) * 3 // 4 or 1) if is_windows else 0)


def check_sizes(config: Config, shape: EncoderShape) -> None:
    """Raise UserError if the encoder is not as large as the options ask for."""
    if config.max_length > (longest := shape.positions - 2):
        raise UserError(f"--max-length {config.max_length}: {config.encoder} takes at most {longest} tokens")
    if config.layers > shape.layers:
        raise UserError(f"--layers {config.layers}: {config.encoder} has {shape.layers} layers")


def prepare(config: Config, quiet: bool) -> Prepared:
    """Fetch and tokenize the run's inputs; earlier downloads and token caches are reused."""
    cache_dir = downloads.cache_dir() / "tokens"
    task, splits = inspect_splits(config, cache_dir, quiet)
    if config.encoder in BUNDLE_SHAPES:  # this must not wait for a download either
        check_sizes(config, BUNDLE_SHAPES[config.encoder])
    encoder = find_encoder(config.encoder, quiet)
    check_sizes(config, encoder.shape)
    if config.layers:
        encoder = lowest_layers(encoder, config.layers)
    load = functools.lru_cache(maxsize=1)(load_tokenizer)
    long_texts = long_texts_of(config)
    caches = {
        name: tokenize_file(
            split.files, encoder.tokenizer_file, split.columns, task, config.max_length, cache_dir, load, long_texts
        )
        for name, split in splits.items()
        if split.is_labelled
    }
    train = caches["train"]
    check_tokenizer(encoder, train.vocab_size)
    rest = None
    if "dev" not in caches:
        share = share_of(config, len(train))
        rows = cut_off(train.text_digests, task.strata(train.labels), share, config.seed)
        if not len(rows):
            raise UserError(f"{len(train):,} training rows are too few to cut off dev; name a --dev-file")
        whole, caches = train, {"train": train, "dev": train.part(rows), **caches}
        kept = np.ones(len(whole), bool)
        kept[rows] = False
        rest = kept
        note = f"{len(rows):,} of {len(train):,} training rows, cut off by class and seed; name a --dev-file for others"
        of_train = splits["train"]
        split = Split(of_train.files, of_train.columns, of_train.found, {}, [note])
        splits = {"train": of_train, "dev": split, **splits}
    others = {split: cache.text_digests for split, cache in caches.items() if split != "train"}
    leaks = {split: find_leaks(train.text_digests, digests) for split, digests in others.items()}
    leaks = {split: rows if rest is None else rows[rest[rows]] for split, rows in leaks.items()}
    leaks = {split: rows for split, rows in leaks.items() if len(rows)}
    return Prepared(config, task, encoder, splits, caches, leaks, choose_rows(config, train, leaks, rest))


def choose_rows(
    config: Config, train: TokenCache, leaks: dict[str, np.ndarray], rest: np.ndarray | None = None
) -> np.ndarray | None:
    """Return the numbers of the rows to train on, int64, ascending; None for all. UserError if none are left.

    Args:
        rest: bool [rows], those that were not cut off for dev; None for all.
    """
    stays = np.ones(len(train), bool) if rest is None else rest.copy()
    if config.drop_duplicates:
        stays[train.repeats] = stays[train.contradictions] = False
    if config.drop_leaks:
        for rows in leaks.values():
            stays[rows] = False
    if stays.all():
        return None
    if not stays.any():
        raise UserError("--drop-duplicates or --drop-leaks leaves no row to train on; leave them out")
    return np.flatnonzero(stays)
