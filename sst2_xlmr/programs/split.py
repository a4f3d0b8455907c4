"""Split a file of rows into train.tsv, test.tsv and, with --dev-share, dev.tsv, in a new folder.

SST-2's training rows are sentences and phrases cut from them, so parts of a row drawn at random would remain in
training. With --keep-parts-apart, no test text is part of a training text or contains one; phrases that occur in texts
of both sides are left out of both. Texts are compared by their words, case-insensitively.
"""

from collections.abc import Sequence

import numpy as np

from sst2_xlmr.data.formats import row_text
from sst2_xlmr.data.rows import Row, label_name, read_options_for, read_rows
from sst2_xlmr.data.sniff import find_layout
from sst2_xlmr.data.splits import stratified_sample
from sst2_xlmr.data.token_cache import text_digests
from sst2_xlmr.labels import label_text
from sst2_xlmr.programs import options
from sst2_xlmr.util.errors import UserError, refuse, say
from sst2_xlmr.util.files import new_file, write_errors

_KEY_WORDS = 3  # number of first words by which a text is looked up in others
Words = tuple[str, ...]


def find_parts(texts: Sequence[Words]) -> list[np.ndarray]:
    """Return for each text the numbers of the texts whose words occur in it consecutively, int64, ascending.

    The texts are distinct; unless a text is empty, it is among its own parts.
    """
    number_of = {words: number for number, words in enumerate(texts)}
    lengths: dict[Words, set[int]] = {}  # first words -> lengths, in words, of the texts that start with them
    for words in texts:
        lengths.setdefault(words[:_KEY_WORDS], set()).add(len(words))
    parts = []
    for words in texts:
        numbers: set[int] = set()
        for start in range(len(words)):
            for key_length in range(1, _KEY_WORDS + 1):
                for length in lengths.get(words[start : start + key_length], ()):
                    numbers.add(number_of.get(words[start : start + length], -1))
        parts.append(np.array(sorted(numbers - {-1}), np.int64))
    return parts


