"""Evaluate a trained model on labelled files, as docs/evaluate.md describes; or calibrate it on one.

It prints a table of the files, then each file's classes and confusion matrix. --against also computes in another
precision, compares the two, and fails if more labels change or more accuracy is lost than the bounds allow.
"""

import argparse
import json
import sys
from dataclasses import replace

import numpy as np

from sst2_xlmr.config import named_files
from sst2_xlmr.data.prepare import Split
from sst2_xlmr.data.rows import check_pairs, check_splits, read_options_for
from sst2_xlmr.data.token_cache import TokenCache, cached_inspection, tokenize_files
from sst2_xlmr.evaluation.calibration import calibrate
from sst2_xlmr.evaluation.compare import check_comparison, compare_files
from sst2_xlmr.evaluation.evaluate import Evaluation, evaluate
from sst2_xlmr.evaluation.metrics import describe_calibration, mean_of
from sst2_xlmr.export.folder import CALIBRATED, CARD_NAME, read_card, with_note, write_folder
from sst2_xlmr.labels import are_positional, listed, resolve_label_names
from sst2_xlmr.model.classifier import load_tensors
from sst2_xlmr.model.encoders import find_encoder, model_folder
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options
from sst2_xlmr.report.inputs import description, left_out_of
from sst2_xlmr.report.tables import aligned, comparison_table, evaluation_table
from sst2_xlmr.report.tensorboard import add_scalars, draw_evaluation, open_events
from sst2_xlmr.task import Task, at_temperature, check_options
from sst2_xlmr.util.device import memory_errors, tune_memory
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError, refuse
from sst2_xlmr.util.files import put_in_place, scratch_folder, write_errors, write_text

Caches = dict[str, TokenCache]  # by name of file
MAX_CONFUSED_CLASSES = 10  # with more, a confusion matrix is too wide to print


