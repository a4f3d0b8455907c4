"""Cut rows from a training file for a test that nobody tunes on.

    python scripts/hold_out.py --train-file data/SST-2/train.tsv --rows 5000 --output-dir data/held-out

writes train.tsv and test.tsv into the new folder. SST-2's training rows are sentences and thousands of phrases cut from
them, so rows drawn at random would leave their own words in training. Here whole texts are drawn, and what is part of
them goes with them: a row of the test is never part of a text that is left, nor is any row that is left part of a text
of the test. Rows for which neither can be said, phrases that occur in texts of both sides, are left out of both.

Texts are compared by their words, without regard to upper and lower case. `--train-rows N` keeps N random rows of what
is left, to see what few data do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sst2_xlmr.cli import OneLineParser, add_option, positive
from sst2_xlmr.config import Config
from sst2_xlmr.data.formats import KINDS, Fields, kind_of, row_writer
from sst2_xlmr.data.rows import columns_of, read_examples
from sst2_xlmr.errors import UserError, exit_on_user_error
from sst2_xlmr.files import new_file

COLUMN_OPTIONS = ("text_column", "text_pair_column", "header")
_KEY_WORDS = 3  # by so many first words a text is looked up in another
Words = tuple[str, ...]


def words_of(text: str, pair: str | None) -> Words:
    """Return a row's words; a pair of texts counts as one, with a mark between them."""
    first = tuple(text.casefold().split())
    return first if pair is None else (*first, "\t", *pair.casefold().split())


def find_parts(rows: Sequence[Words]) -> list[set[int]]:
    """Return for every row the rows whose words stand in it, one after another; those with the same words, too."""
    by_key: dict[Words, list[int]] = {}
    for number, words in enumerate(rows):
        by_key.setdefault(words[:_KEY_WORDS], []).append(number)
    parts = []
    for words in rows:
        found = set()
        for start in range(len(words)):
            for length in range(1, _KEY_WORDS + 1):
                for number in by_key.get(words[start : start + length], ()):
                    other = rows[number]
                    if min(len(other), _KEY_WORDS) == length and words[start : start + len(other)] == other:
                        found.add(number)
        parts.append(found)
    return parts


def split_rows(rows: Sequence[Words], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 arrays of row numbers, those that stay and `count` for the test, both in the file's order.

    Raises:
        UserError: if so many cannot be drawn, or none would stay.
    """
    parts = find_parts(rows)
    is_whole = np.ones(len(rows), bool)  # whether no longer row has it as a part
    for number, members in enumerate(parts):
        for other in members:
            if len(rows[other]) < len(rows[number]):
                is_whole[other] = False
    random = np.random.RandomState(seed)
    drawn, left = np.zeros(len(rows), int), np.zeros(len(rows), int)  # in how many whole texts of either side a row is
    whole = np.flatnonzero(is_whole)
    for number in whole:
        left[np.array(sorted(parts[number]), np.int64)] += 1
    exclusive = 0  # rows that are in drawn texts only
    for number in random.permutation(whole):
        found = np.array(sorted(parts[number]), np.int64)
        left[found] -= 1
        drawn[found] += 1
        exclusive += int((left[found] == 0).sum())
        if exclusive >= count:
            break
    test = np.flatnonzero((drawn > 0) & (left == 0))
    stays = np.flatnonzero(drawn == 0)
    if len(test) < count or not len(stays):
        raise UserError(f"--rows {count}: only {len(rows):,} rows are there, and some must stay; hold out fewer")
    return stays, np.sort(random.choice(test, count, replace=False))


def write_rows(file: Path, rows: Iterable[Fields], header: bool) -> None:
    kind = kind_of(file)
    with new_file(file) as opened:
        write = row_writer(opened, kind)
        for number, fields in enumerate(rows):
            if number == 0 and header and KINDS[kind].is_table:
                write(fields.names, fields.names)
            write(fields.names, fields.cells)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Cut rows from a training file for a test.", allow_abbrev=False)
    parser.add_argument("--train-file", required=True, type=Path, metavar="FILE", help="labelled rows")
    parser.add_argument("--rows", required=True, type=positive, metavar="N", help="how many to hold out")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="new folder, with both files")
    parser.add_argument("--train-rows", type=positive, metavar="N", help="keep N random rows of the others [all]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn [0]")
    for name in COLUMN_OPTIONS:
        add_option(parser, name)
    arguments = parser.parse_args(argv)
    given = {name: getattr(arguments, name) for name in COLUMN_OPTIONS if name in arguments}
    columns, kind = columns_of(Config(**given)), kind_of(arguments.train_file)
    if arguments.output_dir.exists():
        raise UserError(f"--output-dir {arguments.output_dir} is there already; choose another name")
    examples = list(read_examples(arguments.train_file, columns))
    stays, test = split_rows([words_of(each.text, each.pair) for each in examples], arguments.rows, arguments.seed)
    left_out = len(examples) - len(stays) - len(test)
    if arguments.train_rows is not None:
        if arguments.train_rows > len(stays):
            raise UserError(f"--train-rows {arguments.train_rows}: {len(stays):,} rows are left to train on")
        random = np.random.RandomState(arguments.seed)
        stays = np.sort(random.choice(stays, arguments.train_rows, replace=False))
    try:
        arguments.output_dir.mkdir(parents=True)
        for name, numbers in (("train", stays), ("test", test)):
            fields = (examples[number].fields for number in numbers)
            write_rows(arguments.output_dir / f"{name}{kind}", fields, columns.header)
    except OSError as error:
        raise UserError(f"cannot write to {arguments.output_dir}: {error.strerror}") from None
    print(
        f"{arguments.output_dir}: {len(stays):,} rows to train on, {len(test):,} for the test, {left_out:,} in neither"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
