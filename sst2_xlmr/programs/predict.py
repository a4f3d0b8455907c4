"""Classify texts with a trained model: one line each, or a file with all columns of the input and the predictions.

See docs/data.md. The input may be larger than memory, so it is streamed in chunks, three times: to find bad rows, to
classify (each process takes a share), and to write rows with their predictions. Until the output is complete, the
predictions are in a hidden folder beside it; after a kill, the same command with --resume continues from there.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sst2_xlmr import __version__
from sst2_xlmr.config import TEXT_OPTIONS, flag
from sst2_xlmr.data import predictions as output
from sst2_xlmr.data.containers import source_digest
from sst2_xlmr.data.formats import MAX_CHARACTERS, SourceRow, kind_of
from sst2_xlmr.data.rows import Row, check_pairs, check_text, in_chunks, read_options_for, read_rows, texts_of
from sst2_xlmr.data.sniff import find_layout
from sst2_xlmr.model.encoders import find_model, model_folder
from sst2_xlmr.predictor import Classifier
from sst2_xlmr.programs import options
from sst2_xlmr.report.inputs import description
from sst2_xlmr.task import Task, check_options
from sst2_xlmr.util import distributed, shards
from sst2_xlmr.util.device import memory_errors, tune_memory
from sst2_xlmr.util.errors import UserError, raise_on_all, refuse
from sst2_xlmr.util.files import digest_of, write_errors, write_text

ROWS_AT_ONCE = 1024
BYTES_AT_ONCE = 1 << 16  # of standard input
SENTENCE = ["sentence"]  # column name for texts that do not come from a file
# Options that affect the output.
FINGERPRINT_OPTIONS = (*TEXT_OPTIONS, "batch_tokens", "abstain_below", "all_probabilities")
Chunks = Iterator[list[Row]]
Predictions = tuple[list[Row], list[list[Any]]]  # rows, and the new cells of each
# Processes synchronize only at the beginning and the end, so they may wait long.
TIMEOUT_MINUTES = 7 * 24 * 60.0
SECONDS_BETWEEN_LINES = 60.0  # of progress, unless standard error is a terminal


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and check what needs neither input nor model."""
    arguments = options.parse("predict", argv)
    file, glue = arguments.input, arguments.glue_submission
    named = {"--output": arguments.output, "--glue-submission": glue and glue / "SST-2.tsv"}
    outputs = arguments.outputs = {option: path for option, path in named.items() if path}
    paths = arguments.paths = list(outputs.values())
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    to_file = file and outputs
    columns = ", ".join(flag(name) for name in TEXT_OPTIONS if name in arguments)
    labels_only = glue and arguments.all_probabilities and not arguments.output
    refuse(
        (file and arguments.sentences, "--input and sentences: leave one of them out"),
        (columns and not file, f"{columns} needs --input, whose columns it names"),
        (glue and not file, "--glue-submission needs --input, the test.tsv of SST-2"),
        (glue and arguments.abstain_below, "--glue-submission needs a label per row; leave out --abstain-below"),
        (labels_only, "--glue-submission holds labels only; leave out --all-probabilities, or add --output"),
        (arguments.overwrite and not outputs, "--overwrite needs the --output that it may replace"),
        (arguments.resume and not to_file, "--resume needs --input and --output"),
        (not is_alone and not to_file, "several processes need --input and --output, to divide the rows"),
        (len({path.resolve() for path in paths}) < len(paths), f"{' and '.join(outputs)} are the same file"),
    )
    if arguments.output:
        kind_of(arguments.output)
    if glue:
        with write_errors(glue):
            glue.mkdir(parents=True, exist_ok=True)
    is_begun = bool(paths) and shards.has_shards(paths[0])
    arguments.is_complete = arguments.resume and not is_begun and all(path.exists() for path in paths)
    if not arguments.is_complete:
        for option, path in outputs.items():
            options.check_output(option, path, arguments.overwrite)
        if is_begun and not (arguments.resume or arguments.overwrite):
            fix = "continue it with --resume, or discard it with --overwrite"
            raise UserError(f"rows of an earlier run for {paths[0]} already exist in a hidden folder; {fix}")
    return arguments


def read_chunks(arguments: argparse.Namespace) -> Chunks:
    """Return the rows to classify, in chunks: from the file, the sentences, or standard input."""
    if arguments.input:  # its first rows are read now, so that a wrong column raises a UserError here
        chunks = in_chunks(read_rows(arguments.input, read_options_for(arguments), None), ROWS_AT_ONCE)
        return itertools.chain([next(chunks)], chunks)
    if arguments.sentences:
        return iter([[sentence("sentence", *numbered) for numbered in enumerate(arguments.sentences, 1)]])
    if sys.stdin is None or sys.stdin.isatty():  # None if it is closed
        raise UserError("no sentences: give them as arguments, as lines of standard input, or in a file with --input")
    return available_lines(sys.stdin.buffer)


