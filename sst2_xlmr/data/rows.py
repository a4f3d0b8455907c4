"""Rows of labelled text: which columns hold them, and what a label means. Errors name the file and the line."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from sst2_xlmr.config import MAX_CLASSES, Config
from sst2_xlmr.data.formats import Fields, is_table, read_fields, shortened
from sst2_xlmr.util.errors import UserError

SST2_NAMES = ["negative", "positive"]
TEXT_OPTIONS = ("text_column", "text_pair_column", "header")
COLUMN_OPTIONS = (*TEXT_OPTIONS, "label_column")
_UNUSABLE = re.compile("[\ud800-\udfff\0]")
_INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Columns:
    """The columns of texts and labels, each given by its name or its number from 1.

    Attributes:
        text: None for `sentence`, or else `text`.
        pair: the second text of a row; None if rows have one.
        label: the label.
        header: whether the first line of a .tsv or .csv file names the columns; else numbers do.
    """

    text: str | None = None
    pair: str | None = None
    label: str = "label"
    header: bool = True


class Row(NamedTuple):
    """A labelled row; `label` is the class's number from 0."""

    text: str
    pair: str | None
    label: int


class Example(NamedTuple):
    """A row without its label, and with all of its columns."""

    text: str
    pair: str | None
    fields: Fields


AnyRow = TypeVar("AnyRow", Row, Example)


def columns_of(config: Config) -> Columns:
    """Return a run's columns."""
    return Columns(config.text_column, config.text_pair_column, config.label_column, config.header)


def columns_given(arguments: argparse.Namespace) -> Columns:
    """Return the columns that a script's options name; an option that is not given, or not there, has its default."""
    given = {name: value for name, value in vars(arguments).items() if name in COLUMN_OPTIONS}
    return columns_of(Config(**given))


def listed(names: Sequence[str]) -> str:
    """Return names, separated by commas; of many only the first."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(shortened(name, 40) for name in names[:10]) + more


class _Column(NamedTuple):
    """A column to look for: its name, or several names, the first of which takes precedence."""

    names: tuple[str, ...]
    option: str

    def position(self, path: Path, fields: Fields, header: bool) -> int:
        """Return its place in a row.

        Raises:
            UserError: if it is missing or occurs twice.
        """
        for name in self.names:
            if fields.names.count(name) > 1:
                raise UserError(f"{path}: two columns are named {name!r}; give {self.option} a number, from 1")
            if name in fields.names:
                return fields.names.index(name)
        number = self.names[0]
        if re.fullmatch("[1-9][0-9]{0,5}", number) and is_table(path) and int(number) <= len(fields.names):
            return int(number) - 1
        headless = ", or say --no-header if the first line is a row already" if is_table(path) and header else ""
        raise UserError(
            f"{path}, line {fields.line}: no column {' or '.join(map(repr, self.names))} among"
            f" {shortened(', '.join(fields.names))}; name it with {self.option}{headless}"
        )


def _text_columns(columns: Columns) -> list[_Column]:
    texts = [_Column((columns.text,) if columns.text else ("sentence", "text"), "--text-column")]
    return texts + ([_Column((columns.pair,), "--text-pair-column")] if columns.pair else [])


def _label_column(columns: Columns) -> _Column:
    return _Column((columns.label,), "--label-column")


def _located(path: Path, header: bool, wanted: list[_Column]) -> Iterator[tuple[Fields, list[int]]]:
    """Yield a file's rows with the positions of the wanted columns.

    Raises:
        UserError: if a column is missing, or there are no rows.
    """
    fields = None
    names: list[str] = []
    for fields in read_fields(path, header):
        if fields.names is not names:
            names = fields.names
            positions = [column.position(path, fields, header) for column in wanted]
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


def _label_text(path: Path, line: int, value: object) -> str:
    """Return a label in the form to compare: stripped of spaces, JSON's integer 1 as "1"."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    problem = "is empty" if isinstance(value, str) else "is neither a word nor an integer"
    raise UserError(
        f"{path}, line {line}: label {_quoted(value)} {problem}; write the class's name or number, or name the column"
        " with --label-column"
    )


def _quoted(value: object) -> str:
    return shortened(repr(value) if isinstance(value, str) else json.dumps(value), 40)


def _label_numbers(label_names: list[str]) -> dict[str, int]:
    """Return the class's number for every form that a label may have.

    The number of a class stands for its name only if no name is a number: among the classes 1, 2, 3, 0 is an error.
    """
    numbers = {name: number for number, name in enumerate(label_names)}
    if not any(_INTEGER.fullmatch(name) for name in label_names):
        numbers.update({str(number): number for number in range(len(label_names))})
    return numbers


