"""Evaluate a trained model on labelled files: a table of files, then every file's classes and confusion matrix.

    python scripts/evaluate.py --model runs/NAME/model --file fr=fr.tsv --file de=de.tsv
    python scripts/evaluate.py --model runs/NAME/model --file sample_data/test.*.tsv --json table.json
    python scripts/evaluate.py --model runs/NAME/model --calibrate dev.tsv --output models/calibrated
    python scripts/evaluate.py --model runs/NAME/model --file dev.tsv --precision int8 --against fp32

Files are labelled as for training (see docs/data.md); a file without NAME= goes by its own name. --against computes in
another precision, too, prints how far the two agree, and fails if more labels change or more accuracy is lost than
--most-changed and --most-lost allow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sst2_xlmr.cli import OneLineParser, add_bounds, add_model_options, add_option, bounds_of
from sst2_xlmr.config import named_files
from sst2_xlmr.data.formats import KINDS, either
from sst2_xlmr.data.report import description, left_out_of
from sst2_xlmr.data.rows import COLUMN_OPTIONS, Columns, Inspection, check_pairs, columns_given
from sst2_xlmr.data.token_cache import TokenCache, inspected, tokenize_file
from sst2_xlmr.evaluation.calibration import calibrate, describe_calibration
from sst2_xlmr.evaluation.compare import check_comparison
from sst2_xlmr.evaluation.evaluate import Evaluation, evaluate
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.export.folder import CARD_NAME, read_card, with_note, write_folder
from sst2_xlmr.labels import listed, numbers_for
from sst2_xlmr.model.classifier import load_tensors
from sst2_xlmr.model.encoders import find_encoder, model_folder
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.report.table import comparison_table, evaluation_table, lines_of
from sst2_xlmr.report.tensorboard import (
    add_scalars,
    draw_evaluation,
    make_event_folder,
    open_events,
    read_texts,
)
from sst2_xlmr.task import Task, at_temperature, check_options, with_numbers
from sst2_xlmr.util import downloads
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import put_in_place, scratch_folder, write_text, writing
from sst2_xlmr.util.memory import keep_freed_memory, memory_errors
from sst2_xlmr.util.output import print_text

MOST_CONFUSED_CLASSES = 10  # whose confusion matrix fits on a line


def is_stream(file: Path) -> bool:
    """Whether a name stands for a pipe or a terminal, such as /dev/stdout: writing there replaces nothing."""
    return file.exists() and not file.is_file() and not file.is_dir()


def check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before any work that a result cannot be written, or would replace something unasked."""
    file, output = arguments.json, arguments.output
    if file and not is_stream(file):
        folder = file.absolute().parent
        if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write --json {file}; name a file in a folder that exists")
        if os.path.lexists(file) and (not arguments.overwrite or file.is_symlink()):
            raise UserError(f"--json {file} already exists; choose another name, or replace it with --overwrite")
    if arguments.tensorboard:
        make_event_folder(arguments.tensorboard, "--tensorboard")
    if output:
        if os.path.lexists(output):
            raise UserError(f"--output {output} already exists; choose another name")
        with writing(output):
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.absolute().parent, os.W_OK):
            raise UserError(f"cannot write to --output {output}: no permission; choose another place")


def class_lines(name: str, task: Task, results: np.ndarray, labels: np.ndarray) -> list[str]:
    """Return the lines of a table of a file's classes, with the confusion matrix unless it is too wide."""
    classes, confusion, names = task.per_label(results, labels), task.confusion(results, labels), task.label_names
    if not classes:
        return []
    is_shown = len(names) <= MOST_CONFUSED_CLASSES
    rows = [[name, "precision", "recall", "F1", "rows", *(["taken for:", *names] if is_shown else [])]]
    for number, label in enumerate(names):
        numbers = [f"{classes[key][number]:.4f}" for key in ("precision", "recall", "f1")]
        counts = ["", *(f"{count:,}" for count in confusion[number])] if is_shown else []
        rows.append([label, *numbers, f"{classes['support'][number]:,}", *counts])
    return ["", *lines_of(rows)]


def as_json(file: Path, task: Task, evaluation: Evaluation, labels: np.ndarray) -> dict[str, Any]:
    """Return a file's part of the JSON."""
    numbers = {key: values.tolist() for key, values in task.per_label(evaluation.results, labels).items()}
    classes = {label: {key: numbers[key][i] for key in numbers} for i, label in enumerate(task.label_names)}
    chosen = {key: value for key, value in evaluation.metrics.items() if key not in ("precision", "recall")}
    confusion = task.confusion(evaluation.results, labels).tolist()
    return {"file": str(file), **chosen, "classes": classes, "confusion": confusion}


