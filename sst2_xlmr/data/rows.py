"""Rows of labelled text: which columns hold them, and which rows can be used. Errors name the file and the line."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sst2_xlmr.config import FORMATS, Config
from sst2_xlmr.data.formats import Fields, Layout, opened, read_fields, shortened
from sst2_xlmr.data.sniff import Columns, find_layout, other_encoding
from sst2_xlmr.labels import MISSING, label_text, listed
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_json

READ_OPTIONS = ("format", "delimiter", "quoting", "encoding", "header")
TEXT_OPTIONS = ("text_column", "text_pair_column", *READ_OPTIONS)
COLUMN_OPTIONS = (*TEXT_OPTIONS, "label_column", "label_columns", "weight_column", "drop_unusable")
# Why a row cannot be used.
COLUMNS, CHARACTERS, NO_TEXT, NO_LABEL = "another number of columns", "cut characters", "no text", "no label"
WEIGHT_0 = "weight 0"  # which is asked for
PHRASES = {
    COLUMNS: f"with {COLUMNS}",
    CHARACTERS: f"with {CHARACTERS}",
    NO_TEXT: "without text",
    NO_LABEL: "without a label",
    WEIGHT_0: "with weight 0",
}
_UNUSABLE = re.compile("[\ud800-\udfff\0]")
_CHUNK_CHARACTERS = 1 << 20
_MOST_LABELS = 20_000  # that are counted; classes are far fewer


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        label: what the task reads from its cell, the class's number for a single label; None if nobody reads it.
        fields: all of its columns, as they are in the file.
        weight: in the loss.
    """

    text: str
    pair: str | None
    label: Any
    fields: Fields
    weight: float = 1.0


def columns_of(config: Config, split: str = "") -> Columns:
    """Return what the options ask for of a split's file."""
    columns = columns_given(argparse.Namespace(**dataclasses.asdict(config)), split)
    return columns if split == "train" else dataclasses.replace(columns, weight=None)


def columns_given(arguments: argparse.Namespace, split: str = "") -> Columns:
    """Return the columns that a script's options name; an option that is not given, or not there, has its default."""
    given = {name: value for name, value in vars(arguments).items() if name in COLUMN_OPTIONS}
    if given.get("format") not in FORMATS:  # that of an export
        given.pop("format", None)
    text = tuple(given.pop("text_column", None) or ())
    pair, labels = given.pop("text_pair_column", None), tuple(given.pop("label_columns", None) or ())
    label, weight = given.pop("label_column", "label"), given.pop("weight_column", None)
    columns = Columns(text or None, pair, label, labels, weight, **given)
    for each in getattr(arguments, "columns", ()):
        name, _, wanted = each.partition(":")
        if name == split:
            changes: dict[str, Any] = dict(part.split("=", 1) for part in wanted.split(","))
            if "text" in changes:
                changes["text"] = tuple(changes["text"].split("+"))
            columns = dataclasses.replace(columns, **changes)
    return columns


def check_pairs(model: Path, pair: str | None, cure: str) -> None:
    """Raise UserError if a model that was trained on pairs is asked with single texts, or the other way round."""
    file = model / "config.json"
    stated = read_json(file, "a model's folder is needed").get("text_pairs") if file.is_file() else None
    if stated is not None and stated != (pair is not None):
        trained, here = ("pairs of texts", "name the second column, too") if stated else ("single texts", "leave out")
        raise UserError(f"{model} was trained on {trained}; {here}: {cure}")


class Places(NamedTuple):
    """Where a row's texts, labels and weight stand; what nobody asks for is None, or empty."""

    texts: tuple[int, ...]
    pair: int | None
    labels: tuple[int, ...]
    weight: int | None

    def label_cell(self, names: Sequence[str], cells: Sequence[Any], class_names: Sequence[str]) -> Any:
        """Return a row's label: of several columns an object, and a file's own names for its numbers."""
        if len(self.labels) > 1:
            return {names[place]: cells[place] for place in self.labels}
        label = cells[self.labels[0]] if self.labels else None
        if not class_names:
            return label
        if isinstance(label, list) and len(label) > 1:
            return [class_names[each] for each in label]
        number = label_text(label)
        return class_names[int(number)] if number.isdecimal() and int(number) < len(class_names) else label


