"""What prediction writes: lines for the console, the input's rows with new columns, a submission to GLUE."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from sst2_xlmr.data.containers import needed
from sst2_xlmr.data.formats import kind_of, row_writer
from sst2_xlmr.data.rows import Row
from sst2_xlmr.labels import listed
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import atomic_file, new_file, writing

GLUE_LABEL_IDS = {"negative": 0, "positive": 1, "0": 0, "1": 1, "LABEL_0": 0, "LABEL_1": 1}
# A row's new cells: its label, the probability of that, perhaps those of all labels.
Cells = Sequence[Any]


def console_lines(rows: Sequence[Row], predictions: Sequence[Cells]) -> str:
    """Return a line per row for people, where tabs and line ends in a text become spaces."""
    text = io.StringIO(newline="")
    write = row_writer(text, ".tsv")
    for row, (label, *probabilities) in zip(rows, predictions):
        texts = [row.text] if row.pair is None else [row.text, row.pair]
        write((), [_in_table(label), *(_in_table(each, "{:.4f}") for each in probabilities), *texts])
    return text.getvalue()


def _in_table(cell: Any, number: str = "{}") -> Any:
    """Return a new cell as tables have it: of a list, its items between commas, or JSON where a label has one."""
    if isinstance(cell, float):
        return number.format(cell)
    if not isinstance(cell, list):
        return cell
    items = [str(_in_table(each, number)) for each in cell]
    return json.dumps(cell, ensure_ascii=False) if any("," in each for each in items) else ",".join(items)


def extended_rows(
    path: Path,
    rows: Sequence[Row],
    predictions: Sequence[Cells],
    names: Sequence[str],
    columns: list[str],
    header: bool,
) -> str:
    """Return the input's rows with the new columns; those of them that the input has get the prefix `predicted_`.

    Args:
        path: of the output, whose kind its name says; `UserError` if that cannot express a row's columns.
        names: of the new columns.
        columns: of the input's first row, which a table has in all rows.
        header: whether a table's names come first.
    """
    text = io.StringIO(newline="")
    kind = kind_of(path)
    write, is_text_table = row_writer(text, kind), kind in (".tsv", ".csv")
    if header and is_text_table:
        write((), [*columns, *_free_names(names, columns)])
    last: list[str] = []
    for row, (label, *probabilities) in zip(rows, predictions):
        here, cells = row.fields.names, row.fields.cells
        if here is not last:  # rows with the same columns share one list
            check_columns(row, columns, path)
            last, new = here, _free_names(names, here)
        if kind != ".jsonl" and here != columns:
            cells = [cells[here.index(name)] for name in columns]
        added = [label, *(round(each, 6) if isinstance(each, float) else each for each in probabilities)]
        write([*here, *new], [*cells, *(map(_in_table, added) if is_text_table else added)])
    return text.getvalue()


@contextlib.contextmanager
def new_output(path: Path) -> Iterator[TextIO]:
    """Open an output file (see `new_file`); what is written for Parquet is JSON, an object a line."""
    if kind_of(path) != ".parquet":
        with new_file(path) as file:
            yield file
        return
    arrow, parquet = (needed(name, path, "Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    with writing(path), atomic_file(path) as raw, contextlib.ExitStack() as stack:
        writer: Any = None

        def write(text: str) -> None:
            nonlocal writer
            table = arrow.Table.from_pylist([json.loads(line) for line in text.splitlines()], writer and writer.schema)
            if writer is None:  # a column without any value yet is of texts
                types = [
                    (each.name, each.type if each.type != arrow.null() else arrow.string()) for each in table.schema
                ]
                table = table.cast(arrow.schema(types))
                writer = stack.enter_context(parquet.ParquetWriter(raw, table.schema))
            writer.write_table(table)

        yield SimpleNamespace(write=write)  # type: ignore[misc]


def _free_names(new: Sequence[str], taken: Sequence[str]) -> list[str]:
    names = list(new)
    for number in range(len(names)):
        while names[number] in taken:
            names[number] = "predicted_" + names[number]
    return names


def check_columns(row: Row, columns: list[str], path: Path) -> None:
    """Refuse a row that an output cannot express: a table, since it has other columns than the first; or JSON."""
    names = row.fields.names
    if kind_of(path) != ".jsonl":
        if names != columns and sorted(names) != sorted(columns):
            where = f"line {row.fields.line} of the input"
            raise UserError(f"{where} has other keys than the first row; let {path} end in .jsonl")
    elif len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two columns are named {twice!r}, which JSON cannot express; let {path} end in .csv or .tsv")


def glue_label_ids(label_names: Sequence[str]) -> dict[str, int]:
    """Return the GLUE server's number for each of SST-2's classes; `UserError` if the classes are others."""
    numbers = {name: GLUE_LABEL_IDS[name] for name in label_names if name in GLUE_LABEL_IDS}
    if len(label_names) != 2 or set(numbers.values()) != {0, 1}:
        theirs = f"the model's classes are {listed(label_names)}"
        raise UserError(f"--glue-submission: {theirs}, those of SST-2 negative and positive")
    return numbers


def submission_lines(rows: Sequence[Row], predictions: Sequence[Cells], numbers: dict[str, int], first_row: int) -> str:
    """Return lines of the GLUE server's format, index, tab, 0 or 1; its header comes before row 0.

    A row's index is the cell of the input's column of that name, or else its number from 0, `first_row` and so on.
    """
    text = io.StringIO(newline="")
    write = row_writer(text, ".tsv")
    if first_row == 0:
        write((), ["index", "prediction"])
    for number, (row, (label, *_)) in enumerate(zip(rows, predictions), first_row):
        names = row.fields.names
        write((), [row.fields.cells[names.index("index")] if "index" in names else number, numbers[label]])
    return text.getvalue()
