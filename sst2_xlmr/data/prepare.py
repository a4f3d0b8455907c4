"""Files -> rows -> ids: find, fetch and tokenize a run's inputs, and check them before anything slow begins."""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sst2_xlmr.config import Config, named_file, plain_name
from sst2_xlmr.data.duplicates import find_leaks
from sst2_xlmr.data.formats import find_split
from sst2_xlmr.data.rows import columns_of, has_labels, read_rows
from sst2_xlmr.data.token_cache import TokenCache, label_names_of, tokenize_file
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, Encoder, EncoderShape, check_tokenizer, find_encoder, lowest_layers
from sst2_xlmr.model.tokenizer import load_tokenizer
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import SingleLabel, Task
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of


@dataclass(frozen=True)
class Prepared:
    """A run's inputs.

    Attributes:
        files, caches: the file and the ids of every split.
        leaks: split -> int64 numbers of the training rows whose text it has, too; of those that have any.
        train_rows: int64 numbers of the rows to train on; None for all.
    """

    config: Config
    task: Task
    encoder: Encoder
    files: dict[str, Path]
    caches: dict[str, TokenCache]
    leaks: dict[str, np.ndarray]
    train_rows: np.ndarray | None

    @property
    def train_labels(self) -> np.ndarray:
        """int32 [rows], of the rows to train on."""
        labels = self.caches["train"].labels
        return labels if self.train_rows is None else labels[self.train_rows]

    @property
    def train_lengths(self) -> np.ndarray:
        """int32 [rows], tokens of the rows to train on."""
        lengths = self.caches["train"].lengths()
        return lengths if self.train_rows is None else lengths[self.train_rows]

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


def find_files(config: Config, quiet: bool) -> dict[str, Path]:
    """Return split name -> file: train, dev, and the test files by their names."""
    folder = Path(config.data_dir) if config.data_dir else None
    if folder is None and config.train_file is None:
        folder = downloads.fetch_sst2(quiet=quiet)
    files = {}
    for split, given in (("train", config.train_file), ("dev", config.dev_file)):
        if given:
            files[split] = Path(given)
        elif folder:  # otherwise both files are given: see config.check
            [files[split]] = find_split(folder, split)
    files.update(map(named_file, config.eval_file))
    tests = [Path(file) for file in config.test_file]
    if not tests and folder:  # GLUE's test file has no labels
        tests = [file for file in find_split(folder, "test", is_needed=False) if has_labels(file, columns_of(config))]
    for file in tests:
        name = plain_name(file)
        files[name if name not in files else str(file)] = file
    return files


def check_sizes(config: Config, shape: EncoderShape) -> None:
    """Raise UserError if the encoder is not as large as the options ask for."""
    if config.max_length > (longest := shape.positions - 2):
        raise UserError(f"--max-length {config.max_length}: {config.encoder} takes at most {longest} tokens")
    if config.layers > shape.layers:
        raise UserError(f"--layers {config.layers}: {config.encoder} has {shape.layers} layers")


def prepare(config: Config, quiet: bool) -> Prepared:
    """Fetch and tokenize the run's inputs; earlier downloads and token caches are reused."""
    files, columns, cache_dir = find_files(config, quiet), columns_of(config), downloads.cache_dir() / "tokens"
    task = SingleLabel(config.label_names or label_names_of(files["train"], columns, cache_dir))
    task.check(config)
    for file in files.values():  # wrong columns or labels show in the first rows, before any download
        next(itertools.islice(read_rows(file, columns, task), 1000, None), None)
    if config.encoder in BUNDLE_SHAPES:  # this must not wait for a download either
        check_sizes(config, BUNDLE_SHAPES[config.encoder])
    encoder = find_encoder(config.encoder, quiet)
    check_sizes(config, encoder.shape)
    if config.layers:
        encoder = lowest_layers(encoder, config.layers)
    load = functools.lru_cache(maxsize=1)(load_tokenizer)
    caches = {
        split: tokenize_file(file, encoder.tokenizer_file, columns, task, config.max_length, cache_dir, load)
        for split, file in files.items()
    }
    train = caches["train"]
    check_tokenizer(encoder, train.vocab_size)
    others = {split: cache.text_digests for split, cache in caches.items() if split != "train"}
    leaks = {split: find_leaks(train.text_digests, digests) for split, digests in others.items()}
    leaks = {split: rows for split, rows in leaks.items() if len(rows)}
    return Prepared(config, task, encoder, files, caches, leaks, choose_rows(config, train, leaks))


def choose_rows(config: Config, train: TokenCache, leaks: dict[str, np.ndarray]) -> np.ndarray | None:
    """Return the numbers of the rows to train on, int64, ascending; None for all. UserError if none are left."""
    stays = np.ones(len(train), bool)
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
