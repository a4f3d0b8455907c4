"""Train students on labelled rows and on teachers' predictions for unlabelled texts: distillation, self-training.

    sst2-xlmr distill --teacher runs/seed-1/model runs/seed-2/model --unlabelled texts.txt \\
        --output-dir runs/distilled --encoder models/small --train-file train.tsv --dev-file dev.tsv --epochs 1

    sst2-xlmr distill --unlabelled texts.txt --labelled "--epochs 10" --output-dir runs/self-trained \\
        --encoder models/small --train-file few.tsv --dev-file dev.tsv --epochs 1

All other options go to train.py, for the students. The `labelled` runs, one per seed, use the labelled rows alone, with
the options of --labelled after the others; they are a baseline, and without --teacher the teachers. In each round,
students, one per seed, are trained on all labelled rows and on the unlabelled texts, whose soft labels are the mean of
the teachers' probabilities; they teach the next round. Unlabelled texts that are also labelled rows, or evaluated on,
are left out.

The runs are the folders labelled/seed-N, round-1/seed-N, ... in --output-dir; round-1/teacher.json has the teachers'
metrics. The same command skips finished runs and continues stopped ones.
"""

from __future__ import annotations

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
from sst2_xlmr.data.rows import Row, check_pairs, columns_of, in_chunks, read_rows, texts_of
from sst2_xlmr.data.token_cache import text_digests
from sst2_xlmr.model.classifier import task_of
from sst2_xlmr.model.encoders import find_encoder, find_model, model_folder
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options
from sst2_xlmr.programs.checks import refuse
from sst2_xlmr.programs.row_files import checked_config, split_words, with_values, words_for, write_rows
from sst2_xlmr.programs.study import compare, train
from sst2_xlmr.report.comparison import Figures
from sst2_xlmr.task import align_classes, as_labels, check_options, main_metric
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of, digest_of_input, read_json, write_text

ROWS_AT_ONCE = 4096
SETTINGS = ("temperature", "align_classes", "unlabelled_weight", "teacher_precision")  # that decide the soft labels