def split_rows(rows: Sequence[Words], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers for training, and `count` for the test, int64, in the file's order.

    UserError if so many cannot be drawn, or none would remain for training.
    """
    numbers: dict[Words, int] = {}
    text_of = np.array([numbers.setdefault(words, len(numbers)) for words in rows], np.int64)  # row -> text
    texts = list(numbers)
    parts, copies = find_parts(texts), np.bincount(text_of, minlength=len(texts))
    is_whole = np.ones(len(texts), bool)  # whether it is part of no other text
    for number, members in enumerate(parts):
        is_whole[members[members != number]] = False
    random = np.random.RandomState(seed)
    # For each text, the number of whole rows that contain it: drawn for the test, and left to train on.
    drawn, left = np.zeros(len(texts), int), np.zeros(len(texts), int)
    for number in np.flatnonzero(is_whole):
        left[parts[number]] += copies[number]
    exclusive = 0  # rows that only drawn texts contain
    for row in random.permutation(np.flatnonzero(is_whole[text_of])):
        members = parts[text_of[row]]
        left[members] -= 1
        drawn[members] += 1
        exclusive += int(copies[members][left[members] == 0].sum())
        if exclusive >= count:
            break
    test = np.flatnonzero(((drawn > 0) & (left == 0))[text_of])
    train = np.flatnonzero((drawn == 0)[text_of])
    check_count(count, len(rows), len(test) if len(train) else 0)
    return train, np.sort(random.choice(test, count, replace=False))


def check_count(count: int, rows: int, most: int) -> None:
    if count > most:
        raise UserError(f"--rows {count} is too many: there are {rows:,} rows, and some must remain; hold out fewer")


def draw(rows: Sequence[Row], label_column: str | None, share: float, seed: int, are_free: np.ndarray) -> np.ndarray:
    """Draw a share of all rows, stratified by class, among those that are free, bool [rows]; returns their numbers."""
    numbers = np.flatnonzero(are_free)
    if not len(numbers):
        return numbers
    free = [rows[number] for number in numbers]
    classes: dict[str, int] = {}
    cells = [dict(zip(row.source.names, row.source.cells)).get(label_column) for row in free]  # None: no such column
    labels = np.array([classes.setdefault(label_text(cell), len(classes)) for cell in cells])
    digests = text_digests((row.text for row in free), (row.pair for row in free))
    return numbers[stratified_sample(digests, labels, share * len(rows) / len(free), seed)]


def main(argv: list[str] | None = None) -> None:
    arguments = options.parse("split", argv)
    count, seed, output_dir, path = arguments.rows, arguments.seed, arguments.output_dir, arguments.train_file
    shares, parts_apart = {"test": arguments.test_share, "dev": arguments.dev_share}, arguments.keep_parts_apart
    refuse(
        (count and arguments.test_share, "--rows and --test-share both define the test rows; leave one out"),
        (not count and not any(shares.values()), "nothing to split off: give --dev-share, --test-share or --rows"),
        (parts_apart and not count, "--keep-parts-apart needs --rows, how many to hold out for the test"),
        (sum(shares.values()) >= 1, "--test-share and --dev-share must add up to less than 1"),
        (not 0 <= seed < 2**32, f"--seed {seed} is not a number from 0 to {2**32 - 1}"),
    )
    options.check_output("--output-dir", output_dir, makes_parents=True)
    read_options = read_options_for(arguments)
    layout, rows = find_layout(path, read_options), list(read_rows(path, read_options, None))
    label = label_name(path, read_options, is_required="label_column" in arguments)
    if label is None:
        say("note       no label column: the rows are drawn at random, not by class; name it with --label-column")
    are_free, splits = np.ones(len(rows), bool), {}
    if parts_apart:
        firsts = [tuple(row.text.casefold().split()) for row in rows]
        seconds = [() if row.pair is None else ("\t", *row.pair.casefold().split()) for row in rows]
        words = [(*first, *second) for first, second in zip(firsts, seconds)]
        train, splits["test"] = split_rows(words, count, seed)
        are_free[:], shares["test"] = False, 0.0
        are_free[train] = True
    elif count:
        check_count(count, len(rows), len(rows) - 1)
        shares["test"] = count / len(rows)
    for name, share in shares.items():
        if share:
            splits[name] = draw(rows, label, share, seed, are_free)
            are_free[splits[name]] = False
    splits["train"] = np.flatnonzero(are_free)
    left_out = len(rows) - sum(map(len, splits.values()))
    if arguments.train_rows is not None:
        if arguments.train_rows > len(splits["train"]):
            raise UserError(f"--train-rows {arguments.train_rows}: {len(splits['train']):,} rows are left to train on")
        drawn = np.random.RandomState(seed).choice(splits["train"], arguments.train_rows, replace=False)
        splits["train"] = np.sort(drawn)
    if empty := [name for name, numbers in splits.items() if not len(numbers)]:
        raise UserError(f"{path} has {len(rows):,} rows, which leaves none for {empty[0]}; split off fewer or more")
    # A kind that holds any cell, unless it is GLUE's.
    kind = ".jsonl" if not layout.names else ".tsv" if (layout.format, layout.quoting) == ("tsv", "none") else ".csv"
    with write_errors(output_dir):
        output_dir.mkdir()
        for name, numbers in splits.items():
            chosen = [rows[number].source for number in numbers]
            with new_file(output_dir / f"{name}{kind}{'.gz' if path.suffix.lower() == '.gz' else ''}") as file:
                if kind != ".jsonl" and (layout.header or not layout.delimiter):
                    file.write(row_text(kind, (), chosen[0].names))
                for source in chosen:
                    file.write(row_text(kind, source.names, source.cells))
    counts = ", ".join(f"{len(splits[name]):,} {name} rows" for name in ("train", "dev", "test") if name in splits)
    say(f"{output_dir}: {counts}, {left_out:,} in no split")
