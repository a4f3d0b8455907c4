"""Rows of labelled text: which columns to read, and which rows are usable. Errors name the file and the line."""

import argparse
import contextlib
import functools
import itertools
import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sst2_xlmr.config import COLUMN_OPTIONS, Config
from sst2_xlmr.data.containers import READERS, shortened
from sst2_xlmr.data.formats import Layout, SourceRow, cell_text, read_source
from sst2_xlmr.data.sniff import ReadOptions, check_encoding, find_layout
from sst2_xlmr.labels import MISSING, label_text
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_json

COLUMNS, CHARACTERS = "another number of columns", "cut characters"
NO_TEXT, NO_LABEL = "no text", "no label"
HEADER = "repeated header"
WEIGHT_0 = "weight 0"  # left out on purpose, so never an error
PHRASES = {  # why a row is unusable -> the phrase in errors and notes
    COLUMNS: "with another number of columns",
    CHARACTERS: "with truncated or invalid characters",
    NO_TEXT: "without text",
    NO_LABEL: "without a label",
    HEADER: "that repeat or underline the header",
    WEIGHT_0: "with weight 0",
}
Problems = dict[str, tuple[int, int, str]]  # a key of PHRASES -> count, first line, detail
Checked = tuple[SourceRow, str, Any, Any, Any, float]  # see `_rows_with_problems`
_UNUSABLE = re.compile("[\ud800-\udfff\0]")
_CHUNK_CHARACTERS = 1 << 20
_MAX_LABELS = 20_000  # no further distinct labels are counted; classes are far fewer


class Row(NamedTuple):
    """A row of a file."""

    text: str
    pair: str | None  # the second text of a pair
    label: Any  # the result of `task.read_label`; None without a task
    source: SourceRow  # all of its columns, unchanged
    weight: float = 1.0  # factor on its loss

    @property
    def texts(self) -> list[str]:
        return [self.text] if self.pair is None else [self.text, self.pair]


def read_options_for(options: argparse.Namespace | Config, split: str = "") -> ReadOptions:
    """Return how a split is read: by the options that are given, overridden by --columns; only train has weights."""
    given = {name: value for name, value in vars(options).items() if name in COLUMN_OPTIONS}
    text, labels = tuple(given.pop("text_column", None) or ()), tuple(given.pop("label_columns", None) or ())
    pair, label = given.pop("text_pair_column", None), given.pop("label_column", "label")
    read_options = ReadOptions(text or None, pair, label, labels, getattr(options, "weight_column", None), **given)
    for option in getattr(options, "columns", ()):
        name, _, pairs = option.partition(":")
        if name == split:
            changes: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs.split(","))
            if "label" in changes:
                changes["labels"] = ()
            if "text" in changes:
                changes["text"] = tuple(changes["text"].split("+"))
            read_options = replace(read_options, **changes)
    return read_options if split == "train" else replace(read_options, weight=None)


def check_splits(columns: Iterable[str], names: Collection[str]) -> None:
    """Raise UserError if an option --columns is for a split that is not among the names."""
    for split in (option.partition(":")[0] for option in columns):
        if split not in (*names, "unlabelled"):  # the last are distill's
            raise UserError(f"--columns {split}: there is no such file; there are {', '.join(names)}")


def check_pairs(model: Path, pair: str | None, fix: str) -> None:
    """Raise UserError for single texts if the model was trained on pairs, or the other way around."""
    file = model / "config.json"
    takes_pairs = read_json(file, "a model folder is needed").get("text_pairs") if file.is_file() else None
    if takes_pairs is not None and takes_pairs != (pair is not None):
        trained = "pairs of texts; name the second column, too, with" if takes_pairs else "single texts; leave out"
        raise UserError(f"{model} was trained on {trained} {fix}")


