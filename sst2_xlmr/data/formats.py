"""Files of rows, read by their `Layout` and written: tables with a delimiter, JSON, fastText's lines, plain lines.

Only the current row is held in memory, but all of a JSON document. Errors name file and line.
Folders, Parquet and Excel are in containers.py; how a layout is found is in sniff.py.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, TextIO

from sst2_xlmr.config import QUOTES
from sst2_xlmr.data.containers import READERS, json_rows, with_labels_beside
from sst2_xlmr.util.errors import UserError

KINDS = (".tsv", ".csv", ".jsonl", ".parquet")  # that are written; to add one, see `row_writer`
LONGEST = 1 << 24  # characters of a line or cell: a quote that is never closed must not fill the memory
_BREAKS = re.compile("\r\n|[\t\r\n]")
_FASTTEXT = re.compile(r"((?:__label__\S+\s+)*(?:__label__\S+)?)(.*)", re.DOTALL)
_LONE_CR, _CR = re.compile("\r(?!\n|\\Z)"), "\ufdd0"  # in a cell; what stands for it: csv takes it for a line end
_LONE_BACKSLASH = re.compile(r'\\(\\|"|)')
Lines = Iterator[tuple[int, str]]
Rows = Iterator[tuple[int, Any]]


class Layout(NamedTuple):
    """How a file is read.

    Attributes:
        format: one of config.FORMATS.
        delimiter, quoting, newline: of a table; `quoting` is a key of QUOTES.
        header: whether a table's first line names its columns.
        names: of the columns; empty in JSON, whose rows have their own.
        class_names: of the labels 0, 1, ... by column, where the file itself says them.
        notes: what is to be said of it.
    """

    format: str
    encoding: str = "utf-8"
    delimiter: str = ""
    quoting: str = ""
    newline: str = "\n"
    header: bool = False
    names: tuple[str, ...] = ()
    class_names: Mapping[str, Sequence[str]] = {}
    notes: tuple[str, ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether columns have an order, and the same names in every row."""
        return bool(self.names)


class Fields(NamedTuple):
    """A row as it stands in a file.

    Attributes:
        line: number, from 1, of its first line; of its row, where there are no lines.
        names: of its columns; rows with the same columns share one list.
        cells: one per name, unless the row is broken; text, or any JSON value in JSON.
    """

    line: int
    names: list[str]
    cells: Sequence[Any]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """Open a file, unpacked if it is gzipped or a .zip with one file, by its content; also gives its name unpacked.

    UserError if it cannot be read, while it is open too.
    """
    try:
        with path.open("rb") as raw, contextlib.ExitStack() as stack:
            magic, name = raw.peek(4)[:4], path.name.lower()
            if magic[:2] == b"\x1f\x8b" or path.suffix.lower() == ".gz":
                yield gzip.GzipFile(fileobj=raw), name.removesuffix(".gz")  # type: ignore[misc]
                return
            if magic == b"PK\x03\x04":
                packed = stack.enter_context(zipfile.ZipFile(raw))
                files = [each for each in packed.namelist() if not each.endswith("/") and "__MACOSX" not in each]
                if "[Content_Types].xml" not in files:  # else a file of Excel
                    if len(files) != 1:
                        raise UserError(f"{path} is a .zip of {len(files)} files; unpack it with unzip, and name one")
                    yield stack.enter_context(packed.open(files[0])), files[0].lower()  # type: ignore[misc]
                    return
                raw.seek(0)
            yield raw, name
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        kind = "zip" if isinstance(error, zipfile.BadZipFile) else "gzip"
        raise UserError(f"{path} is not a whole {kind} file: truncated, damaged or misnamed; fetch it again") from None
    except (OSError, RuntimeError) as error:  # zipfile: a password, or an unknown compression
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', '') or error}") from None


def decoded_lines(file: BinaryIO, name: object, encoding: str = "utf-8", newline: str = "\n") -> Lines:
    """Yield (line number from 1, line with its end); UTF-8 with or without a byte order mark, if nothing else is said.

    A byte that is not of the encoding becomes a lone surrogate (Python's `surrogateescape`).
    """
    codec = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    text = io.TextIOWrapper(file, codec, "surrogateescape", newline)
    try:
        for number, line in enumerate(iter(functools.partial(text.readline, LONGEST + 1), ""), 1):
            if len(line) > LONGEST:
                raise UserError(f"{name}, line {number}: longer than {LONGEST:,} characters; is it a file of rows?")
            if "\0" in line:
                cure = "remove it, or, if the file is UTF-16, say --encoding utf-16-le"
                raise UserError(f"{name}, line {number}: has a NUL character; {cure}")
            yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not {encoding}: {error.reason}; name its --encoding") from None
    finally:
        with contextlib.suppress(ValueError):  # the file has been closed
            text.detach()


def _row_lines(lines: Lines) -> Lines:
    """Yield (line number, line without its end) for formats with one row a line; empty lines at the end are none."""
    empty: list[int] = []
    for number, line in lines:
        if line := line.removesuffix("\n").removesuffix("\r"):
            yield from ((each, "") for each in empty)
            empty = []
            yield number, line
        else:
            empty.append(number)


