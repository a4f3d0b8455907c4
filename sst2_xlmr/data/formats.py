"""Files of rows, read and written: TSV (GLUE's layout), CSV (RFC 4180), JSONL, each also gzipped.

Only the current row is held in memory. Errors name the file and the line.
"""

from __future__ import annotations

import csv
import functools
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, TextIO

from sst2_xlmr.util.errors import UserError

KINDS = (".tsv", ".csv", ".jsonl")  # to add one, see `read_fields`, `row_writer` and the help of --data-dir
# Longest line in bytes and longest CSV field in characters: a quote that is never closed, or a file without line ends,
# must not fill the memory.
LONGEST = 1 << 24
_BREAKS = re.compile("\r\n|[\t\r\n]")
Lines = Iterator[tuple[int, str]]
Rows = Iterator[tuple[int, list[str]]]


class Fields(NamedTuple):
    """A row as it stands in a file.

    Attributes:
        line: number, from 1, of its first line.
        names: of its columns; rows with the same columns share one list.
        cells: one per name; text, or any JSON value in JSONL.
    """

    line: int
    names: list[str]
    cells: Sequence[Any]


def shortened(text: str, longest: int = 200) -> str:
    """Return a text for a one-line error, cut if it is long."""
    return text if len(text) <= longest else text[:longest] + "..."


def decoded_lines(file: BinaryIO, name: str) -> Lines:
    """Yield (line number from 1, line with its end) of UTF-8 text, with or without a byte order mark."""
    lines = iter(functools.partial(file.readline, LONGEST + 1), b"")
    for number, raw in enumerate(lines, 1):
        if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{name} is UTF-16, not UTF-8; convert it, e.g. with iconv -f UTF-16 -t UTF-8")
        if number == 1 and raw[:2] == b"\x1f\x8b":
            raise UserError(f"{name} is gzipped; let its name end in .gz")
        if len(raw) > LONGEST:
            raise UserError(f"{name}, line {number}: longer than {LONGEST:,} bytes; is it a file of rows?")
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line); convert it, e.g. with iconv"
            ) from None
        if "\0" in line:
            raise UserError(f"{name}, line {number}: has a NUL character; a file of rows is UTF-8 text without any")
        yield number, line


def _row_lines(lines: Lines, path: Path) -> Lines:
    """Yield (line number, line without LF or CRLF) for formats with one row a line."""
    blank_line = 0
    for number, line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        if not line:
            blank_line = blank_line or number
        elif blank_line:  # blank lines at the very end are harmless, elsewhere a row has been lost
            raise UserError(f"{path}, line {blank_line}: empty line between rows; remove it")
        else:
            yield number, line