class Distillation:
    def __init__(self, arguments: argparse.Namespace, words: list[str]) -> None:
        """Check what train.py does not check itself; UserError if options or files cannot be used."""
        self.arguments, self.folder = arguments, arguments.output_dir
        self.labelled = [*words, *split_words("--labelled", arguments.labelled)]
        checked_config(self.labelled, self.folder, "--seed", "--dev-share")
        self.config = config = checked_config(words, self.folder)
        self.task, splits = inspect_splits(config, downloads.cache_dir() / "tokens", quiet=True)
        labelled = {name: split.rows(self.task) for name, split in splits.items() if split.is_labelled}
        self.rows = {name: [row for _, row in rows] for name, rows in labelled.items()}
        evaluated = [name for name in self.rows if name != "train"]
        self.evaluated = {name: self.folder / f"files/{name.replace('/', '-')}.jsonl" for name in evaluated}
        refuse(("dev" not in splits, "distill needs rows to evaluate on; name them with --dev-file"))
        check_options(self.task, arguments)
        for file in arguments.unlabelled:
            next(self.rows_of(file))  # a UserError if the file cannot be read
        self.teachers = [model_folder(name) for name in arguments.teacher]
        for teacher in self.teachers:
            check_pairs(teacher, config.text_pair_column, "--text-pair-column NAME")
            tasks = task_of(find_model(teacher)), self.task
            its_labels, ours = (f"{', '.join(task.label_names)} ({task.option})" for task in tasks)
            same = "they must be the same, and in the same order"
            refuse((its_labels != ours, f"{teacher} has labels {its_labels}, the labelled rows have {ours}: {same}"))
        self.known = np.unique(np.concatenate(list(map(digests_of, self.rows.values()))))

    def rows_of(self, file: Path) -> Iterator[Row]:
        return read_rows(file, columns_of(self.config, "unlabelled"), None)

    def soft_labelled(self, classifier: Classifier, counts: dict[str, int]) -> Iterator[Row]:
        """Yield the unlabelled rows with the teacher's probabilities as label; counts "texts" and "left out"."""
        arguments = self.arguments
        for file in arguments.unlabelled:  # read twice, as all its probabilities are needed before the first label
            found = []
            with tqdm(unit=" texts", disable=None, leave=False, dynamic_ncols=True) as bar:
                for chunk, rows in self.usable_rows(file):
                    found.append(classifier.probabilities(texts_of(rows)))
                    counts["left out"] += len(chunk) - len(rows)
                    bar.update(len(chunk))
            probabilities = np.concatenate(found)
            if arguments.align_classes:
                probabilities = align_classes(classifier.task, probabilities, self.labels_of("train"))
            task, labels = as_labels(classifier.task, probabilities, arguments.temperature or 1.0)
            counts["texts"] += len(labels)
            for row, label in zip((row for _, rows in self.usable_rows(file) for row in rows), labels):
                yield row._replace(label=task.label_value(label), weight=arguments.unlabelled_weight)
        if not counts["texts"]:
            raise UserError("all unlabelled texts are also labelled or evaluated on; give others with --unlabelled")

    def usable_rows(self, file: Path) -> Iterator[tuple[list[Row], list[Row]]]:
        """Yield a file's rows in chunks: all of them, and those whose texts are neither empty nor known."""
        for chunk in in_chunks(self.rows_of(file), ROWS_AT_ONCE):
            is_known = np.isin(digests_of(chunk), self.known)
            yield chunk, [row for row, known in zip(chunk, is_known) if not known and row.text.strip()]

    def labels_of(self, split: str) -> np.ndarray:
        return np.asarray([row.label for row in self.rows[split]], self.task.label_dtype)

    def teach(self, folder: Path, teachers: list[Path]) -> None:
        """Write a round's training rows and teacher.json, unless that exists, and print the teachers' metrics."""
        arguments = self.arguments
        weights = [file for name in teachers for file in find_encoder(str(name)).weights_files]
        inputs = {
            "teachers": [digest_of(file) for file in weights],
            "unlabelled": [digest_of_input(file) for file in arguments.unlabelled],
            **{name: getattr(arguments, name) for name in SETTINGS},
        }
        path = folder / "teacher.json"
        if not path.is_file():
            classifier = Classifier.load_mean(teachers, arguments.teacher_precision, self.config.device)
            counts = {"texts": 0, "left out": 0}
            labelled = with_values(self.rows["train"], self.task)
            write_rows(folder / "train.jsonl", itertools.chain(labelled, self.soft_labelled(classifier, counts)))
            figures = {name: self.value_of(classifier, name) for name in self.evaluated}
            write_text(path, json.dumps({"inputs": inputs, "figures": figures, **counts}, indent=2) + "\n")
        report = read_json(path, "choose another --output-dir")
        if report["inputs"] != inputs:
            raise UserError(f"{path} was written for other teachers, texts or options; choose another --output-dir")
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in report["figures"].items())
        left_out = f"; {report['left out']:,} left out: labelled, evaluated on, or empty" if report["left out"] else ""
        tqdm.write(f"{folder.name}: {report['texts']:,} unlabelled texts{left_out}; teacher {metrics}", file=sys.stdout)

    def value_of(self, classifier: Classifier, split: str) -> float:
        """Return the main metric of a classifier on a split."""
        task, labels = classifier.task, self.labels_of(split)
        probabilities = classifier.probabilities(texts_of(self.rows[split]))
        return main_metric(task.metrics(task.results_of(probabilities, labels), labels))

    def student(self, round: int, seed: int) -> tuple[bool, Figures]:
        """Train a student of a round; see `study.train`."""
        folder, seeds = self.folder / f"round-{round}", self.arguments.seeds
        former = self.folder / (f"round-{round - 1}" if round > 1 else "labelled")
        if seed == seeds[0]:
            for name, file in self.evaluated.items():
                write_rows(file, with_values(self.rows[name], self.task))
            has_teachers = round == 1 and self.teachers
            self.teach(folder, self.teachers if has_teachers else [former / f"seed-{n}/model" for n in seeds])
        files = {"train": folder / "train.jsonl", **self.evaluated}
        words = words_for(self.config, self.task, files, self.arguments.unlabelled_weight != 1)
        return train(words, folder, seed)


def digests_of(rows: list[Row]) -> np.ndarray:
    return text_digests([row.text for row in rows], [row.pair for row in rows])


def main(argv: list[str] | None = None) -> None:
    arguments, rest = options.parse_known("distill", argv)
    refuse((arguments.temperature == 0, "--temperature must be above 0"))
    distillation = Distillation(arguments, rest)
    runs = {"labelled": functools.partial(train, distillation.labelled, arguments.output_dir / "labelled")}
    for number in range(1, arguments.rounds + 1):
        runs[f"round-{number}"] = functools.partial(distillation.student, number)
    compare(arguments.seeds, arguments.output_dir, runs, by_setting=True)
