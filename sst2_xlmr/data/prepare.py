"""Files -> rows -> ids: find, fetch, check and tokenize a run's inputs before any slow work starts."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sst2_xlmr.config import Config
from sst2_xlmr.data.containers import source_digest
from sst2_xlmr.data.rows import Inspection, ReadOptions, Row, check_splits, read_options_for, read_rows
from sst2_xlmr.data.splits import DEFAULT_SHARE, MAX_DEV_ROWS, find_files, stratified_sample
from sst2_xlmr.data.token_cache import TokenCache, cached_inspection, find_duplicates, tokenize_files
from sst2_xlmr.labels import MISSING
from sst2_xlmr.model import encoders
from sst2_xlmr.model.tokenizer import LongTexts, Tokenizer
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import Task, check_options, task_kind
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of


@dataclass(frozen=True)
class Split:
    """The files of a split, and what they contain."""

    files: list[Path]
    read_options: ReadOptions
    inspections: list[Inspection]  # one per file
    is_labelled: bool = True  # and so has a cache; a test file may have no labels
    source_rows: np.ndarray | None = None  # int64, indices among the files' usable rows; None for all of them
    dropped: Counter[str] = field(default_factory=Counter)  # the number of rows left out, by kind, over all files
    notes: list[str] = field(default_factory=list)  # warnings for the header

    def rows(self, task: Task | None) -> Iterator[tuple[Path, Row]]:
        """Return the split's usable rows, each with its file."""
        rows = ((file, row) for file in self.files for row in read_rows(file, self.read_options, task))
        if self.source_rows is None:
            return rows
        own = set(self.source_rows.tolist())
        return (row for index, row in enumerate(rows) if index in own)

    def texts_at(self, task: Task, rows: set[int]) -> dict[int, str]:
        """Return row index -> text for the given rows; empty if a file has changed since it was inspected."""
        with contextlib.suppress(UserError):
            if all(source_digest(file) == seen.digest for file, seen in zip(self.files, self.inspections)):
                return {i: " / ".join(row.texts) for i, (_, row) in enumerate(self.rows(task)) if i in rows}
        return {}


@dataclass(frozen=True)
class Inputs:
    """A run's inputs."""

    config: Config
    task: Task
    encoder: encoders.EncoderFolder
    splits: dict[str, Split]
    caches: dict[str, TokenCache]  # only of the labelled splits; train's has the rows to train on
    all_training_rows: TokenCache  # all rows of the training files
    leaks: dict[str, np.ndarray]  # of splits with any: int64, the rows of `all_training_rows` whose text is also there

    def place_of(self, split: str, row: int) -> str:
        """Return `FILE:LINE` of a split's row; for train, of a row of `all_training_rows`."""
        cache = self.all_training_rows if split == "train" else self.caches[split]
        return f"{self.splits[split].files[cache.files[row]].name}:{cache.lines[row]}"

    def digests(self) -> dict[str, str]:
        """Return name -> SHA-256 of every input but the options. Slow, it reads all weights: once per node."""
        return {
            "training rows": self.caches["train"].digest,
            **{f"file {split}": cache.digest for split, cache in self.caches.items() if split != "train"},
            "tokenizer": tokenizer_digest(self.encoder.tokenizer_file),
            "encoder's weights": " ".join(map(digest_of, self.encoder.weights_files)),
        }


def inspect_splits(config: Config) -> tuple[Task, dict[str, Split]]:
    """Find and read all files; UserError for a label that is no class, or an unusable row without `--drop-unusable`."""
    files, notes = find_files(config)
    check_splits(config.columns, files)
    splits: dict[str, Split] = {}
    labels: dict[str, list[int]] = {}  # of the training files
    for name, paths in files.items():  # train first
        classes = tuple(labels) if all(map(str.isdecimal, labels)) else ()  # of the files after train's
        read_options = replace(read_options_for(config, name), classes=classes)
        try:
            inspections = [cached_inspection(file, read_options) for file in paths]
        except UserError as error:
            if name == "train" or not error.column_option:
                raise
            raise UserError(f"{error}, or for this file alone with --columns {name}:text=NAME,label=NAME") from None
        if name == "train":
            labels = _labels_of(inspections)
            known = [*(config.label_names or ()), *(MISSING if task_kind(config, labels).may_be_empty else ())]
            for path, inspection in zip(paths, inspections):
                inspection.check(path, None, config.drop_unusable, known)
        is_labelled = name in ("train", *config.eval_splits) or not all(file.is_unlabelled for file in inspections)
        splits[name] = Split(paths, read_options, inspections, is_labelled)
    names_in_files = splits["train"].inspections[0].layout.class_names.values()
    all_labels = _labels_of([file for split in splits.values() for file in split.inspections])
    task = task_kind(config, labels).from_labels(config, labels, all_labels, names_in_files, files["train"][0])
    check_options(task, config)
    for split in splits.values():
        for path, inspection in zip(split.files, split.inspections):
            split.notes.extend([*inspection.layout.notes, *task.label_warnings(inspection.labels)])
            if split.is_labelled:
                split.dropped.update(inspection.check(path, task, config.drop_unusable))
        if not split.is_labelled:
            split.notes.append("no row has a label: unlabelled, not evaluated")
    splits["train"].notes.extend(notes)  # on files that are not used
    return task, splits


