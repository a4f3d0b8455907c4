"""The output of prediction: lines for the console, the input's rows with new columns, a GLUE submission."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from sst2_xlmr.data.containers import import_extra
from sst2_xlmr.data.formats import kind_of, row_text
from sst2_xlmr.data.rows import Row
from sst2_xlmr.labels import listed
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import atomic_file, new_file, write_errors

GLUE_LABEL_IDS = {"negative": 0, "positive": 1, "0": 0, "1": 1, "LABEL_0": 0, "LABEL_1": 1}
Cells = Sequence[Any]  # the new cells of a row; see `SingleLabel.prediction_cells`


def console_lines(rows: Sequence[Row], predictions: Sequence[Cells]) -> str:
    """Return a line per row for people; tabs and line ends in texts become spaces."""
    lines = []
    for row, (label, *probabilities) in zip(rows, predictions):
        cells = [_in_table(label), *(_in_table(value, "{:.4f}") for value in probabilities), *row.texts]
        lines.append(row_text(".tsv", (), cells))
    return "".join(lines)


def _in_table(cell: Any, number: str = "{}") -> Any:
    """Format a new cell for a table: a list is joined by commas, or is JSON if an item contains a comma."""
    if isinstance(cell, float):
        return number.format(cell)
    if not isinstance(cell, list):
        return cell
    items = [str(_in_table(item, number)) for item in cell]
    return json.dumps(cell, ensure_ascii=False) if any("," in item for item in items) else ",".join(items)


def extended_rows(
    path: Path, rows: Sequence[Row], predictions: Sequence[Cells], names: list[str], columns: list[str], header: bool
) -> str:
    """Return the input's rows with new columns, whose `names` get the prefix `predicted_` if the input has them.

    The extension of the output's path selects the format; UserError if that cannot express a row's columns. `columns`
    are those of the input's first row, and so of every row in a table, which begins with them if `header`.
    """
    kind = kind_of(path)
    is_text_table = kind in (".tsv", ".csv")
    lines = [row_text(kind, (), [*columns, *_free_names(names, columns)])] if header and is_text_table else []
    last: list[str] = []
    for row, (label, *probabilities) in zip(rows, predictions):
        here, cells = row.source.names, row.source.cells
        if here is not last:  # rows with the same columns share one list
            check_columns(row, columns, path)
            last, new = here, _free_names(names, here)
        if kind != ".jsonl" and here != columns:
            cells = [cells[here.index(name)] for name in columns]
        added = [label, *(round(value, 6) if isinstance(value, float) else value for value in probabilities)]
        added = list(map(_in_table, added)) if is_text_table else added
        lines.append(row_text(kind, [*here, *new], [*cells, *added]))
    return "".join(lines)


@contextlib.contextmanager
def new_output(path: Path) -> Iterator[TextIO]:
    """Open an output file (see `new_file`); for Parquet, it converts the JSON lines that are written to it."""
    if kind_of(path) != ".parquet":
        with new_file(path) as file:
            yield file
        return
    arrow, parquet = (import_extra(name, path, "Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    with write_errors(path), atomic_file(path) as raw, contextlib.ExitStack() as stack:
        writer: Any = None

        def write(text: str) -> None:
            nonlocal writer
            table = arrow.Table.from_pylist([json.loads(line) for line in text.splitlines()], writer and writer.schema)
            if writer is None:  # a column without any value yet gets the type string
                types = [(f.name, arrow.string() if f.type == arrow.null() else f.type) for f in table.schema]
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
    """Raise UserError if the output's format cannot express a row: other columns in a table, equal names in JSON."""
    names = row.source.names
    if kind_of(path) != ".jsonl":
        if names != columns and sorted(names) != sorted(columns):
            where = f"line {row.source.line} of the input"
            raise UserError(f"{where} has other keys than the first row; let {path} end in .jsonl")
    elif len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two columns are named {twice!r}, which JSON cannot express; let {path} end in .csv or .tsv")


def glue_label_ids(label_names: Sequence[str]) -> dict[str, int]:
    """Return label name -> GLUE's id for SST-2; UserError for other classes."""
    ids = {name: GLUE_LABEL_IDS[name] for name in label_names if name in GLUE_LABEL_IDS}
    if len(label_names) != 2 or set(ids.values()) != {0, 1}:
        raise UserError(f"--glue-submission: the model's classes are {listed(label_names)}, not negative and positive")
    return ids


def submission_lines(rows: Sequence[Row], predictions: Sequence[Cells], ids: dict[str, int], first_row: int) -> str:
    """Return GLUE's lines: column `index`, or else a count from `first_row`, tab, 0 or 1; before row 0, a header."""
    lines = ["index\tprediction\n"] if first_row == 0 else []
    for number, (row, (label, *_)) in enumerate(zip(rows, predictions), first_row):
        names = row.source.names
        index = row.source.cells[names.index("index")] if "index" in names else number
        lines.append(row_text(".tsv", (), [index, ids[label]]))
    return "".join(lines)
