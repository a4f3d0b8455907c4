"""Rows of labelled text: which columns hold them, and what a label means. Errors name the file and the line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sst2_xlmr.config import Config
from sst2_xlmr.data.formats import Fields, is_table, read_fields, shortened
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError

TEXT_OPTIONS = ("text_column", "text_pair_column", "header")
COLUMN_OPTIONS = (*TEXT_OPTIONS, "label_column")
_UNUSABLE = re.compile("[\ud800-\udfff\0]")
_CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Columns:
    """The columns of texts and labels, each given by its name or its number from 1.

    Attributes:
        text: None for `sentence`, or else `text`.
        pair: the second text of a row; None if rows have one.
        header: whether the first line of a .tsv or .csv file names the columns; else numbers do.
    """

    text: str | None = None
    pair: str | None = None
    label: str = "label"
    header: bool = True


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        label: what the task reads from its cell, the class's number for a single label; None if nobody reads it.
        fields: all of its columns, as they are in the file.
    """

    text: str
    pair: str | None
    label: Any
    fields: Fields


def columns_of(config: Config) -> Columns:
    return Columns(config.text_column, config.text_pair_column, config.label_column, config.header)


def columns_given(arguments: argparse.Namespace) -> Columns:
    """Return the columns that a script's options name; an option that is not given, or not there, has its default."""
    given = {name: value for name, value in vars(arguments).items() if name in COLUMN_OPTIONS}
    return columns_of(Config(**given))


def _position(path: Path, fields: Fields, header: bool, option: str, names: list[str]) -> int:
    """Return a column's place in a row; UserError if it is missing or occurs twice."""
    for name in names:
        if fields.names.count(name) > 1:
            raise UserError(f"{path}: two columns are named {name!r}; give {option} a number, from 1")
        if name in fields.names:
            return fields.names.index(name)
    if re.fullmatch("[1-9][0-9]{0,5}", names[0]) and is_table(path) and int(names[0]) <= len(fields.names):
        return int(names[0]) - 1
    headless = ", or say --no-header if the first line is a row already" if is_table(path) and header else ""
    raise UserError(
        f"{path}, line {fields.line}: no column {' or '.join(map(repr, names))} among"
        f" {shortened(', '.join(fields.names))}; name it with {option}{headless}"
    )


def _located(path: Path, header: bool, wanted: dict[str, list[str]]) -> Iterator[tuple[Fields, list[int]]]:
    """Yield a file's rows with the positions of the wanted columns; UserError if one is missing, or all rows are.

    Args:
        wanted: the names to look for, the first of which takes precedence, by the option that says another.
    """
    fields = None
    names: list[str] = []
    for fields in read_fields(path, header):
        if fields.names is not names:
            names = fields.names
            positions = [_position(path, fields, header, *column) for column in wanted.items()]
        yield fields, positions
    if fields is None:
        raise UserError(f"{path} has no rows")


def _text(path: Path, fields: Fields, position: int, may_be_empty: bool) -> str:
    """Return a row's text, checked."""
    text = fields.cells[position]
    if isinstance(text, str) and (may_be_empty or text.strip()) and not _UNUSABLE.search(text):
        return text
    where = f"{path}, line {fields.line}: column {fields.names[position]!r}"
    if isinstance(text, str) and text.strip():  # JSON can say what UTF-8 cannot
        raise UserError(f"{where} has half a character (a lone surrogate) or a NUL; remove it")
    raise UserError(f"{where} holds no text; remove the row or fill it")


def read_rows(path: Path, columns: Columns, task: Task | None) -> Iterator[Row]:
    """Yield a file's rows; UserError, naming file, line and cure, if one is not as described, or there are none.

    Args:
        path: see `formats.read_fields`.
        task: None for prediction, where no label is needed, and a text may be empty.
    """
    wanted = {"--text-column": [columns.text] if columns.text else ["sentence", "text"]}
    if columns.pair:
        wanted["--text-pair-column"] = [columns.pair]
    texts = len(wanted)
    if task:
        wanted["--label-column"] = [columns.label]
    for fields, positions in _located(path, columns.header, wanted):
        text, *pair = [_text(path, fields, position, may_be_empty=task is None) for position in positions[:texts]]
        label = task.read_label(fields.cells[positions[-1]], f"{path}, line {fields.line}") if task else None
        yield Row(text, pair[0] if pair else None, label, fields)


def check_text(text: str, where: str) -> None:
    """Raise UserError if a text, which does not come from a file, is none that the tokenizer can take."""
    if _UNUSABLE.search(text):
        raise UserError(f"{where}: not UTF-8, or with a NUL character; convert it")


def _label_cells(path: Path, columns: Columns) -> Iterator[tuple[int, Any]]:
    """Yield every row's line number and the cell of its label."""
    for fields, (position,) in _located(path, columns.header, {"--label-column": [columns.label]}):
        yield fields.line, fields.cells[position]


def find_label_names(path: Path, columns: Columns) -> list[str]:
    """Return the names of the classes in a training file, in the order of their numbers (see task.py)."""
    return Task.find_label_names(_label_cells(path, columns), path)


def has_labels(path: Path, columns: Columns) -> bool:
    """Whether a file has the label's column with any label but -1, which Hugging Face writes for no label."""
    first = next(read_fields(path, columns.header), None)
    if first is None:
        return False
    try:
        _position(path, first, columns.header, "--label-column", [columns.label])
    except UserError:
        return False
    return any(str(cell) != "-1" for _, cell in _label_cells(path, columns))


def in_chunks(rows: Iterable[Row], count: int) -> Iterator[list[Row]]:
    """Yield lists of `count` rows, or fewer where their texts are long."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text) + len(row.pair or "")
        if len(chunk) == count or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
