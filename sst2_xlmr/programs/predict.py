"""Classify texts with a trained model.

    python scripts/predict.py --model runs/NAME/model "A fine film." "Not my cup of tea."
    python scripts/predict.py --model runs/NAME/model < sentences.txt
    python scripts/predict.py --model runs/NAME/model --input reviews.csv --output answers.csv
    python scripts/predict.py --model runs/NAME/model --input test.tsv --glue-submission submission
    torchrun --nproc_per_node=2 scripts/predict.py --model runs/NAME/model --input reviews.csv --output answers.csv

Prints one line per text, in order: label, tab, its probability, tab, text; or writes all columns of the input, followed
by these, to a file, which gets its name when it is whole. Rows are read, classified and written some at a time, so that
a file may be larger than memory; the input is read through first, so that a bad row shows before any work. Until
answers.csv is whole, its rows are in answers.csv.part-0, where the same command with --resume (instead of --overwrite)
goes on after a kill. Several processes take a share of the rows each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sst2_xlmr.cli import OneLineParser, add_model_options, add_option, number_to
from sst2_xlmr.config import flag
from sst2_xlmr.data.formats import KINDS, Fields, decoded_lines, either, is_table, kind_of
from sst2_xlmr.data.predictions import RowsWriter, Writer, check_columns, line_writer, submission_writer
from sst2_xlmr.data.rows import TEXT_OPTIONS, Example, check_text, columns_given, in_chunks, read_examples
from sst2_xlmr.model.encoders import find_model
from sst2_xlmr.predictor import NO_ANSWER, Answer, Model, answers, load_model
from sst2_xlmr.report.rows_bar import RowsBar
from sst2_xlmr.util import distributed
from sst2_xlmr.util.distributed import World, choose_device
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import Finisher, digest_of, digest_of_input
from sst2_xlmr.util.memory import keep_freed_memory
from sst2_xlmr.util.shards import is_begun, join_parts, open_parts

ROWS_AT_ONCE = 1024
# Options on which the output depends, besides the input and the model.
RECIPE_OPTIONS = (*TEXT_OPTIONS, "batch_tokens", "abstain_below", "all_probabilities")
# Processes wait for one another at the beginning and the end only, however long the rows of one take.
TIMEOUT_MINUTES = 7 * 24 * 60.0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and check whatever it and the file system alone can tell."""
    parser = OneLineParser(
        allow_abbrev=False, description="Classify texts: label and probability for each, in the order of the texts."
    )
    add_model_options(parser)
    parser.add_argument("--input", type=Path, metavar="FILE", help=f"texts: a {either(KINDS)} file, perhaps with .gz")
    for name in TEXT_OPTIONS:
        add_option(parser, name)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"write a {either(KINDS)} file, perhaps with .gz, instead"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same --output was killed")
    parser.add_argument(
        "--abstain-below",
        type=number_to(1, "probability"),
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
    for name in TEXT_OPTIONS:
        if not arguments.input and name in arguments:
            raise UserError(f"{flag(name)} needs --input, whose columns it names")
    if arguments.glue_submission and arguments.abstain_below:
        raise UserError("--glue-submission takes a label for every row; leave out --abstain-below")
    if arguments.glue_submission and not arguments.input:
        raise UserError("--glue-submission needs --input, the test.tsv of SST-2")
    if arguments.overwrite and not output_files(arguments):
        raise UserError("--overwrite needs the --output that it may replace")
    if arguments.glue_submission and arguments.all_probabilities and not arguments.output:
        raise UserError("--glue-submission holds labels only; leave out --all-probabilities, or add --output")
    if arguments.output:
        kind_of(arguments.output)
    if not (arguments.input and output_files(arguments)):
        if arguments.resume:
            raise UserError("--resume needs --input and --output, to know what is done")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("several processes need --input and --output, to divide the rows")
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with output, and --overwrite replaces it; leave one of them out")
    check_output_files(arguments)
    return arguments


def check_output_files(arguments: argparse.Namespace) -> None:
    """Check that the output files can be written, and that nothing is replaced unasked; make the submission's folder.

    Raises:
        UserError: if not.
    """
    paths = output_files(arguments)
    try:
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(f"--output and --glue-submission both write {paths[0]}; give --output another name")
        if arguments.glue_submission:
            arguments.glue_submission.mkdir(parents=True, exist_ok=True)
        for path in paths:
            os.scandir(path.parent).close()  # an OSError if it is no folder
            if not os.access(path.parent, os.W_OK):
                raise UserError(f"cannot write to {path.parent}: no permission; choose another place")
            if path.is_dir():
                raise UserError(f"{path} is a folder; name a file")
            if path.exists() and not arguments.overwrite and not (arguments.resume and is_resumable(paths)):
                raise UserError(f"{path} is there already; choose another name, or --overwrite")
            if is_begun(path) and not (arguments.overwrite or arguments.resume):
                cure = "--resume goes on with them, --overwrite discards them"
                raise UserError(f"rows of an earlier run are in {path}.part-*; {cure}")
    except OSError as error:
        raise UserError(f"cannot write to {error.filename}: {error.strerror}") from None


def is_resumable(paths: list[Path]) -> bool:
    """Whether there is something to continue, or nothing left to do."""
    return is_begun(paths[0]) or all(path.exists() for path in paths)


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
    if sys.stdin is None or sys.stdin.isatty():  # None if it is closed
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
    rows = read_examples(arguments.input, columns_given(arguments))
    return itertools.chain([next(rows)], rows)


class RankChunks(NamedTuple):
    """What this process classifies of a file, or of a stream, whose chunks are not known beforehand.

    Attributes:
        columns: names of the columns of the file's first row.
        rows: of every chunk of the whole file.
        first, last: its chunks, from `first` to before `last`; None for all that come.
        digest: of the file, before it was read.
    """

    columns: Sequence[str] = ()
    rows: Sequence[int] = ()
    first: int = 0
    last: int | None = None
    digest: str = ""


def find_chunks(arguments: argparse.Namespace, world: World) -> RankChunks:
    """Read the input through once, on rank 0, so that a bad row shows before any work; divide its chunks."""

    def read_through() -> tuple[str, list[str], list[int]]:
        digest = digest_of_input(arguments.input)
        columns: list[str] = []
        rows = []
        for chunk in in_chunks(read_input(arguments), ROWS_AT_ONCE):
            columns = columns or chunk[0].fields.names
            rows.append(len(chunk))
            if arguments.output and is_table(arguments.output):
                for row in chunk:
                    check_columns(row, columns, arguments.output)
        return digest, columns, rows

    digest, columns, rows = distributed.broadcast(world, distributed.on_rank0(world, read_through))
    first, last = (len(rows) * rank // world.world_size for rank in (world.rank, world.rank + 1))
    return RankChunks(columns, rows, first, last, digest)


def recipe_of(arguments: argparse.Namespace, digest: str, precision: str, world: World) -> dict[str, Any]:
    """Return what makes the rows of the output; parts of it that were begun with another recipe are not continued."""
    encoder, _ = find_model(arguments.model)
    files = [encoder.weights_file, encoder.tokenizer_file, *sorted(arguments.model.glob("*config.json"))]
    options = {name: str(value) for name, value in vars(arguments).items() if name in RECIPE_OPTIONS}
    digests = {"input": digest, "model": [digest_of(file) for file in files]}
    return {**digests, **options, "precision": precision, "device": world.device.type, "processes": world.world_size}


def answers_to(arguments: argparse.Namespace, model: Model, chunks: Iterator[list[Example]]) -> Iterator[list[Answer]]:
    reads_ahead = arguments.input is not None
    return answers(model, chunks, arguments.batch_tokens, arguments.abstain_below, reads_ahead)


def print_answers(arguments: argparse.Namespace, device: torch.device) -> None:
    """Classify all texts, and write lines on standard output."""
    rows = read_input(arguments)
    model = load_model(arguments.model, device, arguments.precision)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    write = line_writer(sys.stdout, arguments.all_probabilities)
    for block in answers_to(arguments, model, in_chunks(rows, ROWS_AT_ONCE)):
        try:
            for answer in block:
                write(*answer)
            sys.stdout.flush()
        except OSError as error:
            discard_output()
            if isinstance(error, BrokenPipeError):  # the reader, `head` say, has ended
                return
            raise UserError(f"cannot write to standard output: {error.strerror}") from None


class Texts:
    """What a block of answers adds to every output file."""

    def __init__(self, arguments: argparse.Namespace, label_names: list[str], mine: RankChunks, begin: int) -> None:
        """Begin with a chunk of the input.

        Args:
            label_names: the model's classes.
            mine: the input's columns, and the rows of its chunks.
            begin: number of that chunk.
        """
        self._texts: list[io.StringIO] = []
        self._writers: list[Writer] = []
        if arguments.output:
            header = getattr(arguments, "header", True) and begin == 0
            names = label_names if arguments.all_probabilities else []
            self._writers.append(RowsWriter(self._text(), arguments.output, header, names, mine.columns))
        if arguments.glue_submission:
            self._writers.append(submission_writer(self._text(), label_names, sum(mine.rows[:begin])))

    def _text(self) -> io.StringIO:
        self._texts.append(io.StringIO(newline=""))
        return self._texts[-1]

    def of(self, block: list[Answer]) -> list[str]:
        """Return the text of these answers for every output file."""
        for answer in block:
            for write in self._writers:
                write(*answer)
        contents = [text.getvalue() for text in self._texts]
        for text in self._texts:
            text.seek(0)
            text.truncate()
        return contents


def write_answers(arguments: argparse.Namespace, world: World) -> None:
    """Classify all texts, or this process's share of the input, and write the output files."""
    paths = output_files(arguments)
    mine = find_chunks(arguments, world) if arguments.input else RankChunks()
    model = load_model(arguments.model, world.device, arguments.precision)
    if len(set(distributed.gather_objects(world, model.precision))) > 1:
        distributed.raise_on_all("the processes compute in different precisions; name one with --precision")
    recipe = recipe_of(arguments, mine.digest, model.precision, world) if arguments.input else None
    with open_parts(paths, recipe, world.rank, arguments.resume) as parts, Finisher() as finisher:
        begin = mine.first + parts.blocks
        texts = Texts(arguments, model.label_names, mine, begin)
        chunks = itertools.islice(in_chunks(read_input(arguments), ROWS_AT_ONCE), begin, mine.last)
        total, done = sum(mine.rows[mine.first : mine.last]), sum(mine.rows[mine.first : begin])

        def write(block: list[Answer]) -> None:
            parts.append(texts.of(block))

        with contextlib.closing(RowsBar(total, done, quiet=not world.is_main)) as bar:
            for block in answers_to(arguments, model, chunks):
                finisher.wait()  # until the block before has been written
                finisher.submit(functools.partial(write, block))
                bar.advance(len(block))
        finisher.wait()
        parts.note()
        distributed.gather_objects(world, None)  # all parts are there

        def finish() -> None:
            if arguments.input and digest_of_input(arguments.input) != mine.digest:
                raise UserError(f"{arguments.input} changed while it was being read; run it again, with --overwrite")
            join_parts(paths, world.world_size)

        distributed.on_rank0(world, finish)  # before the parts are closed, and so free for other processes


def discard_output() -> None:
    """Discard what Python still buffers for standard output, so that it exits quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    keep_freed_memory()
    if output_files(arguments):
        path = output_files(arguments)[0]
        if arguments.resume and path.exists() and not is_begun(path):
            cure = "--overwrite instead of --resume makes it anew"
            unknown = "whether it is of this input and model is not known"
            print(f"{path} is there and complete, so nothing was done; {unknown}: {cure}", file=sys.stderr)
            return
        with distributed.start(arguments.device, 0, TIMEOUT_MINUTES) as world:
            write_answers(arguments, world)
        return
    print_answers(arguments, choose_device(arguments.device))
