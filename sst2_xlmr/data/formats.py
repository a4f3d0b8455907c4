"""Read files of rows by their `Layout`, and write them: delimited tables, JSON, fastText's format, plain lines.

Only the current row is in memory, except for a JSON document. containers.py reads the other formats.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sst2_xlmr.config import QUOTES
from sst2_xlmr.data.containers import READERS, json_rows, labels_file_of, with_labels
from sst2_xlmr.util.errors import UserError

KINDS = (".tsv", ".csv", ".jsonl", ".parquet")  # of output files; see `row_text`
MAX_CHARACTERS = 1 << 24  # maximum characters of a line or cell, so that an unclosed quote cannot fill the memory
_BREAKS = re.compile("\r\n|[\t\r\n]")
_FASTTEXT = re.compile(r"((?:__label__\S+\s+)*(?:__label__\S+)?)(.*)", re.DOTALL)
_LONE_CR, _CR = re.compile("\r(?!\n|\\Z)"), "\ufdd0"  # csv would end a row at the first; `_CR` replaces it
_LONE_BACKSLASH = re.compile(r'\\(\\|"|)')
Lines = Iterator[tuple[int, str]]
Rows = Iterator[tuple[int, Any]]


class Layout(NamedTuple):
    """How a file is read."""

    format: str  # a key of config.FORMATS
    encoding: str = "utf-8"
    delimiter: str = ""  # of a table, like quoting and newline
    quoting: str = ""  # a key of QUOTES
    newline: str = "\n"
    header: bool = False  # whether a table's first line names its columns
    names: tuple[str, ...] = ()  # of all rows' columns; empty for JSON objects, each of which has its own
    class_names: Mapping[str, Sequence[str]] = {}  # column -> names of its labels 0, 1, ..., if the file contains them
    notes: tuple[str, ...] = ()  # warnings for the header


class SourceRow(NamedTuple):
    """A row of a file, unchanged."""

    line: int  # its first line, from 1; in formats without lines, its row
    names: list[str]  # its columns; rows with the same columns share one list
    cells: Sequence[Any]  # one per name, unless the row is broken: text, or any value in JSON


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """Open a file, unpacked if it is gzip or a zip of one file, with its inner name; UserError if reading fails."""
    try:
        with path.open("rb") as raw, contextlib.ExitStack() as stack:
            magic, name = raw.peek(4)[:4], path.name.lower()
            file: Any = raw
            if magic[:2] == b"\x1f\x8b" or path.suffix.lower() == ".gz":
                file, name = gzip.GzipFile(fileobj=raw), name.removesuffix(".gz")
            elif magic == b"PK\x03\x04":
                packed = stack.enter_context(zipfile.ZipFile(raw))
                files = [inner for inner in packed.namelist() if not inner.endswith("/") and "__MACOSX" not in inner]
                files = [inner for inner in files if not Path(inner).name.startswith(".")]  # macOS' .DS_Store, say
                if "content.xml" in files:
                    raise UserError(f"{path} is an OpenDocument file; save its table as CSV")
                if "[Content_Types].xml" in files:  # an Excel workbook
                    raw.seek(0)
                elif len(files) == 1:
                    file, name = stack.enter_context(packed.open(files[0])), files[0].lower()
                else:
                    raise UserError(f"{path} is a .zip with {len(files)} files; unzip it, and name one of them")
            yield file, name
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        kind = "zip" if isinstance(error, zipfile.BadZipFile) else "gzip"
        raise UserError(f"{path} is not a complete {kind} file: cut, damaged or misnamed; fetch it again") from None
    except (OSError, RuntimeError) as error:  # zipfile's RuntimeError: a password, or an unknown compression
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', '') or error}") from None


def decoded_lines(file: BinaryIO, name: object, encoding: str = "utf-8", newline: str = "\n") -> Lines:
    """Yield (number from 1, line with its end), without UTF-8's byte order mark; invalid bytes are lone surrogates."""
    codec = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    try:
        with io.TextIOWrapper(file, codec, "surrogateescape", newline) as text:
            for number, line in enumerate(iter(lambda: text.readline(MAX_CHARACTERS + 1), ""), 1):
                if len(line) > MAX_CHARACTERS:
                    raise UserError(f"{name}, line {number}: longer than {MAX_CHARACTERS:,} characters; is it a table?")
                if "\0" in line:
                    fix = "remove it: tr -d '\\0' < FILE > NEW, or, if the file is UTF-16, use --encoding utf-16-le"
                    raise UserError(f"{name}, line {number}: has a NUL character; {fix}")
                yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not {encoding}: {error.reason}; name its --encoding") from None