def class_lines(name: str, task: Task, results: np.ndarray, labels: np.ndarray) -> list[str]:
    """Return the lines of a table of a file's classes, with the confusion matrix if there are few."""
    classes, confusion, names = task.per_label(results, labels), task.confusion(results, labels), task.label_names
    if not classes:
        return []
    is_shown = len(names) <= MAX_CONFUSED_CLASSES
    rows = [[name, "precision", "recall", "F1", "rows", *(["taken for:", *names] if is_shown else [])]]
    for number, label in enumerate(names):
        numbers = [f"{classes[key][number]:.4f}" for key in ("precision", "recall", "f1")]
        counts = ["", *(f"{count:,}" for count in confusion[number])] if is_shown else []
        rows.append([label, *numbers, f"{classes['support'][number]:,}", *counts])
    return ["", *aligned(rows)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    arguments = options.parse("evaluate", argv)
    source, output = arguments.calibrate, arguments.output
    needs_files = arguments.json or arguments.tensorboard or arguments.against
    both = "--calibrate FILE and --output DIR"
    refuse(
        ((source is None) != (output is None), f"{both} belong together"),
        (bool(source) == bool(arguments.file), f"give either --file [NAME=]FILE to evaluate on, or {both}"),
        (source and needs_files, "--json, --tensorboard and --against are for --file; leave them out with --calibrate"),
        (source and len(arguments.models) > 1, "--calibrate writes one model; name one --model"),
        (source and arguments.precision == "int8", "--precision int8 is for prediction; calibrate in fp32 or bf16"),
        (arguments.overwrite and not arguments.json, "--overwrite needs the --json file that it may replace"),
    )
    arguments.files = named_files(arguments.file, "--file") or {"dev": source}
    refuse(*((not file.exists(), f"{file} does not exist") for file in arguments.files.values()))
    if arguments.json:
        options.check_output("--json", arguments.json, arguments.overwrite)
    if arguments.tensorboard:
        with write_errors(arguments.tensorboard):
            arguments.tensorboard.mkdir(parents=True, exist_ok=True)
    if output:
        options.check_output("--output", output, makes_parents=True)
    return arguments


def evaluate_all(classifier: Classifier, caches: Caches, batch_tokens: int) -> dict[str, Evaluation]:
    evaluations, world = {}, World(classifier.device)
    # numpy would warn of the NaN that `check_finite` raises an error for.
    with memory_errors(f"use a smaller --batch-tokens than {batch_tokens}"), np.errstate(invalid="ignore"):
        for name, cache in caches.items():
            evaluations[name] = evaluate(classifier.module, classifier.task, cache, batch_tokens, world)
            classifier.check_finite(evaluations[name].metrics["loss"])
    return evaluations


def write_calibrated(arguments: argparse.Namespace, task: Task, cache: TokenCache, probabilities: np.ndarray) -> str:
    """Write a model folder with calibrated probabilities, and a note in its card; returns a line to print.

    The temperature is fitted to the model's probabilities for the cache's rows, fp32 [rows, outputs].
    """
    source, output = arguments.models[0], arguments.output
    temperature, before, after = calibrate(task, probabilities, cache.labels)
    encoder, card = find_encoder(str(source)), read_card(source)
    encoder = replace(encoder, thresholds=at_temperature(task, temperature).thresholds)
    with write_errors(output), scratch_folder(output) as scratch:
        written = scratch / output.name
        write_folder(written, load_tensors(encoder), encoder, card, temperature)
        if temperature != 1:
            classifier = Classifier.load(written, arguments.precision, arguments.device)
            after = evaluate_all(classifier, {"dev": cache}, arguments.batch_tokens)["dev"].metrics["ece"]
        calibration = describe_calibration(temperature, before, after)
        if temperature != 1 and card:
            card = with_note(card, f"{CALIBRATED} {arguments.calibrate.name}: {calibration}.", previous=CALIBRATED)
            (written / CARD_NAME).write_text(card, encoding="utf-8")
        put_in_place(written, output, replaces=False)
    return f"{output}: {calibration}\n"


def read_files(arguments: argparse.Namespace, classifier: Classifier) -> tuple[Task, dict[str, Split], Caches]:
    """Check and tokenize all files; returns the task that reads their labels, and by name their splits and caches."""
    task, tokenizer = classifier.task, classifier.tokenizer
    splits, caches = {}, {}
    check_options(task, arguments)
    check_splits(getattr(arguments, "columns", ()), arguments.files)
    for name, file in arguments.files.items():
        given = read_options_for(arguments, name)
        check_pairs(arguments.models[0], given.pair, "--text-pair-column NAME")
        read_options = replace(given, may_be_empty=not given.drop_unusable, classes=tuple(task.label_names))
        splits[name] = Split([file], read_options, [cached_inspection(file, read_options)])
    label_ids: dict[str, int] = {}
    labels = [label for split in splits.values() for label in split.inspections[0].labels]
    if label_names := getattr(arguments, "label_names", None):
        names, numbers = resolve_label_names(label_names, labels, next(iter(splits)))
        if set(names) != set(task.label_names):
            raise UserError(f"--label-names {','.join(names)}: the model's classes are {listed(task.label_names)}")
        label_ids = {key: task.label_names.index(names[i]) for key, i in numbers.items()}
    task = replace(task, label_ids=label_ids, are_positional=are_positional(labels))
    for split in splits.values():
        (file,), (inspection,), read_options = split.files, split.inspections, split.read_options
        left_out = inspection.check(file, task, read_options.drop_unusable)
        notes = description(file, inspection.layout, read_options, inspection.rows), left_out_of(left_out)
        for note in filter(None, notes):
            print(f"read as    {note}", file=sys.stderr)
    tokenizer_settings = tokenizer.file, tokenizer.max_length, tokenizer.long_texts
    for name, split in splits.items():
        caches[name] = tokenize_files(split.files, tokenizer_settings, split.read_options, task, lambda *_: tokenizer)
    return task, splits, caches


def write_json(
    arguments: argparse.Namespace, precision: str, task: Task, caches: Caches, evaluations: dict[str, Evaluation]
) -> None:
    reports, all_metrics = {}, [evaluation.metrics for evaluation in evaluations.values()]
    for name, evaluation in evaluations.items():
        results, labels = evaluation.results, caches[name].labels
        numbers = {key: values.tolist() for key, values in task.per_label(results, labels).items()}
        classes = {label: {key: numbers[key][i] for key in numbers} for i, label in enumerate(task.label_names)}
        metrics = {key: value for key, value in evaluation.metrics.items() if key not in ("precision", "recall")}
        confusion = task.confusion(results, labels).tolist()
        reports[name] = {"file": str(arguments.files[name]), **metrics, "classes": classes, "confusion": confusion}
    about = {"model": " ".join(map(str, arguments.models)), "precision": precision}
    content = {**about, "labels": task.label_names, "files": reports, "mean": mean_of(all_metrics)}
    with write_errors(arguments.json):
        write_text(arguments.json, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    models = arguments.models = [model_folder(name) for name in arguments.models]
    tune_memory()
    against = arguments.against
    classifier = Classifier.load_ensemble(models, arguments.precision, arguments.device)
    precision = classifier.precision
    if against and arguments.precision == "int8" != precision:
        raise UserError("--precision int8 is not supported on this machine, so it cannot be compared")
    if against == precision:
        raise UserError(f"--against {precision} compares {precision} with itself; name another --precision")
    task, splits, caches = read_files(arguments, classifier)
    evaluations = evaluate_all(classifier, caches, arguments.batch_tokens)
    if arguments.calibrate:
        print(write_calibrated(arguments, task, caches["dev"], evaluations["dev"].probabilities), end="", flush=True)
        return
    metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    if arguments.json:
        write_json(arguments, precision, task, caches, evaluations)
    if arguments.tensorboard:
        with write_errors(arguments.tensorboard), open_events(arguments.tensorboard) as writer:
            for name, cache in caches.items():
                add_scalars(writer, 0, name, {key: metrics[name][key] for key in task.tensorboard_metrics})
                draw_evaluation(writer, 0, name, splits[name], cache.labels, evaluations[name], task)
    lines = evaluation_table(task, metrics)
    for name, cache in caches.items():
        lines += class_lines(name, task, evaluations[name].results, cache.labels)
    if not against:
        print("\n".join([*lines, ""]), end="", flush=True)
        return
    expected = evaluate_all(Classifier.load_ensemble(models, against, arguments.device), caches, arguments.batch_tokens)
    both = {}
    for name, cache in caches.items():
        both[name] = evaluations[name].probabilities, expected[name].probabilities, cache.labels
    compared = compare_files(task, both)
    try:
        print("\n".join([*lines, "", *comparison_table(task, compared, precision, against), ""]), end="", flush=True)
    finally:  # even if standard output is closed
        check_comparison(task, compared, arguments.most_changed / 100, arguments.most_lost / 100, precision, against)