def _csv_rows(lines: Lines, path: Path) -> Rows:
    csv.field_size_limit(LONGEST)  # the default is 131,072
    reader = csv.reader((line for _, line in lines), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = str(error)
            if "field larger" in problem:
                problem = f"a field of more than {LONGEST:,} characters; is a quotation mark never closed?"
            elif "unexpected end" in problem:
                problem = "the file ends inside a quoted field; is a quotation mark never closed?"
            raise UserError(f"{path}: the row at line {first} is not valid CSV: {problem}") from None
        if cells:  # blank lines hold nothing: a row with one empty field is written as ""
            yield first, cells


def _table(rows: Rows, path: Path, header: bool, cure: str) -> Iterator[Fields]:
    """Name the cells by the header, or number them from 1 without one."""
    names: list[str] = []
    for line, cells in rows:
        if not names:
            names = [name.strip() for name in cells] if header else [str(i) for i in range(1, len(cells) + 1)]
            if header:
                continue
        if len(cells) != len(names):
            listed = f" ({shortened(', '.join(names))})" if header else ""
            raise UserError(
                f"{path}, line {line}: {len(cells)} columns, but the {'header' if header else 'first row'} has"
                f" {len(names)}{listed}; {cure}"
            )
        yield Fields(line, names, cells)


def _objects(lines: Lines, path: Path) -> Iterator[Fields]:
    """Read one JSON object per line; keys are the columns' names, so there is no header."""
    names: list[str] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object with one key per column")
        if list(row) != names:
            names = list(row)
        yield Fields(number, names, list(row.values()))


def cell_text(cell: object) -> str:
    """Return a cell as text: empty for JSON's null, JSON for any value that is not a string."""
    if isinstance(cell, str):
        return cell
    return "" if cell is None else json.dumps(cell, ensure_ascii=False)


def kind_of(path: Path) -> str:
    """Return a file's kind by its name, one of KINDS; UserError for any other extension."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if plain.suffix.lower() not in KINDS:
        raise UserError(f"{path}: unknown kind of file; the name must end in {either(KINDS)}, perhaps with .gz")
    return plain.suffix.lower()


def is_table(path: Path) -> bool:
    """Whether a file's columns have an order, and the same names in every row, perhaps given by a header."""
    return kind_of(path) != ".jsonl"


def either(names: Iterable[str]) -> str:
    """Return `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def find_split(data_dir: Path, split: str, is_needed: bool = True) -> list[Path]:
    """Return the file of `split` in a folder, or none unless it is needed; UserError if there are several."""
    names = [split + kind + packed for kind in KINDS for packed in ("", ".gz")]
    present = [name for name in names if (data_dir / name).is_file()]
    if len(present) > 1:
        raise UserError(f"{data_dir} has {' and '.join(present)}; keep one, or use --{split}-file")
    if is_needed and not present:
        wanted = either(split + kind for kind in KINDS)
        raise UserError(f"{data_dir} has no {wanted}, also none with .gz; name the file with --{split}-file")
    return [data_dir / name for name in present]


def read_fields(path: Path, header: bool = True) -> Iterator[Fields]:
    """Yield a file's rows, all columns as they are; UserError, naming file, line and cure, if it is not as described.

    Args:
        path: .tsv (split at tabs, no quoting), .csv (RFC 4180 quoting) or .jsonl (one object per line), perhaps .gz.
        header: whether the first line of a .tsv or .csv file names the columns; else their names are 1, 2, ...
    """
    kind, is_packed = kind_of(path), path.suffix.lower() == ".gz"
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if is_packed else raw as file:
            lines = decoded_lines(file, str(path))  # type: ignore[arg-type]
            if kind == ".csv":
                yield from _table(_csv_rows(lines, path), path, header, 'put text that has a comma between "quotes"')
            elif kind == ".jsonl":
                yield from _objects(_row_lines(lines, path), path)
            else:  # split at line ends and tabs only: some of SST-2's sentences start with a quotation mark
                rows = ((number, line.split("\t")) for number, line in _row_lines(lines, path))
                yield from _table(rows, path, header, "separate columns with one tab each")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path} is not a whole gzip file: truncated, damaged, or no gzip; fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def line_of(path: Path, row: int, header: bool) -> int:
    """Return the number, from 1, of the line in which a row begins; the row's number is from 0.

    UserError or StopIteration if the file has to be read for it, and is not what it was.
    """
    if kind_of(path) == ".csv":  # whose rows may take several lines
        return next(itertools.islice(read_fields(path, header), row, None)).line
    return row + 1 + (header and is_table(path))


def row_writer(file: TextIO, kind: str) -> Callable[[Iterable[str], Iterable[object]], object]:
    """Return write(names, cells), which adds a row to a file; a table's first row must be the names.

    Args:
        file: opened with newline="".
        kind: one of KINDS; in .tsv, tabs and line ends in cells become spaces.
    """
    if kind == ".tsv":
        return lambda _, cells: file.write("\t".join(_BREAKS.sub(" ", cell_text(cell)) for cell in cells) + "\n")
    if kind == ".jsonl":
        return lambda names, cells: file.write(json.dumps(dict(zip(names, cells)), ensure_ascii=False) + "\n")
    assert kind == ".csv", kind
    rows = csv.writer(file)  # line ends are RFC 4180's CRLF: with them, a lone CR or LF in a cell is quoted too
    return lambda _, cells: rows.writerow(map(cell_text, cells))
