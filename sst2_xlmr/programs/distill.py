"""Train students on labelled rows and on teachers' predictions for unlabelled texts: distillation, self-training.

All options but its own go to train.py, for the students (docs/recipes.md has examples). The `labelled` runs, one per
seed, use the labelled rows alone; they are a baseline, and without --teacher the teachers. In each round, students, one
per seed, are trained on all labelled rows and on the unlabelled texts, whose soft labels are the mean of the teachers'
probabilities; they teach the next round. Unlabelled texts that are also labelled rows, or evaluated on, are left out.

The runs are the folders labelled/seed-N, round-1/seed-N, ... in --output-dir; round-1/teacher.json has the teachers'
metrics. The same command skips finished runs and continues stopped ones.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sst2_xlmr.data.prepare import inspect_splits
from sst2_xlmr.data.rows import Row, check_pairs, in_chunks, read_options_for, read_rows, texts_of
from sst2_xlmr.data.token_cache import text_digests
from sst2_xlmr.model.classifier import task_of
from sst2_xlmr.model.encoders import find_encoder, find_model, model_folder
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options, study_runs
from sst2_xlmr.programs.study_runs import Trained, checked_config, split_words, train, write_rows
from sst2_xlmr.task import check_options, main_metric
from sst2_xlmr.util.errors import UserError, refuse
from sst2_xlmr.util.files import digest_of, digest_of_input, read_json, write_text

ROWS_AT_ONCE = 4096
SETTINGS = ("temperature", "align_classes", "unlabelled_weight", "teacher_precision")  # that decide the soft labels


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check everything before any run starts; adds to the options:

    `baseline`, train.py's words for the labelled runs; `config` and `task`, the students'; `rows`, the labelled ones,
    by split; `known`, the digests of their texts; `evaluated`, the files for the rows of all splits but train.
    """
    plan = options.parse("distill", argv)
    refuse((plan.temperature == 0, "--temperature must be above 0"))
    plan.baseline = [*plan.for_train, *split_words("--labelled", plan.labelled)]
    checked_config(plan.baseline, plan.output_dir, "--seed", "--dev-share")
    plan.config = config = checked_config(plan.for_train, plan.output_dir)
    plan.task, splits = inspect_splits(config)
    plan.rows = {name: [row for _, row in split.rows(plan.task)] for name, split in splits.items() if split.is_labelled}
    files = plan.output_dir / "files"
    plan.evaluated = {name: files / f"{name.replace('/', '-')}.jsonl" for name in plan.rows if name != "train"}
    refuse(("dev" not in splits, "distill needs rows to evaluate on; name them with --dev-file"))
    check_options(plan.task, plan)
    for file in plan.unlabelled:
        next(read_rows(file, read_options_for(config, "unlabelled"), None))  # a UserError if the file cannot be read
    plan.teachers = [model_folder(name) for name in plan.teacher]
    for teacher in plan.teachers:
        check_pairs(teacher, config.text_pair_column, "--text-pair-column NAME")
        tasks = task_of(find_model(teacher)), plan.task
        its_labels, ours = (f"{', '.join(task.label_names)} ({task.option})" for task in tasks)
        problem = f"{teacher} has labels {its_labels}, the labelled rows have {ours}"
        refuse((its_labels != ours, f"{problem}: they must be the same, and in the same order"))
    plan.known = np.unique(np.concatenate([digests_of(rows) for rows in plan.rows.values()]))
    return plan


def digests_of(rows: list[Row]) -> np.ndarray:
    return text_digests([row.text for row in rows], [row.pair for row in rows])


def usable_rows(plan: argparse.Namespace, file: Path) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield a file's rows in chunks: all of them, and those whose texts are neither empty nor known."""
    for chunk in in_chunks(read_rows(file, read_options_for(plan.config, "unlabelled"), None), ROWS_AT_ONCE):
        is_known = np.isin(digests_of(chunk), plan.known)
        yield chunk, [row for row, known in zip(chunk, is_known) if not known and row.text.strip()]