def _row_lines(lines: Lines) -> Lines:
    """Yield (line number, line without its end) for formats with a row per line, without empty lines at the end."""
    pending: list[tuple[int, str]] = []
    for number, line in lines:
        line = line.removesuffix("\n").removesuffix("\r")
        pending.append((number, line))
        if line:
            yield from pending
            pending.clear()


def csv_reader(lines: Iterable[str], delimiter: str, quoting: str) -> Any:
    """Return a `csv.reader` for which lone carriage returns are `_CR`, and backslashes that escape nothing are text."""
    lines = (_LONE_CR.sub(_CR, line) if "\r" in line[:-2] else line for line in lines)
    dialect: dict[str, Any] = {"delimiter": delimiter, "quotechar": QUOTES[quoting], "strict": True}
    if quoting == "backslash":
        lines = (_LONE_BACKSLASH.sub(lambda match: match[0] if match[1] else "\\\\", line) for line in lines)
        dialect |= {"doublequote": False, "escapechar": "\\"}
    return csv.reader(lines, **dialect)


def _csv_rows(lines: Lines, path: Path, layout: Layout) -> Rows:
    csv.field_size_limit(MAX_CHARACTERS)  # the default is 131,072
    reader, first = csv_reader((line for _, line in lines), layout.delimiter, layout.quoting), 1
    try:
        for cells in reader:
            if cells:  # not a blank line; a row with one empty cell would be ""
                yield first, [cell.replace(_CR, "\r") for cell in cells] if _CR in "".join(cells) else cells
            first = reader.line_num + 1
    except csv.Error as error:
        problem = f"the row at line {first} is not valid CSV: {error}; is a quotation mark never closed?"
        fix = 'If quotes are part of the text, use --quoting none; if they are escaped as \\", --quoting backslash'
        raise UserError(f"{path}: {problem} {fix}") from None


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
    """Return (line number, cells) of every row; a JSON object takes the place of the cells."""
    if layout.format == "json":
        return enumerate(json_rows("".join(line for _, line in lines), path), 1)
    if layout.format == "jsonl":
        return _json_objects(lines, path)
    if layout.format == "fasttext":
        matches = ((number, _FASTTEXT.fullmatch(line)) for number, line in _row_lines(lines))
        return ((i, [match[2].strip(), match[1].replace("__label__", " ").split()]) for i, match in matches if match)
    if layout.format == "lines":
        texts = ((number, [line.removesuffix("\n").removesuffix("\r")]) for number, line in lines)
        labels_file = labels_file_of(path)
        return with_labels(path, texts, labels_file) if labels_file else texts
    if layout.quoting != "none":
        return _csv_rows(lines, path, layout)
    # Quotation marks are text: some of SST-2's sentences start with one.
    return ((number, line.split(layout.delimiter)) for number, line in _row_lines(lines))


def read_source(path: Path, layout: Layout) -> Iterator[SourceRow]:
    """Yield a file's rows, broken ones with more or fewer cells than names; UserError if it has another layout."""
    names = list(layout.names)
    with contextlib.ExitStack() as stack:
        if layout.format in READERS:
            rows = READERS[layout.format](path, layout.format, layout.encoding)
        else:
            file, _ = stack.enter_context(opened(path))
            rows = _rows_of_lines(decoded_lines(file, path, layout.encoding, layout.newline), path, layout)
        if layout.header:
            next(rows, None)
        for number, cells in rows:
            if isinstance(cells, dict):
                names = names if list(cells) == names else list(cells)
                cells = list(cells.values())
            yield SourceRow(number, names, cells)


def cell_text(cell: object) -> str:
    """Return a cell as text: empty for JSON's null, JSON for any other value that is not a string."""
    if isinstance(cell, str):
        return cell
    return "" if cell is None else json.dumps(cell, ensure_ascii=False)


def or_list(names: Iterable[str]) -> str:
    """Return `a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def kind_of(path: Path) -> str:
    """Return an output file's extension, one of KINDS, without .gz; UserError for another extension."""
    kind = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if kind not in KINDS:
        raise UserError(f"{path}: unknown kind of file; the name must end in {or_list(KINDS)}, optionally with .gz")
    return kind


def row_text(kind: str, names: Iterable[str], cells: Iterable[object]) -> str:
    """Return a row, or a table's header, as the line of a file of this kind, one of KINDS."""
    if kind == ".tsv":  # without quotes, so tabs and line ends in cells become spaces
        return "\t".join(_BREAKS.sub(" ", cell_text(cell)) for cell in cells) + "\n"
    if kind in (".jsonl", ".parquet"):  # see predictions.new_output
        return json.dumps(dict(zip(names, cells)), ensure_ascii=False) + "\n"
    text = io.StringIO(newline="")
    csv.writer(text).writerow(map(cell_text, cells))  # its CRLF makes it quote a lone CR or LF in a cell, too
    return text.getvalue()
