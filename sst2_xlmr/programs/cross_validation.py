"""Cross-validation for `study --folds`: out-of-fold predictions of every row, and likely label errors.

Folds are stratified by class, with equal texts in the same fold.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sst2_xlmr.config import Config
from sst2_xlmr.data.duplicates import text_digests
from sst2_xlmr.data.predictions import extended_rows, new_output
from sst2_xlmr.data.prepare import inspect_splits
from sst2_xlmr.data.rows import Row, texts_of
from sst2_xlmr.data.splits import assign_folds, find_files
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs.runs import train, with_values, words_for, write_rows
from sst2_xlmr.report.tables import Figures
from sst2_xlmr.task import Task
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError

MOST_SHOWN = 20  # likely label errors on the console
FileRows = list[tuple[Path, Row]]  # training rows, each with its file


def divide(config: Config, folds: int) -> tuple[Config, Task, FileRows, np.ndarray]:
    """Read a study's training rows; returns also the number of each row's fold, int64 [rows], from 1.

    UserError if a file cannot be used, or an option does not go with folds.
    """
    if config.dev_file or config.dev_share or config.eval_file:
        options = "--dev-file, --dev-share and --eval-file"
        raise UserError(f"--folds evaluates on parts of the training rows; leave out {options}")
    files = [str(file) for file in find_files(config, quiet=False)[0]["train"]]
    of_rows = dataclasses.replace(config, data_dir=None, train_file=files, test_file=[])
    task, splits = inspect_splits(of_rows, downloads.cache_dir() / "tokens", quiet=True)
    rows = list(splits["train"].rows(task))
    texts, pairs, labels, *_ = zip(*(row for _, row in rows))
    strata = task.strata(np.asarray(labels, task.label_dtype))
    return config, task, rows, assign_folds(text_digests(texts, pairs), strata, folds, config.seed)


def train_fold(
    folder: Path, config: Config, task: Task, rows: FileRows, fold_of: np.ndarray, fold: int
) -> tuple[bool, Figures]:
    """Train on all folds but one, with that as dev; see `runs.train`."""
    folder = folder / f"fold-{fold}"
    files = {name: folder / f"{name}.jsonl" for name in ("train", "dev")}
    for path, is_own in zip(files.values(), (fold_of != fold, fold_of == fold)):
        write_rows(path, with_values((rows[number][1] for number in np.flatnonzero(is_own)), task))
    return train(words_for(config, task, files), folder, config.seed)


def write_out_of_fold(folder: Path, config: Config, task: Task, file_rows: FileRows, fold_of: np.ndarray) -> list[str]:
    """Write each row's prediction by the model that was not trained on its fold, and the likely label errors.

    The most likely come first. Returns lines to print.
    """
    rows = [row for _, row in file_rows]
    labels: np.ndarray = np.asarray([row.label for row in rows], task.label_dtype)
    probabilities = np.zeros((len(rows), task.outputs), np.float32)
    for fold in range(1, int(fold_of.max()) + 1):
        model, chosen = folder / f"fold-{fold}/seed-{config.seed}/model", np.flatnonzero(fold_of == fold)
        texts = texts_of(rows[number] for number in chosen)
        probabilities[chosen] = Classifier.load(model, device=config.device).probabilities(texts)
    names = task.columns(all_probabilities=True)
    cells = [task.cells(row, all_probabilities=True) for row in probabilities.tolist()]
    doubt = task.doubt(probabilities, labels)
    ranked = np.argsort(-doubt, kind="stable")[: max(1, int((doubt > 0).sum()))].tolist()
    places = [(file.name, row.fields.line) for file, row in file_rows]
    for name, own_columns, own_cells, numbers in (
        ("out-of-fold", ["fold"], [(int(fold),) for fold in fold_of], range(len(rows))),
        ("label-errors", ["file", "line", "doubt"], [(*at, float(d)) for at, d in zip(places, doubt)], ranked),
    ):
        path, chosen_rows = folder / f"{name}.jsonl", [rows[number] for number in numbers]
        new_cells = [[*cells[number], *own_cells[number]] for number in numbers]
        columns = chosen_rows[0].fields.names
        with new_output(path) as file:
            file.write(extended_rows(path, chosen_rows, new_cells, [*names, *own_columns], columns, header=False))
    metrics = task.metrics(task.results_of(probabilities, labels), labels)
    lines = [f"out of fold  {task.describe(metrics)}: {folder / 'out-of-fold.jsonl'}"]
    lines.append(f"label errors {len(ranked):,} rows with a doubtful label: {folder / 'label-errors.jsonl'}")
    for number in ranked[:MOST_SHOWN]:
        text, (name, line) = " ".join(rows[number].text.split())[:70], places[number]
        change = f"{task.label_cell(labels[number])} -> {cells[number][0]}"
        lines.append(f"  {doubt[number]:.2f}  {f'{name}:{line}':<16} {change}: {text}")
    return lines