def soft_labelled(plan: argparse.Namespace, classifier: Classifier, counts: dict[str, int]) -> Iterator[Row]:
    """Yield the unlabelled rows with the teacher's probabilities as label; counts "texts" and "left out"."""
    for file in plan.unlabelled:  # read twice, as all its probabilities are needed before the first label
        found = []
        with tqdm(unit=" texts", disable=None, leave=False, dynamic_ncols=True) as bar:
            for chunk, rows in usable_rows(plan, file):
                found.append(classifier.probabilities(texts_of(rows)))
                counts["left out"] += len(chunk) - len(rows)
                bar.update(len(chunk))
        probabilities = np.concatenate(found)
        if plan.align_classes:
            labels = np.asarray([row.label for row in plan.rows["train"]], plan.task.label_dtype)
            probabilities = classifier.task.align_classes(probabilities, labels)
        labels = classifier.task.soft_labels(probabilities, plan.temperature or 1.0)
        counts["texts"] += len(labels)
        for row, label in zip((row for _, rows in usable_rows(plan, file) for row in rows), labels):
            yield row._replace(label=label, weight=plan.unlabelled_weight)
    if not counts["texts"]:
        raise UserError("all unlabelled texts are also labelled or evaluated on; give others with --unlabelled")


def teach(plan: argparse.Namespace, folder: Path, teachers: list[Path]) -> None:
    """Write a round's training rows and teacher.json, unless that exists, and print the teachers' metrics."""
    weights = [file for name in teachers for file in find_encoder(str(name)).weights_files]
    inputs = {
        "teachers": [digest_of(file) for file in weights],
        "unlabelled": [digest_of_input(file) for file in plan.unlabelled],
        **{name: getattr(plan, name) for name in SETTINGS},
    }
    path = folder / "teacher.json"
    if not path.is_file():
        classifier = Classifier.load_ensemble(teachers, plan.teacher_precision, plan.config.device)
        counts, figures = {"texts": 0, "left out": 0}, {}
        rows = itertools.chain(plan.rows["train"], soft_labelled(plan, classifier, counts))
        write_rows(folder / "train.jsonl", plan.task, rows)
        for name in plan.evaluated:
            labels = np.asarray([row.label for row in plan.rows[name]], plan.task.label_dtype)
            results = classifier.task.results_of(classifier.probabilities(texts_of(plan.rows[name])), labels)
            figures[name] = main_metric(classifier.task.metrics(results, labels))
        write_text(path, json.dumps({"inputs": inputs, "figures": figures, **counts}, indent=2) + "\n")
    report = read_json(path, "choose another --output-dir")
    if report["inputs"] != inputs:
        raise UserError(f"{path} was written for other teachers, texts or options; choose another --output-dir")
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in report["figures"].items())
    left_out = f"; {report['left out']:,} left out: labelled, evaluated on, or empty" if report["left out"] else ""
    tqdm.write(f"{folder.name}: {report['texts']:,} unlabelled texts{left_out}; teacher {metrics}", file=sys.stdout)


def train_student(plan: argparse.Namespace, number: int, seed: int) -> Trained:
    """Train a student of a round."""
    folder = plan.output_dir / f"round-{number}"
    if seed == plan.seeds[0]:
        previous = plan.output_dir / (f"round-{number - 1}" if number > 1 else "labelled")
        for name, file in plan.evaluated.items():
            write_rows(file, plan.task, plan.rows[name])
        has_teachers = number == 1 and plan.teachers
        teach(plan, folder, plan.teachers if has_teachers else [previous / f"seed-{n}/model" for n in plan.seeds])
    files = {"train": folder / "train.jsonl", **plan.evaluated}
    return train(study_runs.train_arguments(plan.config, plan.task, files, plan.unlabelled_weight != 1), folder, seed)


def main(argv: list[str] | None = None) -> None:
    plan = parse(argv)
    runs = {"labelled": functools.partial(train, plan.baseline, plan.output_dir / "labelled")}
    for number in range(1, plan.rounds + 1):
        runs[f"round-{number}"] = functools.partial(train_student, plan, number)
    study_runs.run_and_compare(plan.seeds, plan.output_dir, runs, by_setting=True)
