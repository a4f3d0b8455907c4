"""Compare settings over several seeds: mean and deviation of the metrics, time, and intervals of the differences.

All options but its own go to train.py, for every setting, followed by the setting's own (docs/recipes.md has examples).
The run of setting NAME and seed N is the folder NAME/seed-N in --output-dir; without --setting, the only setting is
`ours`. Finished runs are skipped and stopped runs continue, so the same command with more seeds or settings adds them.

With --folds, the rows of one file are split into K folds, stratified by class, with equal texts in the same fold; each
fold is predicted by a model that was trained on the others. NAME/out-of-fold.jsonl has every row with its prediction,
NAME/label-errors.jsonl the rows whose labels are most likely wrong.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sst2_xlmr.backend import prediction_model
from sst2_xlmr.config import Config
from sst2_xlmr.data.predictions import extended_rows, new_output
from sst2_xlmr.data.prepare import inspect_splits, prepare
from sst2_xlmr.data.rows import Row, texts_of
from sst2_xlmr.data.splits import assign_folds, find_files
from sst2_xlmr.data.token_cache import TokenCache, text_digests
from sst2_xlmr.evaluation.evaluate import outputs_of
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options, study_runs
from sst2_xlmr.programs.study_runs import Trained, checked_config, split_words, train, write_rows
from sst2_xlmr.task import Task, main_metric
from sst2_xlmr.util.device import choose_device
from sst2_xlmr.util.errors import UserError, refuse

MAX_PROBE_ROWS = 2000  # to fit the linear probe on
PENALTY = 0.1  # weight of half the sum of its squared weights, added to the mean loss
MAX_SHOWN = 20  # likely label errors on the console
FileRows = list[tuple[Path, Row]]  # training rows, each with its file


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, with `settings` (name -> arguments for train.py) and `configs` (name -> Config)."""
    study = options.parse("study", argv)
    study.settings, study.configs = {}, {}
    if bool(study.seeds) == bool(study.folds) or study.folds == 1 or study.folds < 0:
        raise UserError("give either --seeds N,... or --folds K, which is 2 or more")
    for name, text in study.setting or [("ours", "")]:
        is_name = name.isidentifier() or name.replace("-", "").isalnum()
        refuse(
            (not is_name, f"--setting {name!r}: use letters, digits and hyphens for the name, which is a folder's"),
            (name in study.settings, f"--setting {name}: that name is taken; choose another"),
        )
        study.settings[name] = [*study.for_train, *split_words(f"--setting {name}", text)]
        own = () if study.folds else ("--seed",)
        study.configs[name] = checked_config(study.settings[name], study.output_dir, *own)
    return study


def linear_probe(config: Config) -> float:
    """Fit a linear layer on the frozen encoder's features at `<s>`, a cheap baseline; returns its metric on dev."""
    inputs, device = prepare(config), choose_device(config.device)
    classifier, _ = build_classifier(inputs.encoder, inputs.task)
    for name in ("dense", "out"):
        setattr(classifier.head, name, nn.Identity())
    model = prediction_model(classifier.requires_grad_(False).eval().to(device))

    def features_of(cache: TokenCache) -> torch.Tensor:
        return outputs_of(model, cache.ids, cache.starts, cache.lengths, config.eval_batch_tokens, device)

    rows, dev = inputs.caches["train"], inputs.caches["dev"]
    fitted = rows.part(np.sort(np.random.RandomState(config.seed).permutation(len(rows))[:MAX_PROBE_ROWS]))
    features = features_of(fitted)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features, labels = (features - mean) / deviation, torch.from_numpy(fitted.labels)
    weights = torch.ones(len(fitted)) if fitted.weights is None else torch.from_numpy(fitted.weights)
    task = inputs.task.for_training(config, rows.labels, rows.weights, torch.device("cpu"))
    layer = nn.Linear(features.shape[1], task.outputs)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        mean_loss = task.loss(layer(features), labels, weights) / weights.sum()
        total = mean_loss + PENALTY / 2 * layer.weight.square().sum()
        total.backward()
        return float(total.detach())

    optimizer.step(loss)
    with torch.no_grad():
        logits = layer((features_of(dev) - mean) / deviation)
        results = task.row_results(logits, torch.tensor(dev.labels))
    return main_metric(task.metrics(results.numpy(), dev.labels))