class Positions(NamedTuple):
    """Where a row's texts, labels and weight are among its columns (None or empty if not read), and class names."""

    texts: list[int]
    pair: int | None
    labels: list[int]
    weight: int | None
    class_names: Sequence[str]

    def label_cell(self, names: Sequence[str], cells: Sequence[Any]) -> Any:
        """Return a row's label: an object if it has several columns, and by name if the file names its class ids."""
        labels = self.labels  # once, as this is called for every row
        if len(labels) > 1:
            return {names[position]: cells[position] for position in labels}
        label = cells[labels[0]] if labels else None
        if not self.class_names:
            return label
        if isinstance(label, list) and len(label) > 1:
            return [*map(self._named, label)]
        return self._named(label)

    def _named(self, label: Any) -> Any:
        index = label_text(label)
        return self.class_names[int(index)] if index.isdecimal() and int(index) < len(self.class_names) else label


def _positions(path: Path, layout: Layout, read_options: ReadOptions, source: SourceRow, with_label: bool) -> Positions:
    """Find a row's columns; UserError if one is missing, or used twice."""
    read_options = guessed_columns(path, layout, read_options)
    find = functools.partial(_position, path, layout, source, with_label)
    texts = [find("--text-column", name) for name in read_options.texts] or [find("--text-column", "sentence", "text")]
    pair = find("--text-pair-column", read_options.pair) if read_options.pair else None
    option = "--label-columns" if read_options.labels else "--label-column"
    labels = [find(option, name) for name in read_options.labels or (read_options.label,)] if with_label else []
    weight = find("--weight-column", read_options.weight) if read_options.weight and with_label else None
    used = [position for position in (*texts, pair, *labels, weight) if position is not None]
    if twice := [position for position in used if used.count(position) > 1]:
        name = source.names[twice[0]]
        raise UserError(f"{path}: the column {name!r} is named twice; text, second text and label must be different")
    class_names = layout.class_names.get(source.names[labels[0]], ()) if labels else ()
    if read_options.classes and not {*class_names} <= {*read_options.classes}:
        class_names = ()
    return Positions(texts, pair, labels, weight, class_names)


def label_name(path: Path, read_options: ReadOptions, is_required: bool = False) -> str | None:
    """Return the name of the label column in a file's first row; None if there is none, or UserError if required."""
    layout = find_layout(path, read_options)
    with contextlib.suppress(*(() if is_required else (UserError,))):
        for row in itertools.islice(read_source(path, layout), 1):
            return row.names[_positions(path, layout, read_options, row, with_label=True).labels[0]]
    return None


def _position(path: Path, layout: Layout, source: SourceRow, with_label: bool, option: str, *wanted: str) -> int:
    """Return the position of the first of the wanted columns that exists; UserError if none or two match."""
    names = source.names
    if layout.names and re.fullmatch("[0-9]{1,6}", wanted[0]):
        if 1 <= int(wanted[0]) <= len(names):
            return int(wanted[0]) - 1
        raise UserError(f"{path} has {len(names)} columns, from 1 to {len(names)}: there is no {option} {wanted[0]}")
    for name in wanted:
        matches = [position for position, other in enumerate(names) if other == name]
        matches = matches or [position for position, other in enumerate(names) if other.lower() == name.lower()]
        if len(matches) > 1:
            problem = f"{path}: two columns are named {name!r}; give {option} a number, from 1"
            raise UserError(problem, column_option=option)
        if matches:
            return matches[0]
    if layout.names and len(names) == 1 and option.startswith("--label"):
        fix = "if each line begins with its label, sed 's/ /\\t/' FILE > NEW makes that a column"
        reason = "is read as one column of texts, without labels; if it has more columns, give --delimiter"
        raise UserError(f"{path} {reason}; {fix}")
    has_header = layout.header or not layout.delimiter
    among = shortened(", ".join(names)) + ("" if has_header else " (it has no header)")
    absent, fix = " or ".join(map(repr, wanted)), f"name it with {option}{_proposal(path, layout, with_label)}"
    if any("{" in cell_text(cell) for cell in source.cells if not isinstance(cell, str)):
        rows = "" if layout.format == "jsonl" else ".[] | "
        flatten = f"jq -c '{rows}{{text: .document.text, label: .label}}' FILE > NEW.jsonl"
        fix = f"its rows are nested; write flat ones, e.g. {flatten}"
    raise UserError(f"{path}, line {source.line}: no column {absent} among {among}; {fix}", column_option=option)


