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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sst2_xlmr.cli import OneLineParser, add_bounds, add_model_options, add_option, bounds_of
from sst2_xlmr.config import Config, named_files
from sst2_xlmr.data.formats import KINDS, either
from sst2_xlmr.data.rows import COLUMN_OPTIONS, Columns, columns_of
from sst2_xlmr.data.token_cache import TokenCache, tokenize_file
from sst2_xlmr.evaluation.calibration import Calibration, calibrate
from sst2_xlmr.evaluation.compare import Answers, agreement_table, check_agreement
from sst2_xlmr.evaluation.evaluate import Evaluation, evaluate
from sst2_xlmr.evaluation.metrics import mean_of, per_class
from sst2_xlmr.export.folder import read_card, with_note, write_folder
from sst2_xlmr.model.encoders import TOKENIZER_NAME, find_encoder
from sst2_xlmr.model.weights import load_tensors
from sst2_xlmr.predictor import load_model
from sst2_xlmr.report.table import evaluation_table
from sst2_xlmr.report.tensorboard import (
    SCALARS,
    add_scalars,
    draw_accuracy,
    draw_evaluation,
    make_event_folder,
    open_events,
    read_texts,
)
from sst2_xlmr.util import downloads
from sst2_xlmr.util.distributed import World, choose_device
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.memory import keep_freed_memory, memory_errors

MOST_CONFUSED_CLASSES = 10  # whose confusion matrix fits on a line


def check_outputs(json_file: Path | None, tensorboard_dir: Path | None) -> None:
    """Find out before any work that a result cannot be written."""
    if json_file:
        folder = json_file.absolute().parent
        if json_file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write --json {json_file}; name a file in a folder that is there")
    if tensorboard_dir:
        make_event_folder(tensorboard_dir, "--tensorboard")


def class_lines(name: str, evaluation: Evaluation, label_names: list[str]) -> list[str]:
    """Return the lines of a table of a file's classes, with the confusion matrix unless it is too wide."""
    classes = per_class(evaluation.confusion)
    width = max(len(text) for text in [*label_names, name])
    shown = label_names if len(label_names) <= MOST_CONFUSED_CLASSES else []
    widths = [max(len(label), len(f"{evaluation.confusion.max():,}")) for label in shown]
    head = "  ".join(f"{label:>{size}}" for label, size in zip(shown, widths))
    lines = [f"{name:<{width}}  precision  recall      F1     rows" + (f"   taken for: {head}" if shown else "")]
    for number, label in enumerate(label_names):
        precision, recall, f1, rows = (classes[key][number] for key in ("precision", "recall", "f1", "support"))
        counts = "  ".join(f"{count:>{size},}" for count, size in zip(evaluation.confusion[number], widths))
        line = f"{label:<{width}}     {precision:.4f}  {recall:.4f}  {f1:.4f}  {rows:>7,}"
        lines.append(line + (f"   {'':<10} {counts}" if shown else ""))
    return lines


def as_json(file: Path, evaluation: Evaluation, label_names: list[str]) -> dict[str, Any]:
    """Return a file's part of the JSON."""
    numbers = {key: values.tolist() for key, values in per_class(evaluation.confusion).items()}
    classes = {label: {key: numbers[key][i] for key in numbers} for i, label in enumerate(label_names)}
    keys = ("rows", "loss", "accuracy", "accuracy_low", "accuracy_high", "macro_f1", "ece")
    metrics = {key: evaluation.metrics[key] for key in keys}
    return {"file": str(file), **metrics, "classes": classes, "confusion": evaluation.confusion.tolist()}


