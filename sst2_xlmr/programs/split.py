"""Cut rows from a training file for a test that nobody tunes on.

    sst2-xlmr split --train-file data/SST-2/train.tsv --rows 5000 --output-dir data/held-out

writes train.tsv and test.tsv into the new folder. SST-2's training rows are sentences and thousands of phrases cut from
them, so rows drawn at random would leave their own words in training. Here whole texts are drawn, and what is part of
them goes with them: a row of the test is never part of a text that is left, nor is any row that is left part of a text
of the test. Rows for which neither can be said, phrases that occur in texts of both sides, are left out of both.

Texts are compared by their words, without regard to upper and lower case. `--train-rows N` keeps N random rows of what
is left, to see what few data do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sst2_xlmr.cli import OneLineParser, add_option, number_to, positive
from sst2_xlmr.data.duplicates import text_digests
from sst2_xlmr.data.formats import row_writer
from sst2_xlmr.data.rows import TEXT_OPTIONS, Row, columns_given, read_rows
from sst2_xlmr.data.sniff import Columns, find_layout
from sst2_xlmr.data.splits import cut_off
from sst2_xlmr.labels import label_text
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import new_file
from sst2_xlmr.util.output import say

_KEY_WORDS = 3  # by so many first words a text is looked up in another
Words = tuple[str, ...]


def words_of(text: str, pair: str | None) -> Words:
    """Return a row's words; a pair of texts counts as one, with a mark between them."""
    return (*text.casefold().split(), *([] if pair is None else ["\t", *pair.casefold().split()]))


def find_parts(texts: Sequence[Words]) -> list[np.ndarray]:
    """Return for every text (all are different) the numbers of the texts whose words stand in it, one after another.

    They are int64 arrays, ascending; a text is one of them itself, unless it is empty.
    """
    number_of = {words: number for number, words in enumerate(texts)}
    lengths: dict[Words, set[int]] = {}  # first words -> how many words the texts have that begin so
    for words in texts:
        lengths.setdefault(words[:_KEY_WORDS], set()).add(len(words))
    parts = []
    for words in texts:
        found: set[int] = set()
        for start in range(len(words)):
            for key_length in range(1, _KEY_WORDS + 1):
                for length in lengths.get(words[start : start + key_length], ()):
                    found.add(number_of.get(words[start : start + length], -1))
        parts.append(np.array(sorted(found - {-1}), np.int64))
    return parts