def guessed_columns(path: Path, layout: Layout, read_options: ReadOptions) -> ReadOptions:
    """Fill in the numbers of the text and label columns if neither a header nor the options name them."""
    if not layout.names or layout.header or read_options.texts or {"text", "sentence"} & {*layout.names}:
        return read_options
    text, label, _ = _likely_columns(path, layout)
    label = label if label and read_options.label == "label" else read_options.label
    return replace(read_options, text=text or read_options.text, label=label)


def _likely_columns(path: Path, layout: Layout) -> tuple[str, str, list[str]]:
    """Guess from the first rows the number of the text and the label column, "" if unclear; list columns of 0 and 1."""
    first = itertools.islice(read_source(path, layout), 500)
    rows = [source.cells for source in first if len(source.cells) == len(layout.names)]
    columns = {str(i): [str(cell).strip() for cell in column] for i, column in enumerate(zip(*rows), 1)}
    texts = [i for i, cells in columns.items() if sum(" " in cell for cell in cells) > len(cells) / 2]
    labels = [i for i, cells in columns.items() if all(cells) and 1 < len({*cells}) <= max(2, len(cells) / 2)]
    labels = [i for i in labels if i not in texts]
    flags = [name for name, cells in zip(layout.names, columns.values()) if name and {*cells} <= {"0", "1"}]
    text = texts[0] if len(texts) == 1 else ""
    label = labels[0] if text and len(labels) == 1 else ""
    return text, label, flags


def _proposal(path: Path, layout: Layout, with_label: bool) -> str:
    """Return the options that probably select a table's text and label, for an error; empty if it is unclear."""
    if not layout.names:
        return ""
    *likely, flags = _likely_columns(path, layout)
    names = [layout.names[int(number) - 1] for number in likely[: 1 + with_label] if number]
    names = [number if name.isdecimal() or "\n" in name else shlex.quote(name) for number, name in zip(likely, names)]
    options: list[tuple[str, ...]] = list(zip(("--text-column", "--label-column"), names))
    if len(flags) > 2 and with_label:
        options = [*options[:1], ("--label-columns", *map(shlex.quote, flags))]
    return f" (e.g. {' '.join(itertools.chain.from_iterable(options))})" if options else ""


def _rows_with_problems(path: Path, layout: Layout, read_options: ReadOptions, with_label: bool) -> Iterator[Checked]:
    """Yield every row, checked: its source, problem (a key of PHRASES, or empty), text, pair, label cell, weight."""
    names: list[str] | None = None
    missing: UserError | None = None
    has_all = False
    for source in read_source(path, layout):
        cells = source.cells
        if source.names is not names:
            names, positions = source.names, None
            try:
                positions = _positions(path, layout, read_options, source, with_label)
                has_all = True
            except UserError as error:  # JSON objects may have different keys
                if layout.names:
                    raise
                missing = missing or error
                kind = NO_LABEL if error.column_option.startswith("--label") else NO_TEXT
        if positions is None or len(cells) != len(names):
            yield source, COLUMNS if positions else kind, None, None, None, 1.0
            continue
        if layout.header and (cells[0] == names[0] or layout.delimiter == "|") and _repeats_header(cells, names):
            yield source, HEADER, None, None, None, 1.0
            continue
        text = cells[positions.texts[0]]
        if len(positions.texts) > 1:
            texts = [cells[position] for position in positions.texts]
            text = " ".join(filter(None, texts)) if all(isinstance(each, str) for each in texts) else None
        problem = ""
        if type(text) is not str or not text.isascii() or not text.strip() or "\0" in text:
            problem = _text_problem(text, read_options.may_be_empty)
        pair = None
        if positions.pair is not None:
            pair = cells[positions.pair]
            problem = problem or _text_problem(pair, read_options.may_be_empty)
        label = positions.label_cell(names, cells)
        weight = 1.0
        if positions.weight is not None:
            weight = _weight(cells[positions.weight], f"{path}, line {source.line}")
            problem = problem if weight else WEIGHT_0
        yield source, problem, text, pair, label, weight
    if not has_all:
        raise missing or UserError(f"{path} has no rows")


