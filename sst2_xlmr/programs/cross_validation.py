"""Cross-validation for `study --folds`: out-of-fold predictions of every row, and likely label errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Callable

import numpy as np

from sst2_xlmr.config import Config
from sst2_xlmr.data.predictions import extended_rows, new_output
from sst2_xlmr.data.prepare import inspect_splits
from sst2_xlmr.data.rows import texts_of
from sst2_xlmr.data.splits import assign_folds, find_files
from sst2_xlmr.data.token_cache import text_digests
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs.row_files import with_values, words_for, write_rows
from sst2_xlmr.report.comparison import Figures
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError

MOST_SHOWN = 20  # likely label errors on the console
# Takes words for train.py, a folder and a seed; returns whether the run was unfinished, and its figures.
Train = Callable[[list[str], Path, int], tuple[bool, Figures]]


class Folds:
    """A study's training rows, each with its file, divided into folds: `numbers`, int64 [rows], from 1."""

    def __init__(self, config: Config, folder: Path, folds: int, train: Train) -> None:
        """Read the rows and assign folds; UserError if a file cannot be used, or an option does not go with folds."""
        self.config, self.folder, self.train = config, folder, train
        if config.dev_file or config.dev_share or config.eval_file:
            options = "--dev-file, --dev-share and --eval-file"
            raise UserError(f"--folds evaluates on parts of the training rows; leave out {options}")
        files = [str(file) for file in find_files(config, quiet=False)[0]["train"]]
        of_rows = dataclasses.replace(config, data_dir=None, train_file=files, test_file=[])
        self.task, splits = inspect_splits(of_rows, downloads.cache_dir() / "tokens", quiet=True)
        self.rows = list(splits["train"].rows(self.task))
        texts, pairs, labels, *_ = zip(*(row for _, row in self.rows))
        self.labels: np.ndarray = np.asarray(labels, self.task.label_dtype)
        digests, strata = text_digests(texts, pairs), self.task.strata(self.labels)
        self.numbers = assign_folds(digests, strata, folds, config.seed)

    def train_fold(self, fold: int) -> tuple[bool, Figures]:
        """Train on all other folds, with this one as dev."""
        folder, is_dev = self.folder / f"fold-{fold}", self.numbers == fold
        files = {name: folder / f"{name}.jsonl" for name in ("train", "dev")}
        for path, is_own in zip(files.values(), (~is_dev, is_dev)):
            rows = (self.rows[number][1] for number in np.flatnonzero(is_own))
            write_rows(path, with_values(rows, self.task))
        return self.train(words_for(self.config, self.task, files), folder, self.config.seed)

    def predict(self) -> np.ndarray:
        """Return float32 [rows, outputs], each row's probabilities from the model that was not trained on its fold."""
        probabilities = np.zeros((len(self.rows), self.task.outputs), np.float32)
        for fold in range(1, int(self.numbers.max()) + 1):
            rows = np.flatnonzero(self.numbers == fold)
            texts = texts_of(self.rows[row][1] for row in rows)
            model = self.folder / f"fold-{fold}/seed-{self.config.seed}/model"
            probabilities[rows] = Classifier.load(model, device=self.config.device).probabilities(texts)
        return probabilities

    def write(self) -> list[str]:
        """Write each row's prediction, and the likely label errors, most likely first; returns lines to print."""
        probabilities, names = self.predict(), self.task.columns(all_probabilities=True)
        cells = [self.task.cells(row, all_probabilities=True) for row in probabilities.tolist()]
        doubt = self.task.doubt(probabilities, self.labels)
        ranked = np.argsort(-doubt, kind="stable")[: max(1, int((doubt > 0).sum()))]
        places = [(file.name, row.fields.line) for file, row in self.rows]
        for name, own_columns, own_cells, numbers in (
            ("out-of-fold", ["fold"], [(int(fold),) for fold in self.numbers], range(len(self.rows))),
            ("label-errors", ["file", "line", "doubt"], [(*at, float(d)) for at, d in zip(places, doubt)], ranked),
        ):
            path, rows = self.folder / f"{name}.jsonl", [self.rows[number][1] for number in numbers]
            new_cells, columns = [[*cells[row], *own_cells[row]] for row in numbers], [*names, *own_columns]
            with new_output(path) as file:
                file.write(extended_rows(path, rows, new_cells, columns, rows[0].fields.names, header=False))
        metrics = self.task.metrics(self.task.results_of(probabilities, self.labels), self.labels)
        lines = [f"out of fold  {self.task.describe(metrics)}: {self.folder / 'out-of-fold.jsonl'}"]
        lines.append(f"label errors {len(ranked):,} rows with a doubtful label: {self.folder / 'label-errors.jsonl'}")
        for row in ranked[:MOST_SHOWN].tolist():
            text = " ".join(self.rows[row][1].text.split())[:70]
            place, label = f"{places[row][0]}:{places[row][1]}", self.task.label_cell(self.labels[row])
            lines.append(f"  {doubt[row]:.2f}  {place:<16} {label} -> {cells[row][0]}: {text}")
        return lines