def divide(config: Config, folds: int) -> tuple[Config, Task, FileRows, np.ndarray]:
    """Return the config, its task and training rows, and the number of each row's fold, int64 [rows], from 1."""
    if config.dev_file or config.dev_share or config.eval_file:
        raise UserError("--folds evaluates on training rows; leave out --dev-file, --dev-share and --eval-file")
    files = [str(file) for file in find_files(config)[0]["train"]]
    task, splits = inspect_splits(dataclasses.replace(config, data_dir=None, train_file=files, test_file=[]))
    rows = list(splits["train"].rows(task))
    texts, pairs, labels, *_ = zip(*(row for _, row in rows))
    strata = task.strata(np.asarray(labels, task.label_dtype))
    return config, task, rows, assign_folds(text_digests(texts, pairs), strata, folds, config.seed)


def train_fold(folder: Path, config: Config, task: Task, rows: FileRows, fold_of: np.ndarray, fold: int) -> Trained:
    """Train on all folds but one, with that as dev."""
    folder = folder / f"fold-{fold}"
    files = {name: folder / f"{name}.jsonl" for name in ("train", "dev")}
    for path, is_own in zip(files.values(), (fold_of != fold, fold_of == fold)):
        write_rows(path, task, (rows[number][1] for number in np.flatnonzero(is_own)))
    return train(study_runs.train_arguments(config, task, files), folder, config.seed)


def write_out_of_fold(folder: Path, config: Config, task: Task, file_rows: FileRows, fold_of: np.ndarray) -> list[str]:
    """Write each row's prediction by the model not trained on it, and likely label errors; returns lines to print."""
    rows = [row for _, row in file_rows]
    labels: np.ndarray = np.asarray([row.label for row in rows], task.label_dtype)
    probabilities = np.zeros((len(rows), task.outputs), np.float32)
    for fold in range(1, int(fold_of.max()) + 1):
        model, chosen = folder / f"fold-{fold}/seed-{config.seed}/model", np.flatnonzero(fold_of == fold)
        texts = texts_of(rows[number] for number in chosen)
        probabilities[chosen] = Classifier.load(model, device=config.device).probabilities(texts)
    names = task.columns(all_probabilities=True)
    cells = [task.prediction_cells(row, all_probabilities=True) for row in probabilities.tolist()]
    doubt = task.label_error_scores(probabilities, labels)
    ranked = np.argsort(-doubt, kind="stable")[: max(1, int((doubt > 0).sum()))].tolist()
    places = [(file.name, row.source.line) for file, row in file_rows]
    for name, own_columns, own_cells, numbers in (
        ("out-of-fold", ["fold"], [(int(fold),) for fold in fold_of], range(len(rows))),
        ("label-errors", ["file", "line", "doubt"], [(*at, float(d)) for at, d in zip(places, doubt)], ranked),
    ):
        path, chosen_rows = folder / f"{name}.jsonl", [rows[number] for number in numbers]
        new_cells = [[*cells[number], *own_cells[number]] for number in numbers]
        columns = chosen_rows[0].source.names
        with new_output(path) as file:
            file.write(extended_rows(path, chosen_rows, new_cells, [*names, *own_columns], columns, header=False))
    metrics = task.metrics(task.results_of(probabilities, labels), labels)
    lines = [f"out of fold  {task.describe(metrics)}: {folder / 'out-of-fold.jsonl'}"]
    lines.append(f"label errors {len(ranked):,} rows with a doubtful label: {folder / 'label-errors.jsonl'}")
    for number in ranked[:MAX_SHOWN]:
        text, (name, line) = " ".join(rows[number].text.split())[:70], places[number]
        change = f"{task.format_label(labels[number])} -> {cells[number][0]}"
        lines.append(f"  {doubt[number]:.2f}  {f'{name}:{line}':<16} {change}: {text}")
    return lines


def main(argv: list[str] | None = None) -> None:
    study = parse(argv)
    folders = {name: study.output_dir / name for name in study.settings}
    if not study.folds:
        runs = {name: functools.partial(train, words, folders[name]) for name, words in study.settings.items()}
        study_runs.run_and_compare(study.seeds, study.output_dir, runs)
        probe = linear_probe(next(iter(study.configs.values())))
        print(f"linear probe on the frozen encoder: dev {probe:.4f}")
        return
    folded = {name: (folders[name], *divide(config, study.folds)) for name, config in study.configs.items()}
    by_fold = {name: functools.partial(train_fold, *setting) for name, setting in folded.items()}
    study_runs.run_and_compare(list(range(1, study.folds + 1)), study.output_dir, by_fold, "fold")
    for setting in folded.values():
        print("\n".join(["", *write_out_of_fold(*setting)]))