def _repeats_header(cells: Sequence[Any], names: list[str]) -> bool:
    """Whether a row is the header again, as in concatenated files, or the line below it in a Markdown table."""
    texts = [cell_text(cell).strip() for cell in cells]
    return texts == names or (any(texts) and {*"".join(texts)} <= {"-", ":"} and len("".join(texts)) > len(texts))


def _weight(cell: Any, where: str) -> float:
    try:
        weight = float(cell)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{where}: the weight {label_text(cell)!r} is not a number of 0 or more; fix it")
    return weight


def _text_problem(text: Any, may_be_empty: bool) -> str:
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        return NO_TEXT
    return CHARACTERS if (not text.isascii() or "\0" in text) and _UNUSABLE.search(text) else ""


def read_rows(path: Path, read_options: ReadOptions, task: Task | None) -> Iterator[Row]:
    """Yield a file's usable rows; UserError, naming file, line and fix, if it has none, or any that are unusable.

    With `read_options.drop_unusable`, those are left out. Without a task, labels are not read, and texts may be empty.
    """
    layout = find_layout(path, read_options)
    read_options = replace(read_options, may_be_empty=task is None or read_options.may_be_empty)
    labels: dict[str, Any] = {}  # text of the cell -> label
    for source, problem, text, pair, cell, weight in _rows_with_problems(path, layout, read_options, task is not None):
        label = None
        if task and not problem:
            key = cell if isinstance(cell, str) else label_text(cell)
            if key in labels:
                label = labels[key]
            else:
                label = task.read_label(cell, f"{path}, line {source.line}")
                if len(labels) < _MAX_LABELS:
                    labels[key] = label
            problem = NO_LABEL if label is None else ""
        if not problem:
            yield Row(text, pair, label, source, weight)
        elif not read_options.drop_unusable and problem != WEIGHT_0:
            inspect(path, read_options, task is not None).check(path, task, drop=False)
            raise UserError(f"{path}, line {source.line}: changed while it was being read")


