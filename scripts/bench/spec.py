"""What bench.py hands to the processes that it measures: a folder with spec.json and rows.npz.

spec.json has the fields of `Setup`, and the names of files. rows.npz has the arrays `kept_ids` (int64 [rows], the
embedding rows to build) and NAME_ids, NAME_offsets, NAME_labels (see TokenCache) for each of four sets of rows:

    train     the whole train split, from which the peer takes batches of its own order
    warmup    batches of this project's order to warm up with, one after another
    timed     batches of this project's order to time
    dev       the whole dev split
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sampling import choose_batches

from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import rows_in_training_order
from sst2_xlmr.data.formats import find_split, no_split
from sst2_xlmr.data.rows import SST2_NAMES, Columns
from sst2_xlmr.data.token_cache import TokenCache, tokenize_file
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.model.vocabulary import used_ids
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError


class Setup(NamedTuple):
    """What is measured.

    Attributes:
        config: train.py's options, without "auto" in any of them.
        shape: the encoder's sizes, with the whole vocabulary.
        tokenizer_file: SentencePiece model.
        steps, warmup_steps: optimizer steps per round, and those before that are not timed.
        eval_batch_size: rows per forward pass of the peer's evaluation.
    """

    config: Config
    shape: EncoderShape
    tokenizer_file: Path
    steps: int
    warmup_steps: int
    eval_batch_size: int


def find_files(data_dir: str) -> dict[str, Path]:
    """Return the files of the train and the dev split."""
    files = {}
    for split in ("train", "dev"):
        file = find_split(Path(data_dir), split)
        if file is None:
            raise no_split(Path(data_dir), split)
        files[split] = file
    return files


def read_tokens(files: dict[str, Path], setup: Setup) -> dict[str, TokenCache]:
    """Tokenize both splits.

    Raises:
        UserError: if an id is beyond the encoder's vocabulary, or the train split has no full batch.
    """
    vocab_size, batch_size = setup.shape.vocab_size, setup.config.batch_size
    cache_dir, max_length = downloads.cache_dir() / "tokens", setup.config.max_length
    caches = {
        split: tokenize_file(file, setup.tokenizer_file, Columns(), SST2_NAMES, max_length, cache_dir)
        for split, file in files.items()
    }
    largest_id = max(int(cache.ids.max()) for cache in caches.values())
    if largest_id >= vocab_size:
        raise UserError(f"{setup.tokenizer_file} gives ids up to {largest_id}, but the shape has {vocab_size} rows")
    if len(caches["train"]) < batch_size:
        raise UserError(f"{files['train']} has {len(caches['train'])} rows: too few for a batch of {batch_size}")
    return caches


def full_batches(lengths: np.ndarray, config: Config) -> np.ndarray:
    """Return int64 [batches, batch_size], the rows of the global batches of train.py's first epoch."""
    batches = rows_in_training_order(lengths, config.batch_size, config.seed, epoch=0)
    return np.stack([rows for rows in batches if len(rows) == config.batch_size]).astype(np.int64)


def write_spec(folder: Path, caches: dict[str, TokenCache], setup: Setup) -> Path:
    """Write spec.json and rows.npz into a new folder; returns the path of spec.json."""
    train, lengths = caches["train"], caches["train"].lengths()
    warmup, timed = choose_batches(full_batches(lengths, setup.config), lengths, setup.warmup_steps, setup.steps)
    row_sets = {**caches, "warmup": train.subset(warmup.ravel()), "timed": train.subset(timed.ravel())}
    kept_ids = np.arange(setup.shape.vocab_size)
    if not setup.config.full_vocabulary:
        kept_ids = used_ids((cache.ids for cache in caches.values()), setup.shape.vocab_size)
    arrays = {"kept_ids": kept_ids}
    for name, rows in row_sets.items():
        arrays.update({f"{name}_ids": rows.ids, f"{name}_offsets": rows.offsets, f"{name}_labels": rows.labels})
    folder.mkdir()
    np.savez(folder / "rows.npz", **arrays)
    spec = {
        **setup._asdict(),
        "config": dataclasses.asdict(setup.config),
        "shape": dataclasses.asdict(setup.shape),
        "tokenizer_file": str(setup.tokenizer_file.absolute()),
        "rows_file": str(folder / "rows.npz"),
        "encoder_folder": str(folder / "encoder"),
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"