def split_rows(rows: Sequence[Words], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 arrays of row numbers, those that stay and `count` for the test, both in the file's order.

    It is a `UserError` if so many cannot be drawn, or none would stay.
    """
    numbers: dict[Words, int] = {}
    text_of = np.array([numbers.setdefault(words, len(numbers)) for words in rows], np.int64)  # row -> text
    texts = list(numbers)
    parts, copies = find_parts(texts), np.bincount(text_of, minlength=len(texts))
    is_whole = np.ones(len(texts), bool)  # whether no longer text has it as a part
    for number, members in enumerate(parts):
        is_whole[members[members != number]] = False
    random = np.random.RandomState(seed)
    # In how many whole rows of either side a text is.
    drawn, left = np.zeros(len(texts), int), np.zeros(len(texts), int)
    for number in np.flatnonzero(is_whole):
        left[parts[number]] += copies[number]
    exclusive = 0  # rows that are in drawn texts only
    for row in random.permutation(np.flatnonzero(is_whole[text_of])):
        found = parts[text_of[row]]
        left[found] -= 1
        drawn[found] += 1
        exclusive += int(copies[found][left[found] == 0].sum())
        if exclusive >= count:
            break
    test = np.flatnonzero(((drawn > 0) & (left == 0))[text_of])
    stays = np.flatnonzero((drawn == 0)[text_of])
    if len(test) < count or not len(stays):
        raise UserError(f"--rows {count}: only {len(rows):,} rows are there, and some must stay; hold out fewer")
    return stays, np.sort(random.choice(test, count, replace=False))


def seed_number(text: str) -> int:
    """Return a number that NumPy takes for a seed, for argparse's `type`."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 4294967295")
    return int(text)


def draw(rows: Sequence[Row], share: float, seed: int, are_free: np.ndarray) -> np.ndarray:
    """Return the numbers of that share of all rows, of every class alike, among those that are free, bool [rows]."""
    numbers = np.flatnonzero(are_free)
    free = [rows[number] for number in numbers]
    classes: dict[str, int] = {}
    labels = np.array([classes.setdefault(label_text(row.label), len(classes)) for row in free])
    digests = text_digests((row.text for row in free), (row.pair for row in free))
    return numbers[cut_off(digests, labels, share * len(rows) / len(free), seed)]


def read_labelled(path: Path, columns: Columns) -> list[Row]:
    """Return all rows, with the cells of their labels; with none, if there is no such column."""
    rows = list(read_rows(path, columns, None))
    names = rows[0].fields.names
    wanted = columns.label if not columns.label.isdecimal() else names[int(columns.label) - 1]
    return [row._replace(label=dict(zip(row.fields.names, row.fields.cells)).get(wanted)) for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Cut a file of rows in train, dev and test.")
    add, share = parser.add_argument, number_to(0.9, "share")
    add("--train-file", required=True, type=Path, metavar="FILE", help="labelled rows")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="new folder, with the files")
    add("--test-share", type=share, default=0.0, metavar="P", help="of the rows, of each class, for the test [0]")
    add("--dev-share", type=share, default=0.0, metavar="P", help="of the rows, of each class, for dev [0]")
    add("--rows", type=positive, metavar="N", help="instead of --test-share: so many rows for the test")
    what = "no part of a text of the test is left to train on, nor the other way round; needs --rows"
    add("--keep-parts-apart", action="store_true", help=what)
    add("--train-rows", type=positive, metavar="N", help="keep N random rows of the others [all]")
    add("--seed", type=seed_number, default=0, metavar="N", help="of what is drawn [0]")
    for name in (*TEXT_OPTIONS, "label_column"):
        add_option(parser, name)
    arguments = parser.parse_args(argv)
    columns, output_dir, path = columns_given(arguments), arguments.output_dir, arguments.train_file
    if os.path.lexists(output_dir):
        raise UserError(f"--output-dir {output_dir} already exists; choose another directory")
    if not (arguments.rows or arguments.test_share or arguments.dev_share):
        raise UserError("nothing to cut off: give --dev-share, --test-share or --rows")
    if arguments.keep_parts_apart and not arguments.rows:
        raise UserError("--keep-parts-apart needs --rows, how many to hold out for the test")
    layout = find_layout(path, columns)
    examples = read_labelled(path, columns)
    free, splits = np.ones(len(examples), bool), {}
    if arguments.keep_parts_apart:
        words = [words_of(each.text, each.pair) for each in examples]
        stays, splits["test"] = split_rows(words, arguments.rows, arguments.seed)
        free[:] = False
        free[stays] = True
    elif arguments.rows or arguments.test_share:
        if arguments.rows and arguments.rows >= len(examples):
            raise UserError(
                f"--rows {arguments.rows}: only {len(examples):,} rows are there, and some must stay; hold out fewer"
            )
        wanted = arguments.rows / len(examples) if arguments.rows else arguments.test_share
        splits["test"] = draw(examples, wanted, arguments.seed, free)
        free[splits["test"]] = False
    if arguments.dev_share:
        splits["dev"] = draw(examples, arguments.dev_share, arguments.seed, free)
        free[splits["dev"]] = False
    splits["train"] = np.flatnonzero(free)
    left_out = len(examples) - sum(map(len, splits.values()))
    if arguments.train_rows is not None:
        if arguments.train_rows > len(splits["train"]):
            raise UserError(f"--train-rows {arguments.train_rows}: {len(splits['train']):,} rows are left to train on")
        random = np.random.RandomState(arguments.seed)
        splits["train"] = np.sort(random.choice(splits["train"], arguments.train_rows, replace=False))
    # A kind that holds any cell, unless it is GLUE's.
    kind = ".jsonl" if not layout.is_table else ".tsv" if (layout.format, layout.quoting) == ("tsv", "none") else ".csv"
    try:
        output_dir.mkdir(parents=True)
        for name, numbers in splits.items():
            with new_file(output_dir / f"{name}{kind}{'.gz' if path.suffix == '.gz' else ''}") as file:
                write, rows = row_writer(file, kind), [examples[number].fields for number in numbers]
                if kind != ".jsonl" and (layout.header or not layout.delimiter):
                    write(rows[0].names, rows[0].names)
                for fields in rows:
                    write(fields.names, fields.cells)
    except OSError as error:
        raise UserError(f"cannot write to {output_dir}: {error.strerror}") from None
    of_dev = f"{len(splits['dev']):,} for dev, " if "dev" in splits else ""
    of_test = f"{len(splits.get('test', ())):,} for the test"
    say(f"{output_dir}: {len(splits['train']):,} rows to train on, {of_dev}{of_test}, {left_out:,} in neither")
