"""Classify texts with a trained model.

    python scripts/predict.py --model runs/NAME/model "A fine film." "Not my cup of tea."
    python scripts/predict.py --model runs/NAME/model < sentences.txt
    python scripts/predict.py --model runs/NAME/model --input reviews.csv --output answers.csv
    python scripts/predict.py --model runs/NAME/model --input test.tsv --glue-submission submission

Prints one line per text, in order: label, tab, its probability, tab, text; or writes all columns of the input, followed
by these, to a file, which gets its name when it is whole. Rows are read, classified and written some at a time, so that
a file may be larger than memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, TextIO

from tqdm import tqdm

from sst2_xlmr.accelerate import accelerate
from sst2_xlmr.cli import OneLineParser, add_model_options, add_option
from sst2_xlmr.config import Config, flag
from sst2_xlmr.data.formats import KINDS, Fields, decoded_lines, either, is_table, kind_of, row_writer
from sst2_xlmr.data.rows import Example, check_text, columns_of, in_chunks, listed, read_examples
from sst2_xlmr.distributed import World, choose_device
from sst2_xlmr.errors import UserError, exit_on_user_error
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.files import new_file
from sst2_xlmr.memory import keep_freed_memory
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.numerics import choose_precision

ROWS_AT_ONCE = 1024
COLUMN_OPTIONS = ("text_column", "text_pair_column", "header")
GLUE_NUMBERS = {"negative": 0, "positive": 1, "0": 0, "1": 1, "LABEL_0": 0, "LABEL_1": 1}
NO_ANSWER = "?"
# Takes a row, its label, and the probabilities of all classes.
Writer = Callable[[Example, str, Sequence[float]], object]


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability from 0 to 1")
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and check whatever it and the file system alone can tell."""
    parser = OneLineParser(
        allow_abbrev=False, description="Classify texts: label and probability for each, in the order of the texts."
    )
    add_model_options(parser)
    parser.add_argument("--input", type=Path, metavar="FILE", help=f"texts: a {either(KINDS)} file, perhaps with .gz")
    for name in COLUMN_OPTIONS:
        add_option(parser, name)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"write a {either(KINDS)} file, perhaps with .gz, instead"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument(
        "--abstain-below",
        type=_probability,
        default=0.0,
        metavar="P",
        help=f"answer {NO_ANSWER} instead of a label whose probability is lower",
    )
    parser.add_argument("--all-probabilities", action="store_true", help="also those of the other classes")
    parser.add_argument("--glue-submission", type=Path, metavar="DIR", help="write DIR/SST-2.tsv for the GLUE server")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="default: the lines of standard input")
    arguments = parser.parse_args(argv)
    if arguments.input and arguments.sentences:
        raise UserError(f"--input and a sentence, {arguments.sentences[0][:40]!r}: leave one of them out")
    for name in COLUMN_OPTIONS:
        if not arguments.input and name in arguments:
            raise UserError(f"{flag(name)} needs --input, whose columns it names")
    if arguments.glue_submission and arguments.abstain_below:
        raise UserError("--glue-submission takes a label for every row; leave out --abstain-below")
    if arguments.glue_submission and not arguments.input:
        raise UserError("--glue-submission needs --input, the test.tsv of SST-2")
    if arguments.output:
        kind_of(arguments.output)
    try:
        for path in output_files(arguments):
            if path.exists() and not arguments.overwrite:
                raise UserError(f"{path} is there already; choose another name, or --overwrite")
        if arguments.glue_submission:
            arguments.glue_submission.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {error.filename}: {error.strerror}") from None
    return arguments


def output_files(arguments: argparse.Namespace) -> list[Path]:
    """Return the files that will be written."""
    glue = arguments.glue_submission
    return [file for file in (arguments.output, glue and glue / "SST-2.tsv") if file]


def read_sentences(sentences: list[str]) -> Iterator[str]:
    """Yield the given sentences, or if there are none the lines of standard input (UTF-8, LF or CRLF)."""
    for number, sentence in enumerate(sentences, 1):
        check_text(sentence, f"sentence {number}")
        yield sentence
    if sentences:
        return
    if sys.stdin.isatty():
        raise UserError(
            "no sentences: give them as arguments, one per line on standard input, or in a file with --input"
        )
    for _, line in decoded_lines(sys.stdin.buffer, "standard input"):
        yield line.rstrip("\r\n")


def read_input(arguments: argparse.Namespace) -> Iterator[Example]:
    """Yield the rows to classify; a file's first row is read at once, to report a wrong column before any work."""
    if not arguments.input:
        names = ["sentence"]
        numbered = enumerate(read_sentences(arguments.sentences), 1)
        return (Example(sentence, None, Fields(line, names, [sentence])) for line, sentence in numbered)
    given = {name: value for name, value in vars(arguments).items() if name in COLUMN_OPTIONS}
    rows = read_examples(arguments.input, columns_of(Config(**given)))
    return itertools.chain([next(rows)], rows)