@dataclass(frozen=True)
class Inspection:
    """The result of reading a whole file."""

    layout: Layout
    rows: int  # usable or not
    problems: Problems  # unusable rows by kind; rows without a label are counted in `labels`
    labels: dict[str, list[int]]  # `label_text` of the other rows -> (count, first line)
    digest: str = ""  # SHA-256 of the file

    def check(self, path: Path, task: Task | None, drop: bool, names: Sequence[str] = ()) -> dict[str, int]:
        """Return the number of rows to leave out, by kind; UserError if there are any unless `drop`, or no others.

        Labels must be classes of the task. `task` is None until the labels are known; `names` are then labels that are
        valid even if they look like missing ones.
        """
        labels, problems = self.labels, dict(self.problems)
        if CHARACTERS in problems and self.layout.encoding == "utf-8" and self.layout.format not in READERS:
            check_encoding(path, problems[CHARACTERS][1])
        missing, unknown, error = [], 0, None
        for label, (count, line) in labels.items():
            is_missing = label in MISSING and label not in names
            try:
                if task:
                    is_missing = task.read_label(label, f"{path}, line {line}") is None
            except UserError as of_label:
                error, unknown = error or of_label, unknown + count
            if is_missing:
                missing.append(label)
        if error:
            raise UserError(f"{error} ({_rows(unknown)})")
        if missing:
            count = sum(labels[label][0] for label in missing) + problems.get(NO_LABEL, (0,))[0]
            problems[NO_LABEL] = (count, labels[missing[0]][1], repr(missing[0]))
        left_out = {kind: count for kind, (count, *_) in problems.items()}
        errors = {kind: problem for kind, problem in problems.items() if kind != WEIGHT_0}
        if sum(left_out.values()) == self.rows or (errors and not drop):
            raise self._error(path, errors or problems, may_drop=bool(labels) and not drop)
        return left_out

    def _error(self, path: Path, problems: Problems, may_drop: bool) -> UserError:
        """Return an error with the number of unusable rows, and the first one of each kind."""
        counts, lines, _ = zip(*problems.values())
        kinds = ", ".join(
            f"{count:,} {PHRASES[kind]} (line {line}{f': {detail}' if detail else ''})"
            for kind, (count, line, detail) in problems.items()
        )
        rows = f"{sum(counts):,} of {_rows(self.rows)}" if may_drop else _rows(sum(counts))
        fix = "fix them, or leave them out with --drop-unusable" if may_drop else "fix them"
        if NO_LABEL in problems and problems[NO_LABEL][2] not in ("''", ""):
            fix += "; if that is a class, list all with --label-names=A,B,..."
        elif COLUMNS in problems and self.layout.delimiter:
            fix += f"; a cell that contains {self.layout.delimiter!r} must be in quotes"
            if len(self.layout.names) == 1:
                fix += ", or read every line as one text with --delimiter tab"
        elif CHARACTERS in problems:
            fix += f"; they contain half a character, NUL, or bytes that are not {self.layout.encoding}"
        return UserError(f"{path}, line {min(lines)}: {rows} cannot be used: {kinds}; {fix}")

    @property
    def is_unlabelled(self) -> bool:
        return all(label in MISSING or label == "-1" for label in self.labels)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def inspect(path: Path, read_options: ReadOptions, with_label: bool = True) -> Inspection:
    """Read a whole file, and count its labels and unusable rows; UserError if it cannot be read as its layout says."""
    layout, rows = find_layout(path, read_options), 0
    problems: Problems = {}
    labels: dict[str, list[int]] = {}
    for source, problem, _, _, cell, _ in _rows_with_problems(path, layout, read_options, with_label):
        rows += 1
        if problem:
            broken = f"{len(source.cells)}, not {len(source.names)}" if problem == COLUMNS else ""
            count, line, detail = problems.get(problem, (0, source.line, "''" if problem == NO_LABEL else broken))
            problems[problem] = (count + 1, line, detail)
        elif with_label:
            label = cell if isinstance(cell, str) and cell in labels else label_text(cell)
            if label in labels:
                labels[label][0] += 1
            elif len(labels) < _MAX_LABELS:
                labels[label] = [1, source.line]
    return Inspection(layout, rows, problems, labels)


def has_labels(path: Path, read_options: ReadOptions) -> bool:
    """Whether a file has a text and a label column, and any label."""
    return label_name(path, read_options) is not None and not inspect(path, read_options).is_unlabelled


def check_text(text: str, where: str) -> None:
    """Raise UserError if the tokenizer cannot encode a text, which is at `where`, not in a file."""
    if _UNUSABLE.search(text):
        raise UserError(f"{where}: contains a NUL character or a lone surrogate (not UTF-8); remove it")


def texts_of(rows: Iterable[Row]) -> list[str | tuple[str, str]]:
    """Return the arguments of `Classifier.predict`: texts, or pairs of texts."""
    return [row.text if row.pair is None else (row.text, row.pair) for row in rows]


def in_chunks(rows: Iterable[Row], count: int) -> Iterator[list[Row]]:
    """Yield lists of `count` rows, or fewer if their texts are long."""
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
