"""What prediction writes: lines on the console, the input's rows with new columns, GLUE's submission."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, TextIO

from sst2_xlmr.data.formats import is_table, kind_of, row_writer
from sst2_xlmr.data.rows import Example, listed
from sst2_xlmr.util.distributed import raise_on_all
from sst2_xlmr.util.errors import UserError

GLUE_NUMBERS = {"negative": 0, "positive": 1, "0": 0, "1": 1, "LABEL_0": 0, "LABEL_1": 1}
# Takes a row, its label, and the probabilities of all classes.
Writer = Callable[[Example, str, Sequence[float]], object]


def line_writer(file: TextIO, all_probabilities: bool) -> Writer:
    """Return a writer of lines for people, where tabs and line ends in a text become spaces."""
    write = row_writer(file, ".tsv")

    def add(row: Example, label: str, probabilities: Sequence[float]) -> None:
        shown = [max(probabilities), *(probabilities if all_probabilities else ())]
        texts = [row.text] if row.pair is None else [row.text, row.pair]
        write((), [label, *(f"{probability:.4f}" for probability in shown), *texts])

    return add


class RowsWriter:
    """Writes the input's rows with `label`, `probability` and, if wanted, `probability_CLASS`.

    If the input already has such a column, the new one's name gets the prefix `predicted_`.

    Args:
        file: what to write to.
        path: the name that it will have, which says what kind of file it is.
        header: whether to write a table's names before the first row.
        label_names: the classes whose probabilities to write, too; none for that of the label alone.
        first: names of the columns of the input's first row, which a table has, once they are known.
    """

    def __init__(
        self, file: TextIO, path: Path, header: bool, label_names: Sequence[str] = (), first: Sequence[str] = ()
    ) -> None:
        self.path, self.is_table, self.label_names = path, is_table(path), label_names
        self.write = row_writer(file, kind_of(path))
        self.needs_header = header and self.is_table
        self.first = list(first)
        self.last: list[str] = []  # and of the last one's
        self.new: list[str] = []

    def __call__(self, row: Example, label: str, probabilities: Sequence[float]) -> None:
        names, cells = row.fields.names, row.fields.cells
        if names is not self.last:
            self._name_columns(row)
        if self.is_table and names != self.first:
            cells = [cells[names.index(name)] for name in self.first]
        shown = [max(probabilities), *(probabilities if self.label_names else ())]
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
        if self.is_table:
            check_columns(row, self.first, self.path)
        self.new = ["label", "probability"]
        self.new += [f"probability_{name}" for name in self.label_names]
        for number, name in enumerate(self.new):
            while name in names:
                name = "predicted_" + name
            self.new[number] = name
        if self.needs_header:
            self.write((), [*names, *self.new])
            self.needs_header = False


def check_columns(row: Example, columns: list[str], path: Path) -> None:
    """Refuse a row that a table cannot hold, since it has other columns than the first."""
    if row.fields.names != columns and sorted(row.fields.names) != sorted(columns):
        raise UserError(
            f"line {row.fields.line} of the input has other keys than the first row; let {path} end in .jsonl"
        )


def submission_writer(file: TextIO, label_names: list[str], first_row: int = 0) -> Writer:
    """Return a writer of the GLUE server's format: index, tab, 0 or 1.

    Args:
        first_row: number from 0 of the first row that it will be given; before row 0 it writes the header.

    Raises:
        UserError: on every rank, if the classes are not SST-2's.
    """
    numbers = {name: GLUE_NUMBERS.get(name) for name in label_names}
    if len(numbers) != 2 or set(numbers.values()) != {0, 1}:
        raise_on_all(
            f"--glue-submission: the model's classes are {listed(label_names)}, those of SST-2 negative and positive"
        )
    write = row_writer(file, ".tsv")
    if first_row == 0:
        write((), ["index", "prediction"])
    count = itertools.count(first_row)

    def add(row: Example, label: str, probabilities: Sequence[float]) -> None:
        number, names = next(count), row.fields.names
        write((), [row.fields.cells[names.index("index")] if "index" in names else number, numbers[label]])

    return add