def _position(path: Path, names: Sequence[str], layout: Layout, option: str, wanted: Sequence[str], line: int) -> int:
    """Return a column's place in a row; UserError if it is missing or occurs twice."""
    if layout.is_table and re.fullmatch("[0-9]{1,6}", wanted[0]):
        if 1 <= int(wanted[0]) <= len(names):
            return int(wanted[0]) - 1
        raise UserError(f"{path} has {len(names)} columns, from 1 to {len(names)}: there is no {option} {wanted[0]}")
    for name in wanted:
        found = [place for place, each in enumerate(names) if each == name]
        found = found or [place for place, each in enumerate(names) if each.lower() == name.lower()]
        if len(found) > 1:
            raise UserError(f"{path}: two columns are named {name!r}; give {option} a number, from 1")
        if found:
            return found[0]
    among = (
        shortened(", ".join(map(str, names)))
        if layout.header or not layout.is_table
        else f"1 to {len(names)}, it has no header"
    )
    raise UserError(
        f"{path}, line {line}: no column {' or '.join(map(repr, wanted))} among {among}; name it with"
        f" {option}{_proposal(path, layout)}"
    )


def _places(path: Path, layout: Layout, columns: Columns, fields: Fields, with_label: bool) -> Places:
    """Return the places of a row's columns; UserError if one is missing, or two are the same."""
    names, line = fields.names, fields.line
    texts, label = columns.texts or ("sentence", "text"), columns.label
    if found := guessed_columns(path, layout, columns):
        texts, label = (names[found[0]],), names[found[1]] if label == "label" and found[1] is not None else label
    if columns.texts:
        chosen = [_position(path, names, layout, "--text-column", [name], line) for name in texts]
    else:
        chosen = [_position(path, names, layout, "--text-column", texts, line)]
    pair = _position(path, names, layout, "--text-pair-column", [columns.pair], line) if columns.pair else None
    option = "--label-columns" if columns.labels else "--label-column"
    wanted = columns.labels or (label,) if with_label else ()
    labels = tuple(_position(path, names, layout, option, [name], line) for name in wanted)
    weight = None
    if columns.weight and with_label:
        weight = _position(path, names, layout, "--weight-column", [columns.weight], line)
    all_of = [each for each in (*chosen, pair, *labels, weight) if each is not None]
    if len(set(all_of)) < len(all_of):
        twice = next(names[each] for each in all_of if all_of.count(each) > 1)
        raise UserError(
            f"{path}: the column {twice!r} is named twice; text, second text and label are columns of their own"
        )
    return Places(tuple(chosen), pair, labels, weight)


def guessed_columns(path: Path, layout: Layout, columns: Columns) -> tuple[int, int | None] | None:
    """Return the columns of text and label where no header names them and the options do not; see `_likely_columns`."""
    is_open = layout.is_table and not (layout.header or columns.texts or "text" in layout.names)
    return _likely_columns(_first_columns(path, layout)) if is_open else None


def _first_columns(path: Path, layout: Layout) -> list[list[str]]:
    """Return a table's columns, without the spaces around their cells; of its first rows."""
    rows = [each.cells for each in itertools.islice(read_fields(path, layout), 500)]
    rows = [cells for cells in rows if len(cells) == len(layout.names)]
    return [[str(cells[i]).strip() for cells in rows] for i in range(len(layout.names))]


def _likely_columns(cells: list[list[str]]) -> tuple[int, int | None] | None:
    """Return the columns that must hold text and label, if by their cells only one each can."""
    texts = [i for i, each in enumerate(cells) if sum(" " in cell for cell in each) > len(each) / 2]
    labels = [
        i
        for i, each in enumerate(cells)
        if i not in texts and all(each) and 1 < len(set(each)) <= max(2, len(each) / 2)
    ]
    return (texts[0], labels[0] if len(labels) == 1 else None) if len(texts) == 1 else None


def _proposal(path: Path, layout: Layout) -> str:
    """Return the options that name a table's text and label, for an error; empty if that cannot be told."""
    if not layout.is_table:
        return ""
    cells = _first_columns(path, layout)
    flags = [name for name, each in zip(layout.names, cells) if each and set(each) <= {"0", "1"}]
    if len(flags) > 2:
        return f"; {listed(flags)} hold 0 and 1: for several labels a row, name them with --label-columns"
    if not (found := _likely_columns(cells)):
        return ""
    text, label = (
        repr(layout.names[i]) if i is not None and " " in layout.names[i] else layout.names[i or 0] for i in found
    )
    return f" (e.g. --text-column {text}{f' --label-column {label}' if found[1] is not None else ''})"


Checked = tuple[Fields, str, str, "str | None", Any, float]


