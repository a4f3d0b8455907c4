"""Read labelled rows from files: TSV (GLUE's layout), CSV, JSONL. Errors name the file and the row."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from sst2_xlmr.config import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")
SUFFIXES = (".tsv", ".csv", ".jsonl")
Fields = Iterator[tuple[int, dict[str, object]]]


def find_split(data_dir: Path, split: str) -> Path | None:
    """Return the file of `split` ("train", "dev", "test") in a folder, or None.

    Raises:
        UserError: if there is more than one.
    """
    found = [data_dir / (split + suffix) for suffix in SUFFIXES if (data_dir / (split + suffix)).is_file()]
    if len(found) > 1:
        raise UserError(f"{data_dir} has {' and '.join(f.name for f in found)}; keep one, or use --{split}-file")
    return found[0] if found else None


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) of a UTF-8 file, with or without a byte order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path} is UTF-16, not UTF-8; convert it, e.g. with iconv -f UTF-16 -t UTF-8")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line); convert the file to UTF-8"
                ) from None


def _row_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without LF or CRLF) for formats with one row a line."""
    blank_line = 0
    for number, line in _decoded_lines(path):
        line = line.rstrip("\n")
        line = line[:-1] if line.endswith("\r") else line
        if not line:
            blank_line = blank_line or number
        elif blank_line:  # blank lines at the very end are harmless, elsewhere a row has been lost
            raise UserError(f"{path}, line {blank_line}: empty line between rows; remove it")
        else:
            yield number, line


def _tsv_fields(path: Path) -> Fields:
    """Split at line ends and tabs only: SST-2 has sentences that start with a quotation mark, which is text."""
    header: list[str] = []
    for number, line in _row_lines(path):
        cells = line.split("\t")
        if not header:
            header = [name.strip() for name in cells]
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, but the header has {len(header)}"
                f" ({', '.join(header)}); separate columns with one tab each"
            )
        yield number, dict(zip(header, cells))


def _csv_fields(path: Path) -> Fields:
    reader = csv.reader((line for _, line in _decoded_lines(path)), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = [name.strip() for name in cells]
            elif cells and len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, but the header has {len(header)}"
                    f' ({", ".join(header)}); put text that has a comma between "quotes"'
                )
            elif cells:
                yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _jsonl_fields(path: Path) -> Fields:
    for number, line in _row_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object with one key per column")
        yield number, row


_READERS: dict[str, Callable[[Path], Fields]] = {".tsv": _tsv_fields, ".csv": _csv_fields, ".jsonl": _jsonl_fields}


def _label_index(value: object, label_names: list[str]) -> int | None:
    text = str(value).strip()
    if text in label_names:
        return label_names.index(text)
    if text.isdecimal() and text.isascii() and int(text) < len(label_names) and not isinstance(value, bool):
        return int(text)
    return None


def has_column(path: Path, column: str) -> bool:
    """Whether the file has a row, and the first one a column of that name."""
    try:
        return any(column in row for _, row in itertools.islice(_fields(path), 1))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _fields(path: Path) -> Fields:
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown kind of file; the name must end in .tsv, .csv or .jsonl")
    return _READERS[path.suffix.lower()](path)


def read_rows(path: Path, text_column: str, label_column: str, label_names: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (text, class index) row by row; nothing but the current row is held in memory.

    Args:
        path: .tsv (header line, then rows split at tabs, no quoting), .csv (header, RFC 4180 quoting) or .jsonl.
        label_names: a label is one of these names, or its number from 0; a name that looks like a number goes first.

    Raises:
        UserError: naming file, line and cure, for anything that is not as described, or if there is no row.
    """
    rows = 0
    try:
        for number, row in _fields(path):
            rows += 1
            for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
                if column not in row:
                    raise UserError(
                        f"{path}, line {number}: no column {column!r} among {', '.join(row)}; name it with {option}"
                    )
            text = row[text_column]
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{path}, line {number}: column {text_column!r} holds no text; remove the row or fill it"
                )
            if _SURROGATE.search(text):  # JSON can say what UTF-8 cannot
                raise UserError(
                    f"{path}, line {number}: column {text_column!r} has half a character (a lone surrogate)"
                )
            label = _label_index(row[label_column], label_names)
            if label is None:
                raise UserError(
                    f"{path}, line {number}: label {str(row[label_column])[:40]!r} is neither one of"
                    f" {', '.join(label_names)} nor a number from 0 to {len(label_names) - 1}; see --label-names"
                )
            yield text, label
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if rows == 0:
        raise UserError(f"{path} has no rows")