def write_lines(all_probabilities: bool) -> Writer:
    """Return a writer of lines on standard output, where tabs and line ends in a text become spaces."""
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    write = row_writer(sys.stdout, ".tsv")

    def add(row: Example, label: str, probabilities: Sequence[float]) -> None:
        shown = [max(probabilities), *(probabilities if all_probabilities else ())]
        texts = [row.text] if row.pair is None else [row.text, row.pair]
        write((), [label, *(f"{probability:.4f}" for probability in shown), *texts])

    return add


class RowsWriter:
    """Writes the input's rows with `label`, `probability` and, if wanted, `probability_CLASS`.

    If the input already has such a column, the new one's name gets the prefix `predicted_`.
    """

    def __init__(self, file: TextIO, path: Path, header: bool, label_names: list[str], all_probabilities: bool) -> None:
        self.path, self.is_table = path, is_table(path)
        self.label_names, self.all_probabilities = label_names, all_probabilities
        self.write = row_writer(file, kind_of(path))
        self.needs_header = header and self.is_table
        self.first: list[str] = []  # names of the first row's columns
        self.last: list[str] = []  # and of the last one's
        self.new: list[str] = []

    def __call__(self, row: Example, label: str, probabilities: Sequence[float]) -> None:
        names, cells = row.fields.names, row.fields.cells
        if names is not self.last:
            self._name_columns(row)
        if self.is_table and names != self.first:
            cells = [cells[names.index(name)] for name in self.first]
        shown = [max(probabilities), *(probabilities if self.all_probabilities else ())]
        rounded = [round(probability, 6) for probability in shown]
        self.write([*names, *self.new], [*cells, label, *rounded])

    def _name_columns(self, row: Example) -> None:
        """Name the new columns of the first row, or, in JSONL, of a row whose keys differ from the last one's."""
        self.last = names = row.fields.names
        self.first = self.first or names
        if not self.is_table and len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"two columns are named {twice!r}, which JSON cannot express; let {self.path} end in .csv or .tsv"
            )
        if self.is_table and sorted(names) != sorted(self.first):
            raise UserError(
                f"line {row.fields.line} of the input has other keys than the first row; let {self.path} end in .jsonl"
            )
        self.new = ["label", "probability"]
        self.new += [f"probability_{name}" for name in self.label_names if self.all_probabilities]
        for number, name in enumerate(self.new):
            while name in names:
                name = "predicted_" + name
            self.new[number] = name
        if self.needs_header:
            self.write((), [*names, *self.new])
            self.needs_header = False


def write_submission(file: TextIO, label_names: list[str]) -> Writer:
    """Return a writer of the GLUE server's format: index, tab, 0 or 1."""
    numbers = {name: GLUE_NUMBERS.get(name) for name in label_names}
    if len(numbers) != 2 or set(numbers.values()) != {0, 1}:
        raise UserError(
            f"--glue-submission: the model's classes are {listed(label_names)}, those of SST-2 negative and positive"
        )
    write = row_writer(file, ".tsv")
    write((), ["index", "prediction"])
    count = itertools.count()

    def add(row: Example, label: str, probabilities: Sequence[float]) -> None:
        number, names = next(count), row.fields.names
        write((), [row.fields.cells[names.index("index")] if "index" in names else number, numbers[label]])

    return add


def classify(arguments: argparse.Namespace, rows: Iterator[Example], files: list[TextIO]) -> None:
    """Load the model, and classify and write all rows."""
    device = choose_device(arguments.device, 0)
    bf16 = choose_precision(arguments.precision, device) == "bf16"
    classifier, tokenizer, label_names = load_classifier(arguments.model, device, bf16)
    model = accelerate(classifier, World.alone(device)).model
    writers: list[Writer] = []
    for path, file in zip(output_files(arguments), files):
        if path == arguments.output:
            header = getattr(arguments, "header", True)
            writers.append(RowsWriter(file, path, header, label_names, arguments.all_probabilities))
        else:
            writers.append(write_submission(file, label_names))
    writers = writers or [write_lines(arguments.all_probabilities)]
    with tqdm(unit=" rows", disable=not (files and sys.stderr.isatty()), dynamic_ncols=True) as bar:
        for chunk in in_chunks(rows, ROWS_AT_ONCE):
            pairs = None if chunk[0].pair is None else [row.pair or "" for row in chunk]
            probabilities = predict(
                model, tokenizer([row.text for row in chunk], pairs), arguments.batch_tokens, device
            )
            for row, best, of_row in zip(chunk, probabilities.argmax(1).tolist(), probabilities.tolist()):
                label = label_names[best] if of_row[best] >= arguments.abstain_below else NO_ANSWER
                for write in writers:
                    write(row, label, of_row)
            sys.stdout.flush()
            bar.update(len(chunk))


def discard_output() -> None:
    """Discard what Python still buffers for standard output, so that it exits quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    keep_freed_memory()
    rows = read_input(arguments)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(new_file(path)) for path in output_files(arguments)]
        try:
            classify(arguments, rows, files)
        except BrokenPipeError:  # the reader, `head` say, has ended
            discard_output()
        except OSError as error:
            if files:
                raise
            discard_output()
            raise UserError(f"cannot write to standard output: {error.strerror}") from None


if __name__ == "__main__":
    exit_on_user_error(main)
