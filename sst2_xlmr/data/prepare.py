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
from sst2_xlmr.model.encoders import (
    BUNDLE_SHAPES,
    EncoderFolder,
    EncoderShape,
    check_tokenizer,
    find_encoder,
    lowest_layers,
)
from sst2_xlmr.model.tokenizer import LongTexts, Tokenizer
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import Task, find_task, task_kind
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of


@dataclass(frozen=True)
class Split:
    """The files of a split, and what was found in them.

    Attributes:
        dropped: how many rows are left out, by kind, over all files.
        notes: what the header says of it.
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

    def texts_of(self, task: Task, rows: set[int]) -> dict[int, str]:
        """Return the texts of some rows by their numbers; none if the files have changed, or are just being changed."""
        try:
            if any(source_digest(file) != found.digest for file, found in zip(self.files, self.found)):
                return {}
            found = {number: row for number, (_, row) in enumerate(self.rows(task)) if number in rows}
        except UserError:
            return {}
        return {number: row.text if row.pair is None else f"{row.text} / {row.pair}" for number, row in found.items()}


@dataclass(frozen=True)
class Prepared:
    """A run's inputs.

    Attributes:
        splits: all that was found, by name; `caches` has the labelled ones only.
        leaks: split -> int64 numbers of the training rows whose text it has, too; without splits that have none.
        train_rows: int64 numbers of the rows to train on; None for all.
    """

    config: Config
    task: Task
    encoder: EncoderFolder
    splits: dict[str, Split]
    caches: dict[str, TokenCache]
    leaks: dict[str, np.ndarray]
    train_rows: np.ndarray | None

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
        number = int(np.searchsorted(np.cumsum(cache.rows_of_files), row, side="right"))
        row -= sum(cache.rows_of_files[:number])
        file, layout = source.files[number], source.found[number].layout
        is_plain = layout.format == "jsonl" or (layout.format == "tsv" and layout.quoting == "none")
        if is_plain and not source.dropped:  # a row is a line
            return f"{file.name}:{row + 1 + layout.header}"
        line = next(itertools.islice(read_rows(file, source.columns, self.task), row, None)).fields.line
        return f"{file.name}:{line}"

    def texts_of(self, split: str, rows: set[int]) -> dict[int, str]:
        """Return the texts of some of a split's rows by their numbers; see `Split.texts_of`."""
        cache = self.caches[split]
        numbers = {row if cache.numbers is None else int(cache.numbers[row]): row for row in rows}
        found = self.splits[split].texts_of(self.task, set(numbers))
        return {numbers[number]: text for number, text in found.items()}

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
    splits: dict[str, Split] = {}
    labels: dict[str, list[int]] = {}  # of the training files
    for name, paths in files.items():  # train first
        columns = columns_of(config, name)
        if name != "train":
            columns = replace(columns, classes=tuple(labels) if all(map(str.isdecimal, labels)) else ())
        try:
            found = [inspected(file, columns, cache_dir) for file in paths]
        except UserError as error:
            if name == "train" or "no column" not in str(error):
                raise
            raise UserError(f"{error}, or for this file alone with --columns {name}:text=NAME,label=NAME") from None
        if name == "train":
            labels = _labels_of(found)
            known = [*(config.label_names or ()), *(MISSING if task_kind(config, labels).may_be_empty else ())]
            for path, each in zip(paths, found):
                each.check(path, None, config.drop_unusable, known)
        is_labelled = name in ("train", *config.eval_splits) or not all(each.is_unlabelled for each in found)
        splits[name] = Split(paths, columns, found, {}, [], is_labelled)
    own_names = splits["train"].found[0].layout.class_names.values()
    everywhere = _labels_of([each for split in splits.values() for each in split.found])
    task = find_task(config, labels, everywhere, own_names, files["train"][0])
    for split in splits.values():
        split.notes.extend(note for each in split.found for note in (*each.layout.notes, *task.notes(each.labels)))
        if not split.is_labelled:
            split.notes.append("no row has a label: unlabelled, not evaluated")
            continue
        for path, each in zip(split.files, split.found):
            for kind, count in each.check(path, task, config.drop_unusable).items():
                split.dropped[kind] = split.dropped.get(kind, 0) + count
    splits["train"].notes.extend(said)  # what has no split of its own
    return task, splits


def _labels_of(found: list[Inspection]) -> dict[str, list[int]]:
    return {label: seen for each in reversed(found) for label, seen in each.labels.items()}


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
    load = functools.lru_cache(maxsize=1)(Tokenizer)
    further = (task, config.max_length, cache_dir, load, long_texts_of(config))
    caches = {
        name: tokenize_file(split.files, encoder.tokenizer_file, split.columns, *further)
        for name, split in splits.items()
        if split.is_labelled
    }
    train = caches["train"]
    check_tokenizer(encoder, train.vocab_size)
    stays = np.ones(len(train), bool)  # whether a row is trained on
    if "dev" not in caches:
        rows = cut_off(train.text_digests, task.strata(train.labels), share_of(config, len(train)), config.seed)
        if not len(rows):
            raise UserError(f"{len(train):,} training rows are too few to cut off dev; name a --dev-file")
        stays[rows] = False
        caches = {"train": train, "dev": train.part(rows), **caches}
        note = f"{len(rows):,} of {len(train):,} training rows, cut off by class and seed; name a --dev-file for others"
        splits = {"train": splits["train"], "dev": replace(splits["train"], dropped={}, notes=[note]), **splits}
    others = {name: cache.text_digests for name, cache in caches.items() if name != "train"}
    leaks = {name: find_leaks(train.text_digests, digests) for name, digests in others.items()}
    leaks = {name: kept for name, rows in leaks.items() if len(kept := rows[stays[rows]])}
    if config.drop_duplicates:
        stays[train.repeats] = stays[train.contradictions] = False
    for rows in leaks.values() if config.drop_leaks else ():
        stays[rows] = False
    if not stays.any():
        raise UserError("--drop-duplicates or --drop-leaks leaves no row to train on; leave them out")
    train_rows = None if stays.all() else np.flatnonzero(stays)
    return Prepared(config, task, encoder, splits, caches, leaks, train_rows)