def _checked(path: Path, layout: Layout, columns: Columns, with_label: bool, may_be_empty: bool) -> Iterator[Checked]:
    """Yield every row: its fields, why it cannot be used (empty if it can), texts, the label's cell, weight."""
    names: list[str] | None = None
    seen = first = None
    for fields in read_fields(path, layout):
        cells = fields.cells
        if fields.names is not names:
            first = first or fields
            names = fields.names
            try:
                places = seen = _places(path, layout, columns, fields, with_label)
            except UserError as error:  # a JSON object may leave out what it has not
                if layout.is_table or (fields is first and not _has_keys(path, layout, columns, with_label)):
                    raise
                names = None
                kind = NO_LABEL if "--label-column" in str(error) else NO_TEXT
                yield fields, kind, "", None, None, 1.0
                continue
            named = () if columns.keep_numbers or not places.labels else names[places.labels[0]]
            class_names = layout.class_names.get(named, ()) if named else ()
        if len(cells) != len(names):
            yield fields, COLUMNS, "", None, None, 1.0
            continue
        text = cells[places.texts[0]] if len(places.texts) == 1 else _joined(cells, places.texts)
        pair = None if places.pair is None else cells[places.pair]
        label = places.label_cell(names, cells, class_names)
        weight = 1.0 if places.weight is None else _weight(cells[places.weight], f"{path}, line {fields.line}")
        is_plain = places.pair is None and type(text) is str and text.isascii() and text.strip() and "\0" not in text
        problem = "" if is_plain else _problem(text, pair, places.pair is not None, may_be_empty)
        yield fields, problem if weight else WEIGHT_0, text, pair, label, weight
    if seen is None:
        raise UserError(f"{path} has no rows")


def _has_keys(path: Path, layout: Layout, columns: Columns, with_label: bool) -> bool:
    """Whether some row of a JSON file, whose first one has not, has all columns."""
    for fields in read_fields(path, layout):
        try:
            _places(path, layout, columns, fields, with_label)
        except UserError:
            continue
        return True
    return False


def _weight(cell: Any, where: str) -> float:
    try:
        weight = float(cell)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{where}: the weight {label_text(cell)!r} is no number of 0 or more; mend it")
    return weight


def _joined(cells: Sequence[Any], places: Sequence[int]) -> Any:
    texts = [cells[place] for place in places]
    return " ".join(filter(None, texts)) if all(isinstance(text, str) for text in texts) else None


def _problem(text: Any, pair: Any, is_pair: bool, may_be_empty: bool) -> str:
    for each in (text, pair) if is_pair else (text,):
        if not isinstance(each, str) or not (may_be_empty or each.strip()):
            return NO_TEXT
        if (not each.isascii() or "\0" in each) and _UNUSABLE.search(each):
            return CHARACTERS
    return ""


def read_rows(path: Path, columns: Columns, task: Task | None) -> Iterator[Row]:
    """Yield a file's usable rows; UserError, naming file, line and cure, if others are no row, or there are none.

    Args:
        columns: see `sniff.Columns`; with `drop_unusable`, rows that cannot be used are left out.
        task: None for prediction, where no label is needed, and a text may be empty.
    """
    layout = find_layout(path, columns)
    numbers: dict[str, Any] = {}  # of the labels that were seen
    may_be_empty = task is None or columns.may_be_empty
    for fields, problem, text, pair, cell, weight in _checked(path, layout, columns, task is not None, may_be_empty):
        label = None
        if task and not problem:
            key = cell if isinstance(cell, str) else label_text(cell)
            if key in numbers:
                label = numbers[key]
            else:
                label = task.read_label(cell, f"{path}, line {fields.line}")
                if len(numbers) < _MOST_LABELS:
                    numbers[key] = label
            problem = NO_LABEL if label is None else ""
        if not problem:
            yield Row(text, pair, label, fields, weight)
        elif not columns.drop_unusable and problem != WEIGHT_0:
            Inspection(layout, 0, {problem: (1, fields.line, "")}, {}).check_encoding(path)
            problems = {problem: (1, fields.line, _detail(problem, fields, cell))}
            raise unusable_error(path, problems, None if task is None else 0)


def _detail(problem: str, fields: Fields, cell: Any) -> str:
    if problem == COLUMNS:
        return f"{len(fields.cells)}, not {len(fields.names)}"
    return repr(shortened(label_text(cell), 40)) if problem == NO_LABEL else ""


Problems = dict[str, tuple[int, int, str]]


def unusable_error(path: Path, problems: Problems, rows: int | None) -> UserError:
    """Return the error that counts the rows which cannot be used, and names the first of each kind.

    Args:
        problems: kind -> how many, line of the first, what stands there.
        rows: how many the file has (0 if unknown); None where none may be left out.
    """
    total = sum(count for count, *_ in problems.values())
    kinds = [
        f"{count:,} {PHRASES[kind]} (line {line}{': ' * bool(detail)}{detail})"
        for kind, (count, line, detail) in problems.items()
    ]
    of_all = f" of {rows:,}" if rows else ""
    cure = "mend them" if rows is None else "mend them, or leave them out with --drop-unusable"
    if NO_LABEL in problems and problems[NO_LABEL][2] not in ("''", ""):
        cure += "; if that is a class, list all with --label-names=A,B,..."
    elif CHARACTERS in problems:
        cure += "; half a character stands there; a file that is not UTF-8 needs, e.g., --encoding cp1252"
    first = f"{path}, line {min(line for _, line, _ in problems.values())}"
    return UserError(
        f"{first}: {total:,}{of_all} row{'s' * (max(total, rows or 0) > 1)} cannot be used: {', '.join(kinds)}; {cure}"
    )