def _labels_of(inspections: list[Inspection]) -> dict[str, list[int]]:
    return {label: counts for file in reversed(inspections) for label, counts in file.labels.items()}


def long_texts_of(config: Config) -> LongTexts:
    if config.long_texts != "windows":
        return LongTexts(config.long_texts)
    room = config.max_length - 2  # without <s> and </s>
    return LongTexts("windows", config.stride or max(1, room * 3 // 4))


def check_sizes(config: Config, shape: encoders.EncoderShape) -> None:
    """Raise UserError if --max-length or --layers exceeds the encoder's size."""
    if config.max_length > (longest := shape.positions - 2):
        raise UserError(f"--max-length {config.max_length}: {config.encoder} takes at most {longest} tokens")
    if config.layers > shape.layers:
        raise UserError(f"--layers {config.layers}: {config.encoder} has {shape.layers} layers")


def prepare(config: Config) -> Inputs:
    """Fetch and tokenize the run's inputs, reusing downloads and token caches."""
    task, splits = inspect_splits(config)
    if config.encoder in encoders.BUNDLE_SHAPES:  # check before the download
        check_sizes(config, encoders.BUNDLE_SHAPES[config.encoder])
    encoder = encoders.find_encoder(config.encoder)
    check_sizes(config, encoder.shape)
    encoder = encoders.lowest_layers(encoder, config.layers)
    settings = encoder.tokenizer_file, config.max_length, long_texts_of(config)
    load = functools.lru_cache(maxsize=1)(Tokenizer)
    labelled = [(name, split) for name, split in splits.items() if split.is_labelled]
    caches = {name: tokenize_files(split.files, settings, split.read_options, task, load) for name, split in labelled}
    all_rows = caches["train"]
    encoders.check_tokenizer(encoder, all_rows.vocab_size)
    is_kept = np.ones(len(all_rows), bool)  # [rows], whether to train on a row
    if "dev" not in caches:
        share = config.dev_share or min(DEFAULT_SHARE, MAX_DEV_ROWS / len(all_rows))
        rows = stratified_sample(all_rows.text_digests, task.strata(all_rows.labels), share, config.seed)
        if not len(rows):
            raise UserError(f"{len(all_rows):,} training rows are too few to set dev aside; name a --dev-file")
        is_kept[rows] = False
        caches = {"train": all_rows, "dev": all_rows.part(rows), **caches}
        note = f"{len(rows):,} of the {len(all_rows):,} training rows are set aside as dev, stratified by class"
        note += "; name another file with --dev-file"
        dev = replace(splits["train"], dropped=Counter(), notes=[note], source_rows=rows)
        splits = {"train": splits["train"], "dev": dev, **splits}
    others = {name: cache.text_digests for name, cache in caches.items() if name != "train"}
    leaked = {name: is_kept & np.isin(all_rows.text_digests, digests) for name, digests in others.items()}
    leaks = {name: np.flatnonzero(is_leaked) for name, is_leaked in leaked.items() if is_leaked.any()}
    if config.drop_duplicates:
        for rows in find_duplicates(all_rows.text_digests, task.label_keys(all_rows.labels)):
            is_kept[rows] = False
    if config.drop_leaks:
        for rows in leaks.values():
            is_kept[rows] = False
    kept = np.flatnonzero(is_kept)
    if not len(kept):
        raise UserError("--drop-duplicates or --drop-leaks leaves no row to train on; turn one of them off")
    if len(kept) < len(all_rows):
        caches["train"], splits["train"] = all_rows.part(kept), replace(splits["train"], source_rows=kept)
    return Inputs(config, task, encoder, splits, caches, all_rows, leaks)