def write_events(
    folder: Path,
    evaluations: dict[str, Evaluation],
    files: dict[str, Path],
    caches: dict[str, TokenCache],
    columns: dict[str, Columns],
    task: Task,
) -> None:
    """Write scalars and pictures for TensorBoard, at step 0."""
    with writing(folder), open_events(folder) as writer:
        for name, evaluation in evaluations.items():
            add_scalars(writer, 0, name, {key: evaluation.metrics[key] for key in task.scalars})
            texts_of = partial(read_texts, files[name], caches[name].digest, columns[name], task)
            draw_evaluation(writer, 0, name, caches[name].labels, evaluation.probabilities, task, texts_of)


def check_arguments(arguments: argparse.Namespace) -> None:
    if (arguments.calibrate is None) != (arguments.output is None):
        raise UserError("--calibrate FILE and --output DIR belong together")
    if bool(arguments.calibrate) == bool(arguments.file):
        raise UserError("give either --file [NAME=]FILE to evaluate on, or --calibrate FILE --output DIR")
    if arguments.calibrate and (arguments.json or arguments.tensorboard or arguments.against):
        raise UserError("--json, --tensorboard and --against are for --file; leave them out with --calibrate")
    if not arguments.against and (arguments.most_changed, arguments.most_lost) != (None, None):
        raise UserError("--most-changed and --most-lost need --against, with which they compare")
    if arguments.calibrate and arguments.precision == "int8":
        raise UserError("--precision int8 is for a model that is used; calibrate in fp32 or bf16")
    if arguments.calibrate and not arguments.calibrate.is_file():
        raise UserError(f"--calibrate {arguments.calibrate} is not a file")
    if arguments.overwrite and not arguments.json:
        raise UserError("--overwrite needs the --json file that it may replace")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Evaluate a trained model on labelled files.")
    add_model_options(parser)
    add, rows = parser.add_argument, f"labelled rows to evaluate on: {either(KINDS)}, perhaps with .gz; may be repeated"
    add("--calibrate", type=Path, metavar="FILE", help="fit a temperature on these rows, and write --output")
    add("--output", type=Path, metavar="DIR", help="the new folder of the calibrated model")
    add("--file", default=[], nargs="+", action="extend", metavar="[NAME=]FILE", help=rows)
    for name in (*COLUMN_OPTIONS, "columns", "label_names"):
        add_option(parser, name)
    add("--against", choices=("bf16", "fp32"), help="compare --precision with this one")
    add_bounds(parser)
    add("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    add("--overwrite", action="store_true", help="replace an existing --json file")
    add("--tensorboard", type=Path, metavar="DIR", help="write scalars and pictures there")
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    check_outputs(arguments)
    return arguments


def evaluate_all(classifier: Classifier, caches: dict[str, TokenCache], batch_tokens: int) -> dict[str, Evaluation]:
    evaluations, world = {}, World.alone(classifier.device)
    # numpy would warn of what is refused below.
    with memory_errors(f"take a smaller --batch-tokens than {batch_tokens}"), np.errstate(invalid="ignore"):
        for name, cache in caches.items():
            found = evaluate(classifier.module, classifier.task, cache, batch_tokens, world)
            classifier.check_finite(found.metrics["loss"])
            evaluations[name] = found
    return evaluations


def write_calibrated(
    arguments: argparse.Namespace, task: Task, cache: TokenCache, fitted: tuple[float, float, float]
) -> str:
    """Write a model folder that gives calibrated probabilities, and say so in its card; returns what to print.

    Args:
        cache: of the rows on which the temperature was `fitted`, and the written model's calibration error is measured.
    """
    source, output, (temperature, before, after) = arguments.model, arguments.output, fitted
    encoder, begin, card = find_encoder(str(source)), "The probabilities are calibrated: ", read_card(source)
    if thresholds := list(at_temperature(task, temperature).thresholds):
        encoder = replace(encoder, dropouts={**encoder.dropouts, "thresholds": thresholds})
    with writing(output), scratch_folder(output) as scratch:
        written = scratch / output.name
        write_folder(written, load_tensors(encoder), encoder, card, temperature)
        if temperature != 1:
            classifier = Classifier.load(written, arguments.precision, arguments.device)
            after = evaluate_all(classifier, {"dev": cache}, arguments.batch_tokens)["dev"].metrics["ece"]
        found = describe_calibration(temperature, before, after)
        if temperature != 1 and card:
            card = with_note(card, f"{begin}{found}.", former=f"{begin}temperature")
            (written / CARD_NAME).write_text(card, encoding="utf-8")
        put_in_place(written, output, replaces=False)
    return f"{output}: {found}\n"


def with_numbers_of(task: Task, arguments: argparse.Namespace, found: dict[str, Inspection]) -> Task:
    """Return the task with the numbers that stand for its classes in the files: none without --label-names."""
    if not (given := getattr(arguments, "label_names", None)):
        return with_numbers(task, {})
    labels = [label for each in found.values() for label in each.labels]
    names, numbers = numbers_for(given, labels, next(iter(found)))
    if set(names) != set(task.label_names):
        raise UserError(f"--label-names {','.join(names)}: the model's classes are {listed(task.label_names)}")
    return with_numbers(task, {key: task.label_names.index(names[i]) for key, i in numbers.items()})


def read_files(
    arguments: argparse.Namespace, classifier: Classifier, files: dict[str, Path], columns: dict[str, Columns]
) -> tuple[Task, dict[str, TokenCache]]:
    """Check and tokenize all files before the first evaluation; returns also the task that reads their labels."""
    cache_dir, tokenizer = downloads.cache_dir() / "tokens", classifier.tokenizer
    found = {name: inspected(file, columns[name], True, cache_dir) for name, file in files.items()}
    task, caches = with_numbers_of(classifier.task, arguments, found), {}
    for name, file in files.items():
        left_out = found[name].check(file, task, columns[name].drop_unusable)
        said = description(file, found[name].layout, columns[name], found[name].rows), left_out_of(left_out)
        for each in filter(None, said):
            print(f"read as    {each}", file=sys.stderr)
    for name, file in files.items():
        parts = (file, tokenizer.file, columns[name], task, tokenizer.max_length, cache_dir)
        caches[name] = tokenize_file(*parts, lambda *_: tokenizer, tokenizer.long_texts)
    return task, caches


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    arguments.model = model_folder(arguments.model)
    files = named_files(arguments.file, "--file") or {"dev": arguments.calibrate}
    for file in files.values():
        if not file.exists():
            raise UserError(f"--file {file} is not a file")
    keep_freed_memory()
    model, against, device = arguments.model, arguments.against, arguments.device
    classifier = Classifier.load(model, arguments.precision, device)
    task, precision = classifier.task, classifier.precision
    if against and arguments.precision == "int8" != precision:
        raise UserError("--precision int8 cannot be compared on this machine, which cannot compute it")
    if against == precision:
        raise UserError(f"--against {precision} compares {precision} with itself; name another --precision")
    columns = {name: replace(columns_given(arguments, name), may_be_empty=True) for name in files}
    for each in columns.values():
        check_pairs(model, each.pair, "--text-pair-column NAME")
    check_options(task, arguments)
    task, caches = read_files(arguments, classifier, files, columns)
    evaluations = evaluate_all(classifier, caches, arguments.batch_tokens)
    if arguments.calibrate:
        fitted = calibrate(task, evaluations["dev"].probabilities, caches["dev"].labels)
        print_text(write_calibrated(arguments, task, caches["dev"], fitted))
        return
    metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    if arguments.json:
        parts = {name: as_json(files[name], task, evaluations[name], cache.labels) for name, cache in caches.items()}
        content = {"model": str(model), "precision": precision, "labels": task.label_names, "files": parts}
        text = json.dumps({**content, "mean": mean_of(list(metrics.values()))}, indent=2, ensure_ascii=False) + "\n"
        with writing(arguments.json):
            write = write_text if not is_stream(arguments.json) else partial(Path.write_text, encoding="utf-8")
            write(arguments.json, text)
    if arguments.tensorboard:
        write_events(arguments.tensorboard, evaluations, files, caches, columns, task)
    lines = evaluation_table(task, metrics)
    for name, cache in caches.items():
        lines += class_lines(name, task, evaluations[name].results, cache.labels)
    if not against:
        print_text("\n".join([*lines, ""]))
        return
    expected = evaluate_all(Classifier.load(model, against, device), caches, arguments.batch_tokens)
    predictions = {
        name: (evaluations[name].probabilities, expected[name].probabilities, cache.labels)
        for name, cache in caches.items()
    }
    try:
        print_text("\n".join([*lines, "", *comparison_table(task, predictions, precision, against), ""]))
    finally:  # the verdict does not depend on who reads the table, nor on where it goes
        check_comparison(task, predictions, *bounds_of(arguments), precision, against)