@dataclass(frozen=True)
class Inspection:
    """What a file holds, found by reading all of it.

    Attributes:
        rows: all of them, usable or not.
        problems: rows that cannot be used, but for those without a label.
        labels: how many of the others have each label (see `label_text`), and the line of the first.
        digest: SHA-256 of what was read.
    """

    layout: Layout
    rows: int
    problems: Problems
    labels: dict[str, tuple[int, int]]
    digest: str = ""

    def check(self, path: Path, task: Task | None, drop: bool, names: Sequence[str] = ()) -> dict[str, int]:
        """Return how many rows are left out, by kind; UserError if there are any and none may, or for other labels.

        Args:
            task: None where it is to be found yet; `names` are those of its classes that are known already.
        """
        self.check_encoding(path)
        found = self.labels
        numbers = {each: task.number_of(each) if task else -(each in MISSING and each not in names) for each in found}
        if unknown := [label for label, number in numbers.items() if number == -2]:
            count, line = sum(found[label][0] for label in unknown), found[unknown[0]][1]
            raise UserError(f"{path}, line {line}: {task and task.unknown(unknown)} ({count:,} row{'s' * (count > 1)})")
        problems = dict(self.problems)
        if missing := [label for label, number in numbers.items() if number == -1]:
            count, line = sum(found[label][0] for label in missing), found[missing[0]][1]
            problems[NO_LABEL] = (count + problems.get(NO_LABEL, (0,))[0], line, repr(missing[0]))
        left_out = {kind: count for kind, (count, *_) in problems.items()}
        asked_for = problems.pop(WEIGHT_0, (0, 0, ""))
        if sum(left_out.values()) == self.rows or (problems and not drop):
            raise unusable_error(path, problems or {WEIGHT_0: asked_for}, None if drop else self.rows)
        return left_out

    def check_encoding(self, path: Path) -> None:
        """Raise UserError if rows cannot be used because the file has another encoding than UTF-8."""
        if CHARACTERS in self.problems and self.layout.encoding == "utf-8" and not path.is_dir():
            with opened(path) as (file, _):
                encoding = other_encoding(file.read())
            if encoding:
                line = self.problems[CHARACTERS][1]
                raise UserError(f"{path}, line {line}: not UTF-8, most likely {encoding}; say --encoding {encoding}")

    @property
    def is_unlabelled(self) -> bool:
        return all(label in MISSING or label == "-1" for label in self.labels)


def inspect(path: Path, columns: Columns, with_label: bool = True) -> Inspection:
    """Read a file through, and count; UserError if it is not what it is said to be."""
    layout, rows = find_layout(path, columns), 0
    problems: Problems = {}
    labels: dict[str, tuple[int, int]] = {}
    for fields, problem, _, _, cell, _ in _checked(path, layout, columns, with_label, columns.may_be_empty):
        rows += 1
        if problem:
            count, *first = problems.get(problem, (0, fields.line, _detail(problem, fields, cell)))
            problems[problem] = (count + 1, *first)  # type: ignore[assignment]
        elif with_label:
            label = cell if isinstance(cell, str) and cell in labels else label_text(cell)
            count, line = labels.get(label, (0, fields.line))
            if count or len(labels) < _MOST_LABELS:
                labels[label] = (count + 1, line)
    return Inspection(layout, rows, problems, labels)


def has_columns(path: Path, columns: Columns) -> bool:
    """Whether a file has the columns of text and label."""
    layout = find_layout(path, columns)
    first = next(read_fields(path, layout), None)
    try:
        return first is not None and bool(_places(path, layout, columns, first, with_label=True))
    except UserError:
        return False


def has_labels(path: Path, columns: Columns) -> bool:
    """Whether a file has the columns of text and label, and any label."""
    return has_columns(path, columns) and not inspect(path, columns).is_unlabelled


def check_text(text: str, where: str) -> None:
    """Raise UserError if a text, which does not come from a file, is none that the tokenizer can take."""
    if _UNUSABLE.search(text):
        raise UserError(f"{where}: not UTF-8, or with a NUL character; convert it")


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
