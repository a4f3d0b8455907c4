"""Detect a file's layout from its content, then its name: format, delimiter, quoting, line ends, header.

Why not a library: pandas must be told the dialect, DuckDB and clevercsv mistake a first row of words for a header, and
none of them tells GLUE's literal quotation marks from CSV's quotes. Python's csv module then reads the file.
"""

import contextlib
import csv
import functools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sst2_xlmr.config import FORMATS, QUOTES
from sst2_xlmr.data import containers
from sst2_xlmr.data.containers import shortened
from sst2_xlmr.data.formats import Layout, csv_reader, decoded_lines, opened
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import check_is_file

SAMPLE_CHARACTERS, SAMPLE_ROWS = 1 << 18, 1000
DELIMITERS = {"tab": "\t", "bar": "|", "semicolon": ";", "comma": ","}  # those that are rare in texts first
_CONSISTENT = 0.8  # required fraction of rows with the most frequent number of columns
_NUMBER = re.compile(r"[+-]?([0-9]+([.,][0-9]*)?|[.,][0-9]+)([eE][+-]?[0-9]+)?")
_NAME = re.compile(r"[^\W\d][\w.\-/#()?:]*( [\w.\-/#()?:]+){0,2}|#\d \w+")  # a plausible column name
_CR_AFTER_ROW = re.compile('([^"\r\n]|"[^"]*")*\r(?!\n)')  # the first row ends in a carriage return alone
_COUNTED = ((0, ""), (1, ""), (1, "V"))  # first number and prefix of the names that pandas and R give to columns
_TREE = re.compile(r"\([0-9] (\([0-9] |[^()]+\)$)")
_INVALID = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, see `decoded_lines`
_FASTTEXT = re.compile(r"__label__[^\s,;|]+(\s|$)")
_TREE_FIX = (
    "python -c \"import re, sys; [print(' '.join(re.findall(r'\\([0-9] ([^()]+)\\)', line)), line[1], sep='\\t')"
    ' for line in sys.stdin]" < TREES > rows.tsv, and give the columns as 1 (text) and 2 (label)'
)
# Magic bytes -> the format, or the reason why it is unsupported, with the fix.
_MAGIC = {
    (b"PAR1",): "parquet",
    (b"ARROW1", b"\xff\xff\xff\xff"): "arrow",
    (b"PK\x03\x04",): "xlsx",
    (b"\xd0\xcf\x11\xe0",): "an old Excel workbook (.xls); save it as CSV UTF-8",
    (b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"): "packed by bzip2, xz, zstd or 7-Zip; unpack it first",
    (b"version https://git-lfs",): "a pointer of Git LFS, not the file itself; fetch that with git lfs pull",
    (b"%PDF", b"SQLite format 3"): "a PDF or a database; save its table as CSV",
    (b"\x80",): "a Python pickle, which may run code when it is opened; save it as CSV, e.g. with pandas",
    (b"<!doctype html", b"<html", b"<?xml"): "a web page or XML, maybe a download's error page; fetch it again",
}


@dataclass(frozen=True)
class ReadOptions:
    """How to read a file: its columns, each by name or by number from 1, and its layout."""

    text: str | tuple[str, ...] | None = None  # one column, or several to join; None for `sentence`, or else `text`
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()  # one column per label, instead of `label`
    weight: str | None = None  # the column with loss weights; None for ones
    header: bool | None = None  # this and the next four: None to detect them
    format: str | None = None
    delimiter: str | None = None
    quoting: str | None = None
    encoding: str | None = None
    drop_unusable: bool = False  # whether to leave out unusable rows; otherwise they are an error
    may_be_empty: bool = False  # whether texts may be empty, as in prediction
    classes: tuple[str, ...] = ()  # if known; a file's own class names are used only if they are among them

    @property
    def texts(self) -> tuple[str, ...]:
        """The given text columns, () for the default."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text or ())

    @property
    def expected_names(self) -> set[str]:
        """All columns given by name, in lower case; one of them in the first row makes that a header."""
        names = [*(self.texts or ("sentence", "text")), *(self.labels or [self.label]), *filter(None, [self.pair])]
        return {name.lower() for name in names if not name.isdecimal()}


def find_layout(path: Path, options: ReadOptions = ReadOptions()) -> Layout:
    """Detect a file's layout; UserError if it is unreadable, unsupported or ambiguous."""
    check_is_file(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _find_layout(path, options, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _find_layout(path: Path, options: ReadOptions, *_: int) -> Layout:
    if (path / "dataset_dict.json").is_file():
        raise UserError(f"{path} has several splits; name one of its folders, or train with --data-dir {path}")
    if path.is_dir():
        kind = "arrow" if (path / "state.json").is_file() else "folder"
    else:
        with opened(path) as (file, name):
            start = file.read(300)
        if start[257:262] == b"ustar":
            raise UserError(f"{path} is a tar archive; unpack it first")
        head = start.lstrip()
        magic = head if head[:1] != b"<" else head.lower()
        kind = options.format or next((kind for start, kind in _MAGIC.items() if magic.startswith(start)), "")
        if kind and kind not in FORMATS:
            raise UserError(f"{path} is {kind}")
    if kind == "folder":
        if not any(file.is_file() for file in path.glob("*/*")):
            raise UserError(f"{path} is a folder, but not one with a folder of texts per class; name a file")
        return Layout("folder", options.encoding or "utf-8", names=("text", "label", "file"))
    if kind in ("parquet", "arrow"):
        names, class_names = containers.arrow_columns(path, kind)
        return Layout(kind, names=names, class_names=class_names)
    if kind == "xlsx":
        # `opened` for its errors about damaged files
        with opened(path), containers.excel_sheets(path) as sheets:
            rows = [[cell or "" for cell in cells] for _, cells in containers.sheet_rows(sheets[0])]
            first, *others = (sheet.title for sheet in sheets)
        note = f"only sheet {first!r} is read, not {shortened(', '.join(map(repr, others)))}; save those as CSV"
        return _with_header(path, Layout("xlsx", notes=(note,) if others else ()), rows, options)
    encoding = options.encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    lines, is_whole = _sample(path, encoding)
    newline, text = "\n", "".join(lines)
    if _CR_AFTER_ROW.match(text) and text.count("\r") - text.count("\r\n") > text.count("\n"):
        newline, lines = "\r", [line + "\r" for line in text.split("\r") if line]
    layout = _text_layout(path, name, lines, is_whole, options, encoding)._replace(encoding=encoding, newline=newline)
    if layout.format not in ("tsv", "csv"):
        return layout
    may_be_unquoted = layout.quoting == "none" or (layout.delimiter == "\t" and layout.quoting == "double")
    if may_be_unquoted and not is_whole and not options.quoting:
        layout = _with_quoting_of_whole(path, layout)
    rows = _parsed(lines, layout.delimiter, layout.quoting, is_whole)
    if not rows:  # the table is broken; the error comes when it is read
        rows = [[cell.strip('"') for cell in lines[0].rstrip("\r\n").split(layout.delimiter)]]
    return _with_header(path, layout, rows[:SAMPLE_ROWS], options)


def _sample(path: Path, encoding: str, most: float = SAMPLE_CHARACTERS) -> tuple[list[str], bool]:
    """Return the first lines of a file, about `most` characters, and whether they are all of it."""
    lines: list[str] = []
    characters = 0
    with opened(path) as (file, _):
        for _, line in decoded_lines(file, path, encoding):
            if characters > most:
                return lines, False
            lines.append(line)
            characters += len(line)
    return lines, True


def _text_layout(
    path: Path, name: str, lines: list[str], is_whole: bool, options: ReadOptions, encoding: str
) -> Layout:
    kind, filled = options.format, [line for line in lines if line.strip()]
    if not filled:
        return Layout(kind or "lines", names=("text",))
    if kind == "fasttext" or (kind is None and all(map(_FASTTEXT.match, filled))):
        return Layout("fasttext", names=("text", "label"))
    if kind is None and all(map(_TREE.match, filled)):
        raise UserError(f"{path} has parse trees in brackets, like SST's; convert them to rows: {_TREE_FIX}")
    kind = kind or _json_format(name, filled)
    if kind == "json":
        whole = lines if is_whole else _sample(path, encoding, math.inf)[0]
        row = next(iter(containers.json_rows("".join(whole), path)), None)
        return Layout("json", names=tuple(str(i + 1) for i in range(len(row))) if isinstance(row, list) else ())
    if kind == "jsonl":
        return Layout("jsonl")
    labels_file = containers.labels_file_of(path)
    if kind == "lines" or (kind is None and labels_file):
        class_names = {"label": containers.mapped_names(path)} if labels_file else {}
        return Layout("lines", names=("text", "label") if labels_file else ("text",), class_names=class_names)
    return _table(name, lines, is_whole, options)


def _json_format(name: str, filled: list[str]) -> str | None:
    """Return json or jsonl by a file's content or else its name; None for other formats."""
    first = filled[0].lstrip("\ufeff \t")
    if first[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(first)
            if isinstance(row, dict):  # a row itself, unless it holds rows; see `containers.json_rows`
                holds_rows = isinstance(row.get("data"), list) or {*map(type, row.values())} <= {dict, list}
                if len(filled) > 1 or not holds_rows:
                    return "jsonl"
        with contextlib.suppress(ValueError, RecursionError):
            json.loads("".join(filled))
            return "json"
        if first.strip() in ("[", "{"):  # the document may be longer than the sample
            return "json"
    return "jsonl" if name.endswith((".jsonl", ".ndjson")) else "json" if name.endswith(".json") else None


def _parsed(lines: list[str], delimiter: str, quoting: str, is_whole: bool) -> list[list[str]]:
    """Return the rows of a table, without empty ones; [] if it is malformed."""
    if quoting == "none":
        return [line.rstrip("\r\n").split(delimiter) for line in lines if line.strip("\r\n")]
    rows, start, reader = [], 0, csv_reader(lines, delimiter, quoting)
    try:
        for row in reader:
            start = reader.line_num
            rows += [row] if row else []
    except csv.Error:  # maybe only because the sample ends within a row
        return rows if not is_whole and reader.line_num >= len(lines) and len(lines) - start < 200 else []
    return rows


def _is_quoted(lines: Iterable[str], delimiter: str, quoting: str) -> bool:
    """Whether quotation marks quote cells, and are not text: GLUE's sentences may begin with a literal one.

    Every cell that begins with one must be well-formed; and a quoted cell must contain a quote, a delimiter or a line
    end, or a whole column be quoted, or exactly the cells with commas or quotes, as Excel does it even between tabs.
    """
    quote, record = QUOTES[quoting], []  # the lines of the current row
    escape, escaped = ("\\", '\\"') if quoting == "backslash" else (quote, quote)

    def recorded(line: str) -> str:
        record.append(line)
        return line

    def is_in_quotes(cell: str) -> bool:
        for mark in escaped:
            cell = cell.replace(mark, escape + mark)
        return quote + cell + quote in raw

    rows, is_needed = 0, False
    lines_look_like_rows = False  # whether each line of a row of several lines may be a row by itself
    excel_cells, is_excel = 0, quote == '"'  # quoted cells; whether they are those that Excel quotes
    quoted_columns: set[int] = set()  # those whose cells are all quoted
    quoted_below_header: set[int] = set()
    try:
        for row in csv_reader(map(recorded, lines), delimiter, quoting):
            raw = "".join(record)
            lines_look_like_rows |= len(record) > 1 and {line.count(delimiter) for line in record} == {len(row) - 1}
            record.clear()
            quoted = {i for i, cell in enumerate(row) if is_in_quotes(cell)} if quote in raw else set()
            quoted_columns = quoted if rows == 0 else quoted_columns & quoted
            quoted_below_header = quoted if rows == 1 else quoted_below_header & quoted
            if lines_look_like_rows and not quoted_columns:
                return False
            is_excel = is_excel and quoted == {i for i, cell in enumerate(row) if "," in cell or quote in cell}
            excel_cells += len(quoted)
            is_needed |= any(mark in row[i] for i in quoted for mark in (quote, delimiter, "\n"))
            rows += 1
    except csv.Error:
        return False
    is_column_quoted = (rows > 1 and bool(quoted_columns)) or (rows > 3 and bool(quoted_below_header))
    return is_needed or is_column_quoted or (is_excel and excel_cells > 1)


def _quoting(lines: list[str], delimiter: str, is_whole: bool) -> str:
    begins = {quote for quote in "\"'" for line in lines if line.startswith(quote) or delimiter + quote in line}
    kinds = ["double", "backslash"] if any('\\"' in line for line in lines) else ["double"]
    if "'" in begins and _is_quoted(lines, delimiter, "single"):
        return "single"
    if delimiter == "\t":
        return next((kind for kind in kinds if '"' in begins and _is_quoted(lines, delimiter, kind)), "none")
    bare = re.compile(rf'(^|{re.escape(delimiter)})[^"{re.escape(delimiter)}][^{re.escape(delimiter)}]*\\"')
    if any(map(bare.search, lines)) and not any("\\" in re.sub(r'\\[\\"]', "", line) for line in lines):
        kinds.reverse()  # all backslashes escape something, even in unquoted cells
    if found := next((kind for kind in kinds if _parsed(lines, delimiter, kind, is_whole)), None):
        return found
    width, share = _modal_width(_parsed(lines, delimiter, "none", is_whole))
    is_unquoted = width > 1 and share == 1 and not any('""' in line or line.count('"') % 2 for line in lines)
    return "none" if is_unquoted else "double"  # reading it as CSV then names the malformed line


def _modal_width(rows: list[list[str]]) -> tuple[int, float]:
    """Return the most frequent number of columns, and the fraction of rows that have it."""
    [(width, count)] = Counter(map(len, rows)).most_common(1) if rows else [(0, 0)]
    return width, count / max(1, len(rows))


def _table(name: str, lines: list[str], is_whole: bool, options: ReadOptions) -> Layout:
    given = "\t" if options.format == "tsv" else DELIMITERS.get(options.delimiter or "", options.delimiter)
    given = given and given.replace("\\t", "\t")  # as it is written in code
    if given and len(given) > 1 and options.quoting not in (None, "none"):
        raise UserError(f"--delimiter {given} has several characters, which needs --quoting none")
    wanted = options.expected_names
    best: tuple[Any, ...] = ()
    for rank, delimiter in enumerate([given] if given else DELIMITERS.values()):
        quoting = options.quoting or (_quoting(lines, delimiter, is_whole) if len(delimiter) == 1 else "none")
        rows = _parsed(lines, delimiter, quoting, is_whole)
        width, share = _modal_width(rows[1:] or rows)
        fits = bool(rows) and len(_padded_header(rows, width)) - width in (0, 1)
        if width > 1 and (share >= _CONSISTENT or given) and fits:
            names = sum(cell.strip("\ufeff \"'").lower() in wanted for cell in rows[0])
            is_prose = all(cell[:1] == " " for row in rows for cell in row[1:])  # its commas are followed by spaces
            # If most rows have a cell with an odd number of quotes, this delimiter cuts through quoted cells.
            is_torn = quoting == "none" and statistics.median(any(c.count('"') % 2 for c in row) for row in rows) > 0
            if names or given or name.endswith(".csv") or not is_prose:
                best = max(best, (names, not is_torn, round(share, 2), -rank, delimiter, quoting, rows))
    if best:
        *_, delimiter, quoting, rows = best
        raw = "".join(lines)
        spaced = ([cell for cell in row if re.match(' +"', cell) and delimiter + cell in raw] for row in rows[1:])
        if quoting == "double" and len(rows) > 1 and all(spaced):  # csv would read the quotes in these rows as text
            fix = f"sed 's/{delimiter} *\"/{delimiter}\"/g' FILE > NEW removes them"
            raise UserError(f"{name} has spaces before its quotes, which then count as text; {fix}")
    elif name.endswith((".tsv", ".csv")) or options.format or given or lines[0].strip('\ufeff\r\n "').lower() in wanted:
        delimiter = given or ("\t" if name.endswith((".tsv", ".tab", ".txt")) else ",")
        quoting = options.quoting or (_quoting(lines, delimiter, is_whole) if len(delimiter) == 1 else "none")
    else:
        return Layout("lines", names=("text",))
    return Layout("tsv" if delimiter == "\t" else "csv", delimiter=delimiter, quoting=quoting)


def _with_quoting_of_whole(path: Path, layout: Layout) -> Layout:
    """Detect the quoting from the whole file, if the sample of a table leaves it open."""
    cell = (layout.delimiter + '"').encode(layout.encoding.replace("utf-16", "utf-16-le"), "replace")
    with opened(path) as (file, _):
        blocks = iter(lambda: b"".join(file.readlines(1 << 20)), b"")  # of complete lines
        if not any(cell in block or b'\n"' in block or block.startswith(b'"') for block in blocks):
            return layout
    with opened(path) as (file, _):
        lines = (line for _, line in decoded_lines(file, path, layout.encoding, layout.newline))
        return layout._replace(quoting="double" if _is_quoted(lines, layout.delimiter, "double") else "none")


def _padded_header(rows: list[list[str]], width: int) -> list[str]:
    """Return the header, with an empty name for a cell that only the rows have: R's row name, or an empty last cell."""
    header, others = rows[0], [row for row in rows[1:] if len(row) == width]
    if len(header) != width - 1:
        return header
    if not any(row[-1] for row in others):
        return [*header, ""]
    return ["", *header] if all(row[0].isdecimal() for row in others) else header


def _with_header(path: Path, layout: Layout, rows: list[list[str]], options: ReadOptions) -> Layout:
    """Add the columns' names, from the header or numbers from 1, and SST-2's class names."""
    if not rows:
        return layout._replace(names=("text",))
    first, width = [cell.strip() for cell in rows[0]], _modal_width(rows[1:] or rows)[0]
    if _INVALID.search("".join(first)) and layout.encoding == "utf-8":
        check_encoding(path, 1)
    is_alone = not any(first[1:]) and first[0].lower() not in options.expected_names
    is_comment = first[0].startswith(("#", "//")) and options.header is not False and len(rows) > 2
    if is_comment:  # above a line of names, and nothing like the rows
        is_comment = _are_names(rows[1]) and sum(map(_are_names, rows[1:])) < len(rows) / 2
        is_comment = is_comment and not {*first} & {cell.strip() for row in rows[2:] for cell in row if cell}
    if ((is_alone and options.header is None) or is_comment) and width > 1 and len(rows) > 2 and layout.delimiter:
        start = 2 if is_comment else next((number for number, row in enumerate(rows, 1) if any(row[1:])), 2)
        lines = f"line 1, {shortened(first[0], 40)!r}, is" if start == 2 else f"lines 1 to {start - 1} are"
        raise UserError(f"{path}: {lines} not part of the table; keep the rest: tail -n +{start} FILE > NEW")
    header = _has_header(path, [first, *rows[1:]], width, options) if options.header is None else options.header
    if not header:
        return layout._replace(names=tuple(map(str, range(1, width + 1))))
    names, notes, class_names = _padded_header([first, *rows[1:]], width), layout.notes, {}
    if names[1:] == first:
        notes = (*notes, "the first column, row names, has no name in the header")
    ends = sum(row[0].endswith(" ") for row in rows[1:])  # as in GLUE's SST-2
    if names == ["sentence", "label"] and layout.delimiter == "\t" and ends > 0.8 * len(rows[1:]):
        class_names = {"label": ("negative", "positive")}
    return layout._replace(header=True, names=tuple(names), class_names=class_names, notes=notes)


def _are_names(row: list[str]) -> bool:
    return all(_NAME.fullmatch(cell.strip()) for cell in row if cell)


def _has_header(path: Path, rows: list[list[str]], width: int, options: ReadOptions) -> bool:
    """Whether the first row names the columns; UserError if that is ambiguous."""
    first = rows[0]
    others = [row for row in rows[1:] if len(row) == width and [*map(str.strip, row)] != first]
    filled_names = [cell for cell in first if cell]
    is_expected = bool({"text", "sentence", *options.expected_names} & {cell.lower() for cell in first})
    counted = ([f"{prefix}{i}" for i in range(start, start + len(filled_names))] for start, prefix in _COUNTED)
    if is_expected or (len(first) > 1 and filled_names in counted):
        return True
    is_like_rows, is_like_names = len(set(filled_names)) < len(filled_names), False
    has_classes = False  # whether the cells of a column repeat, except the first
    for column, cell in enumerate(first[:width]):
        filled = [other for row in others if (other := row[column].strip())]
        if not cell or not filled:
            continue
        are_numbers, is_number = all(map(_NUMBER.fullmatch, filled)), bool(_NUMBER.fullmatch(cell))
        is_like_rows |= cell in filled or (are_numbers and is_number)
        is_like_names |= are_numbers and not is_number
        has_classes |= len(filled) > 3 and len(set(filled)) <= len(filled) / 2
    if is_like_rows != is_like_names:
        return is_like_names
    looks_named = all(map(_NAME.fullmatch, filled_names))
    if not is_like_rows and (has_classes or not looks_named):
        return looks_named
    shown = shortened(" | ".join(first), 80)
    raise UserError(f"{path}: is its first line ({shown}) a header or a row? use --header or --no-header")


def check_encoding(path: Path, line: int) -> None:
    """Raise UserError with the likely encoding of a file that is not UTF-8, as this line shows."""
    with opened(path) as (file, _):
        encoding = other_encoding(content := file.read())
    if encoding:
        text = shortened(content.splitlines()[line - 1].decode(encoding, "replace"), 40)
        fix = f"use --encoding {encoding}, in which it is {text!r}, or another one if that is wrong"
        raise UserError(f"{path}, line {line}: not UTF-8; {fix}")


def other_encoding(content: bytes) -> str:
    """Return the most likely encoding of text that is not UTF-8; "" if it is UTF-8 with a few damaged characters."""
    runs = list(re.finditer(rb"[\x80-\xff]+", content))
    are_utf8 = sum(_is_utf8(run[0], content[run.end() : run.end() + 1]) for run in runs) >= 0.9 * len(runs)
    if are_utf8 and (len(runs) < 2 or any(_is_utf8(run[0], b"x") for run in runs)):  # not all of them are truncated
        return ""
    if sum(len(run[0]) == 1 for run in runs) > len(runs) / 2:  # single letters among ASCII: Western European
        return "cp1252"
    from charset_normalizer import from_bytes  # slow to import, and only needed for an error

    best = from_bytes(content[:SAMPLE_CHARACTERS]).best()
    return best.encoding if best else "cp1252"


def _is_utf8(run: bytes, after: bytes) -> bool:
    """Whether bytes are UTF-8, possibly with a truncated character at the end of a cell."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return "unexpected end" in error.reason and after in b'\t\n\r",;|'
    return True