def sentence(where: str, number: int, text: str) -> Row:
    check_text(text, f"{where} {number}")
    return Row(text, None, None, SourceRow(number, SENTENCE, [text]))


def available_lines(stream: Any) -> Chunks:
    """Yield a stream's lines (UTF-8, LF or CRLF) as they become available, without waiting for more."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    count, rest, is_open = 0, "", True
    while is_open:
        block = stream.read1(BYTES_AT_ONCE)
        is_open = bool(block)
        *lines, rest = (rest + decoder.decode(block, final=not is_open)).split("\n")
        if len(rest) > MAX_CHARACTERS:
            where = f"standard input, line {count + len(lines) + 1}"
            raise UserError(f"{where}: longer than {MAX_CHARACTERS:,} characters; give one text per line")
        if rest and not is_open:  # the last line has no line end
            lines.append(rest)
        if lines:
            texts = (line.rstrip("\r") for line in lines)
            yield [sentence("standard input, line", *numbered) for numbered in enumerate(texts, count + 1)]
            count += len(lines)


def read_through(arguments: argparse.Namespace) -> tuple[str, list[int]]:
    """Read the whole input to find bad rows; returns its digest, and the number of rows in each chunk."""
    digest, columns, rows = source_digest(arguments.input), None, []
    for chunk in read_chunks(arguments):
        columns = columns or chunk[0].source.names
        rows.append(len(chunk))
        for row in chunk if arguments.output else ():
            output.check_columns(row, columns, arguments.output)
    return digest, rows


def classify(arguments: argparse.Namespace, classifier: Classifier, chunks: Chunks) -> Iterator[Predictions]:
    """Yield each chunk of rows with its predictions."""
    task = classifier.task
    encoded: Iterator[Any] = ((chunk, classifier.encode(texts_of(chunk))) for chunk in chunks)

    def read_ahead() -> Iterator[Any]:
        with ThreadPoolExecutor(1) as thread:
            pending = thread.submit(next, encoded, None)
            while (item := pending.result()) is not None:
                pending = thread.submit(next, encoded, None)
                yield item

    # A file is read and tokenized ahead while the model computes; a stream may have nothing to read.
    for chunk, (ids, lengths) in read_ahead() if arguments.input else encoded:
        with memory_errors(f"use a smaller --batch-tokens than {arguments.batch_tokens}"):
            rows = classifier.probabilities_of_ids(ids, lengths, arguments.batch_tokens).tolist()
        yield chunk, [task.prediction_cells(row, arguments.all_probabilities, arguments.abstain_below) for row in rows]


def predict_stream(arguments: argparse.Namespace) -> None:
    """Classify texts as they become available; writes lines to standard output, in UTF-8, or to the output files."""
    chunks = read_chunks(arguments)
    classifier = Classifier.load_ensemble(arguments.models, arguments.precision, arguments.device)
    check_options(classifier.task, arguments)
    predicted = classify(arguments, classifier, chunks)
    if arguments.output:
        write_predictions(arguments, classifier.task, predicted)
        return
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    for chunk, predictions in predicted:
        print(output.console_lines(chunk, predictions), end="", flush=True)
    if arguments.input:
        say_layout(arguments)


def write_predictions(arguments: argparse.Namespace, task: Task, predicted: Iterable[Predictions]) -> None:
    """Write the output files atomically."""
    new_columns = task.columns(arguments.all_probabilities)
    numbers = output.glue_label_ids(task.label_names) if arguments.glue_submission else {}
    layout = find_layout(arguments.input, read_options_for(arguments)) if arguments.input else None
    has_names = not layout or layout.header or not layout.delimiter  # without a header in the input, write none
    columns, row = None, 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(output.new_output(path)) for path in arguments.paths]
        for chunk, predictions in predicted:
            columns = columns or chunk[0].source.names
            if arguments.output:
                header = has_names and row == 0
                files[0].write(output.extended_rows(arguments.output, chunk, predictions, new_columns, columns, header))
            if arguments.glue_submission:
                files[-1].write(output.submission_lines(chunk, predictions, numbers, row))
            row += len(chunk)


def say_layout(arguments: argparse.Namespace) -> None:
    """Print to standard error how the input was read, if its format is unusual, and how pandas reads the output."""
    read_options, path = read_options_for(arguments), arguments.output
    if note := description(arguments.input, find_layout(arguments.input, read_options), read_options):
        print(f"read as    {note}", file=sys.stderr)
    if path and kind_of(path) == ".tsv":
        how = f"pandas.read_csv({str(path)!r}, sep='\\t', quoting=3, keep_default_na=False) reads it"
        print(f"written    {path}: tabs, no quotes; {how}", file=sys.stderr)


def with_progress(predicted: Iterable[Predictions], total: int, done: int, quiet: bool) -> Iterator[Predictions]:
    """Yield `predicted`, and show progress from `done` to `total` rows: a bar on a terminal, else a line per minute."""
    started = printed = time.monotonic()
    rows, has_bar = 0, sys.stderr.isatty() and not quiet
    with tqdm(total=total, initial=done, unit=" rows", disable=not has_bar, dynamic_ncols=True) as bar:
        for part in predicted:
            yield part
            rows, now = rows + len(part[0]), time.monotonic()
            bar.update(len(part[0]))
            if not has_bar and not quiet and now - printed > SECONDS_BETWEEN_LINES:
                printed, rate = now, rows / (now - started)
                left = tqdm.format_interval((total - done - rows) / rate)
                print(f"{done + rows:,} of {total:,} rows, {rate:,.0f} rows/s, {left} left", file=sys.stderr)


def predict_file(arguments: argparse.Namespace, world: distributed.World) -> None:
    """Classify this process's share of the input; rank 0 writes the output files."""
    digest, sizes = distributed.broadcast(world, distributed.on_rank0(world, lambda: read_through(arguments)))
    classifier = Classifier.load_ensemble(arguments.models, arguments.precision, world.device)
    if len(set(distributed.gather_objects(world, classifier.precision))) > 1:
        raise_on_all("the processes use different precisions; set --precision")
    first, last = (len(sizes) * rank // world.world_size for rank in (world.rank, world.rank + 1))
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            check_options(classifier.task, arguments)
            if arguments.glue_submission:
                output.glue_label_ids(classifier.label_names)
            files = []
            for model in arguments.models:
                encoder = find_model(model)
                files += [*encoder.weights_files, encoder.tokenizer_file, *sorted(model.glob("*.json"))]
            given = {name: str(value) for name, value in vars(arguments).items() if name in FINGERPRINT_OPTIONS}
            machine = {"precision": classifier.precision, "device": classifier.device.type, "version": __version__}
            # Everything that the output depends on: --resume requires that it has not changed.
            fingerprint = {"input": digest, "model": [digest_of(file) for file in files], **given, **machine}
            return stack.enter_context(shards.open_shards(arguments.paths[0], fingerprint, arguments.resume))

        folder = distributed.broadcast(world, distributed.on_rank0(world, begin))
        start = next((n for n in range(first, last) if not shards.shard_file(folder, n).is_file()), last)
        chunks = itertools.islice(read_chunks(arguments), start, last)
        total, done = sum(sizes[first:last]), sum(sizes[first:start])
        predicted = with_progress(classify(arguments, classifier, chunks), total, done, quiet=world.rank > 0)
        for number, (_, predictions) in enumerate(predicted, start):
            with write_errors(folder):
                write_text(shards.shard_file(folder, number), json.dumps(predictions))
        distributed.gather_objects(world, None, world.slow_group)  # wait until all shards are written

        def all_predictions() -> Iterator[Predictions]:
            for number, chunk in zip(range(len(sizes)), read_chunks(arguments)):
                yield chunk, json.loads(shards.shard_file(folder, number).read_text(encoding="utf-8"))
            if source_digest(arguments.input) != digest:  # before the output gets its name
                raise UserError(f"{arguments.input} changed while it was being read; run it again, with --overwrite")

        def finish() -> None:
            for option, path in arguments.outputs.items():  # another program may have created one meanwhile
                options.check_output(option, path, arguments.overwrite)
            write_predictions(arguments, classifier.task, all_predictions())
            shards.remove_shards(folder)
            say_layout(arguments)

        distributed.on_rank0(world, finish)  # while the folder is still locked


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    tune_memory()
    arguments.models, paths = [model_folder(name) for name in arguments.models], arguments.paths
    fix = f"{'' if arguments.input else '--input FILE '}--text-pair-column NAME"
    check_pairs(arguments.models[0], read_options_for(arguments).pair, fix)
    if not (arguments.input and paths):
        predict_stream(arguments)
    elif arguments.is_complete:
        fix = "if it came from another input or model, rerun with --overwrite instead of --resume"
        print(f"{paths[0]} is already complete, so nothing was done; {fix}", file=sys.stderr)
    else:
        with distributed.init_distributed(arguments.device, 0, TIMEOUT_MINUTES) as world:
            try:
                predict_file(arguments, world)
            except UserError as error:
                # Only this rank knows it, so it reports it.
                error.on_this_rank = world.rank > 0 and not error.on_all_ranks
                raise