def write_json(file: Path, content: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --json {file}: {error.strerror}") from None


def write_events(
    folder: Path,
    evaluations: dict[str, Evaluation],
    files: dict[str, Path],
    caches: dict[str, TokenCache],
    columns: Columns,
    classes: list[str],
) -> None:
    """Write scalars and pictures for TensorBoard, at step 0."""
    try:
        with open_events(folder) as writer:
            for name, evaluation in evaluations.items():
                add_scalars(writer, 0, name, {key: evaluation.metrics[key] for key in SCALARS})
                texts_of = partial(read_texts, files[name], caches[name].digest, columns, classes)
                assert evaluation.probabilities is not None
                draw_evaluation(writer, 0, name, caches[name].labels, evaluation.probabilities, classes, texts_of)
            draw_accuracy(writer, 0, {name: evaluation.metrics for name, evaluation in evaluations.items()})
    except OSError as error:
        raise UserError(f"cannot write to --tensorboard {folder}: {error.strerror}") from None


def answers_of(found: Evaluation, expected: Evaluation, labels: np.ndarray) -> Answers:
    """Return both sides of a comparison, whose probabilities must have been kept."""
    assert found.probabilities is not None
    assert expected.probabilities is not None
    return Answers(found.probabilities, expected.probabilities, labels)


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
    if arguments.output:
        if os.path.lexists(arguments.output):
            raise UserError(f"--output {arguments.output} is there already; choose another name")
        try:
            parent = arguments.output.absolute().parent
            parent.mkdir(parents=True, exist_ok=True)
            if not os.access(parent, os.W_OK):
                raise UserError(f"cannot write to --output {arguments.output}: no permission; choose another place")
        except OSError as error:
            raise UserError(f"cannot write to --output {arguments.output}: {error.strerror}") from None


def write_calibrated(source: Path, output: Path, calibration: Calibration) -> None:
    """Write a model folder like `source` that gives calibrated probabilities, and say so in its card."""
    encoder = find_encoder(str(source))
    begin, card = "The probabilities are calibrated: ", read_card(source)
    if calibration.temperature != 1:
        card = with_note(card, f"{begin}{calibration}.", former=f"{begin}temperature")
    write_folder(output, load_tensors(encoder), encoder, card, calibration.temperature)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Evaluate a trained model on labelled files.", allow_abbrev=False)
    add_model_options(parser)
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="fit a temperature on these rows, and write --output"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the new folder of the calibrated model")
    parser.add_argument(
        "--file",
        default=[],
        nargs="+",
        action="extend",
        metavar="[NAME=]FILE",
        help=f"labelled rows to evaluate on: {either(KINDS)}, perhaps with .gz; may be repeated",
    )
    for name in COLUMN_OPTIONS:
        add_option(parser, name)
    parser.add_argument("--against", choices=("bf16", "fp32"), help="compare --precision with this one")
    add_bounds(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write scalars and pictures there")
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def evaluate_all(
    model: torch.nn.Module, caches: dict[str, TokenCache], batch_tokens: int, world: World, keep_probabilities: bool
) -> dict[str, Evaluation]:
    with memory_errors(f"take a smaller --batch-tokens than {batch_tokens}"):
        return {name: evaluate(model, cache, batch_tokens, world, keep_probabilities) for name, cache in caches.items()}


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    files = named_files(arguments.file, "--file") or {"dev": arguments.calibrate}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"--file {file} is not a file")
    check_outputs(arguments.json, arguments.tensorboard)
    keep_freed_memory()
    device = choose_device(arguments.device)
    model, tokenizer, label_names, precision, _ = load_model(arguments.model, device, arguments.precision)
    if arguments.against and arguments.precision == "int8" != precision:
        raise UserError("--precision int8 cannot be compared on this machine, which cannot compute it")
    if arguments.against == precision:
        raise UserError(f"--against {precision} compares {precision} with itself; name another --precision")
    given = {name: value for name, value in vars(arguments).items() if name in COLUMN_OPTIONS}
    config = Config(**given, label_names=label_names, max_length=tokenizer.max_length)
    columns = columns_of(config)
    cache_dir, tokenizer_file = downloads.cache_dir() / "tokens", arguments.model / TOKENIZER_NAME
    caches = {  # all of them before the first evaluation, so that a bad row shows at once
        name: tokenize_file(
            file, tokenizer_file, columns, label_names, tokenizer.max_length, cache_dir, lambda *_: tokenizer
        )
        for name, file in files.items()
    }
    world = World.alone(device)
    keep_probabilities = bool(arguments.tensorboard or arguments.calibrate or arguments.against)
    evaluations = evaluate_all(model, caches, arguments.batch_tokens, world, keep_probabilities)
    if arguments.calibrate:
        calibration = calibrate(evaluations["dev"].probabilities, caches["dev"].labels)
        write_calibrated(arguments.model, arguments.output, calibration)
        print(f"{arguments.output}: {calibration}")
        return
    metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    if arguments.json:
        parts = {name: as_json(files[name], evaluation, label_names) for name, evaluation in evaluations.items()}
        content = {"model": str(arguments.model), "precision": precision, "labels": label_names, "files": parts}
        write_json(arguments.json, {**content, "mean": mean_of(list(metrics.values()))})
    if arguments.tensorboard:
        write_events(arguments.tensorboard, evaluations, files, caches, columns, label_names)
    print("\n".join(evaluation_table(metrics)))
    for name, evaluation in evaluations.items():
        print("\n".join(["", *class_lines(name, evaluation, label_names)]))
    if arguments.against:
        reference = load_model(arguments.model, device, arguments.against).module
        expected = evaluate_all(reference, caches, arguments.batch_tokens, world, True)
        answers = {name: answers_of(evaluations[name], expected[name], cache.labels) for name, cache in caches.items()}
        print("\n".join(["", *agreement_table(answers, precision, arguments.against)]), flush=True)
        check_agreement(answers, *bounds_of(arguments), precision, arguments.against)