def read_rows(path: Path, columns: Columns, label_names: list[str]) -> Iterator[Row]:
    """Yield a file's labelled rows; only the current one is held in memory.

    Args:
        path: see `formats.read_fields`.
        label_names: a label is one of these, or, if none of them is an integer itself, its number from 0.

    Raises:
        UserError: naming file, line and cure, if a row is not as described, or there are no rows.
    """
    numbers = _label_numbers(label_names)
    for fields, positions in _located(path, columns.header, [*_text_columns(columns), _label_column(columns)]):
        text = _text(path, fields, positions[0], may_be_empty=False)
        pair = _text(path, fields, positions[1], may_be_empty=False) if columns.pair else None
        cell = fields.cells[positions[-1]]
        label = cell if isinstance(cell, str) and cell in numbers else _label_text(path, fields.line, cell)
        if label not in numbers:
            known = f"one of {listed(label_names)}"
            if len(numbers) > len(label_names):
                known = f"neither {known} nor a number from 0 to {len(label_names) - 1}"
            else:
                known = f"not {known}"
            raise UserError(
                f"{path}, line {fields.line}: label {_quoted(label)} is {known}, the classes of the training file or"
                " of --label-names"
            )
        yield Row(text, pair, numbers[label])


def read_examples(path: Path, columns: Columns) -> Iterator[Example]:
    """Yield a file's rows for prediction: no label is needed, and a text may be empty.

    Raises:
        UserError: as `read_rows` does.
    """
    for fields, texts in _located(path, columns.header, _text_columns(columns)):
        text, *pair = [_text(path, fields, position, may_be_empty=True) for position in texts]
        yield Example(text, pair[0] if pair else None, fields)


def check_text(text: str, where: str) -> None:
    """Check a text that does not come from a file.

    Raises:
        UserError: if the tokenizer cannot take it.
    """
    if _UNUSABLE.search(text):
        raise UserError(f"{where}: not UTF-8, or with a NUL character; convert it")


def find_label_names(path: Path, columns: Columns) -> list[str]:
    """Return the names of the classes in a training file, in the order of their numbers.

    Labels 0 and 1, or negative and positive, are SST-2's; other integers are in numerical, words in alphabetical order.

    Raises:
        UserError: if there are fewer than two or more than `MAX_CLASSES`, or if they are not classes.
    """
    first_lines: dict[str, int] = {}
    for fields, (position,) in _located(path, columns.header, [_label_column(columns)]):
        cell = fields.cells[position]
        if isinstance(cell, str) and cell in first_lines:
            continue
        label = _label_text(path, fields.line, cell)
        if label in first_lines:
            continue
        first_lines[label] = fields.line
        where = f"{path}, line {fields.line}"
        if _FRACTION.fullmatch(label):
            raise UserError(
                f"{where}: label {label!r} is a fraction; a class is an integer or a word. Name another column with"
                " --label-column, or the classes with --label-names"
            )
        if len(first_lines) > MAX_CLASSES:
            raise UserError(
                f"{where}: more than {MAX_CLASSES:,} different labels in column {columns.label!r}; name the column with"
                " the classes with --label-column"
            )
    labels = sorted(first_lines)
    if len(labels) == 1:
        raise UserError(
            f"{path}: all rows have the label {_quoted(labels[0])}; name the column with the classes with"
            " --label-column, or all classes with --label-names"
        )
    if labels in (["0", "1"], SST2_NAMES):
        return list(SST2_NAMES)
    integers = [label for label in labels if _INTEGER.fullmatch(label)]
    if len(integers) == len(labels):
        return sorted(labels, key=int)
    if integers:
        word = next(label for label in labels if label not in integers)
        raise UserError(
            f"{path} has integers and words as labels ({integers[0]!r} in line {first_lines[integers[0]]},"
            f" {_quoted(word)} in line {first_lines[word]}); make them one, or name the classes with --label-names"
        )
    return labels


def has_labels(path: Path, columns: Columns) -> bool:
    """Whether a file has the label's column with any label but -1, which Hugging Face writes for no label."""
    first = next(read_fields(path, columns.header), None)
    if first is None:
        return False
    try:
        _label_column(columns).position(path, first, columns.header)
    except UserError:
        return False
    rows = _located(path, columns.header, [_label_column(columns)])
    return any(str(fields.cells[position]) != "-1" for fields, (position,) in rows)


def in_chunks(rows: Iterable[AnyRow], count: int) -> Iterator[list[AnyRow]]:
    """Yield lists of `count` rows, or fewer where their texts are long."""
    chunk: list[AnyRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text) + len(row.pair or "")
        if len(chunk) == count or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