def csv_reader(lines: Iterable[str], delimiter: str, quoting: str) -> Any:
    """Return `csv.reader`, to which a lone carriage return is `_CR`, and a backslash that escapes nothing is itself."""
    lines = (_LONE_CR.sub(_CR, line) if "\r" in line[:-2] else line for line in lines)
    dialect: dict[str, Any] = {"delimiter": delimiter, "quotechar": QUOTES[quoting], "strict": True}
    if quoting == "backslash":
        lines = (_LONE_BACKSLASH.sub(lambda match: match[0] if match[1] else "\\\\", line) for line in lines)
        dialect |= {"doublequote": False, "escapechar": "\\"}
    return csv.reader(lines, **dialect)


def _csv_rows(lines: Lines, path: Path, layout: Layout) -> Rows:
    csv.field_size_limit(LONGEST)  # the default is 131,072
    reader, first = csv_reader((line for _, line in lines), layout.delimiter, layout.quoting), 1
    try:
        for cells in reader:
            if cells:  # blank lines hold nothing: a row with one empty field is written as ""
                yield first, [cell.replace(_CR, "\r") for cell in cells] if _CR in "".join(cells) else cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: the row at line {first} is not valid CSV: {error}; is a quotation mark never closed? If quotes"
            ' are part of the text, say --quoting none; if \\" stands for one, --quoting backslash'
        ) from None


def _json_objects(lines: Lines, path: Path) -> Rows:
    for number, line in _row_lines(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object with one key per column")
        yield number, row


def _rows_of_lines(lines: Lines, path: Path, layout: Layout) -> Rows:
    """Return line number and cells of every row; JSON's objects as they are."""
    if layout.format == "json":
        return enumerate(json_rows("".join(line for _, line in lines), path), 1)
    if layout.format == "jsonl":
        return _json_objects(lines, path)
    if layout.format == "fasttext":
        parts = ((number, _FASTTEXT.fullmatch(line)) for number, line in _row_lines(lines))
        return ((i, [part[2].strip(), part[1].replace("__label__", " ").split()]) for i, part in parts if part)
    if layout.format == "lines":
        texts = ((number, [line.removesuffix("\n").removesuffix("\r")]) for number, line in lines)
        return with_labels_beside(path, texts) if len(layout.names) > 1 else texts
    if layout.quoting != "none":
        return _csv_rows(lines, path, layout)
    # Split at line ends and delimiters only: some of SST-2's sentences start with a quotation mark.
    return ((number, line.split(layout.delimiter)) for number, line in _row_lines(lines))


def read_fields(path: Path, layout: Layout) -> Iterator[Fields]:
    """Yield a file's rows, all columns as they are; a broken row has another number of cells than of names.

    UserError, naming file, line and cure, if it is not as its layout says.
    """
    names = list(layout.names)
    with contextlib.ExitStack() as stack:
        if layout.format in READERS:
            rows = READERS[layout.format](path, layout.encoding)
        else:
            file, _ = stack.enter_context(opened(path))
            rows = _rows_of_lines(decoded_lines(file, path, layout.encoding, layout.newline), path, layout)
        if layout.header:
            next(rows, None)
        for number, cells in rows:
            if isinstance(cells, dict):  # objects with the same keys share their names
                names = names if list(cells) == names else list(cells)
                cells = list(cells.values())
            yield Fields(number, names, cells)


def cell_text(cell: object) -> str:
    """Return a cell as text: empty for JSON's null, JSON for any value that is not a string."""
    if isinstance(cell, str):
        return cell
    return "" if cell is None else json.dumps(cell, ensure_ascii=False)


def either(names: Iterable[str]) -> str:
    """Return `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def kind_of(path: Path) -> str:
    """Return the kind of a file to write, by its name; UserError for an extension that is none of KINDS."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if plain.suffix.lower() not in KINDS:
        raise UserError(f"{path}: unknown kind of file; the name must end in {either(KINDS)}, perhaps with .gz")
    return plain.suffix.lower()


def row_writer(file: TextIO, kind: str) -> Callable[[Iterable[str], Iterable[object]], object]:
    """Return write(names, cells), which adds a row to a file; a table's first row must be the names.

    Args:
        file: opened with newline="".
        kind: one of KINDS; in .tsv, tabs and line ends in cells become spaces.
    """
    if kind == ".tsv":
        return lambda _, cells: file.write("\t".join(_BREAKS.sub(" ", cell_text(cell)) for cell in cells) + "\n")
    if kind in (".jsonl", ".parquet"):  # see predictions.new_output
        return lambda names, cells: file.write(json.dumps(dict(zip(names, cells)), ensure_ascii=False) + "\n")
    assert kind == ".csv", kind
    rows = csv.writer(file)  # line ends are RFC 4180's CRLF: with them, a lone CR or LF in a cell is quoted too
    return lambda _, cells: rows.writerow(map(cell_text, cells))
