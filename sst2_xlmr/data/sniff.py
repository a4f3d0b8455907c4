"""How a file is to be read, found from its content, then its name: format, delimiter, quoting, line ends, header.

The readers of pandas, DuckDB and clevercsv were tried first: the first asks for a dialect, the others take the first
row of a file without a header for its header where all cells are words, and none tells GLUE's quotes, which are text,
from those of CSV. What has been found here is read by Python's csv module.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sst2_xlmr.config import FORMATS, QUOTES
from sst2_xlmr.data import containers
from sst2_xlmr.data.containers import shortened
from sst2_xlmr.data.formats import Layout, csv_reader, decoded_lines, opened
from sst2_xlmr.util.errors import UserError

SAMPLE_CHARACTERS, SAMPLE_ROWS = 1 << 18, 1000
DELIMITERS = {"tab": "\t", "bar": "|", "semicolon": ";", "comma": ","}  # the rarer in texts, the earlier
_CONSISTENT = 0.8  # share of the rows that have as many columns as most
_NUMBER = re.compile(r"[+-]?([0-9]+([.,][0-9]*)?|[.,][0-9]+)([eE][+-]?[0-9]+)?")
_NAME = re.compile(r"[^\W\d][\w.\-/#()?:]*( [\w.\-/#()?:]+){0,2}|#\d \w+")  # as a column may be called
_COUNTED = ((0, ""), (1, ""), (1, "V"))  # names that pandas and R give to columns without any
_TREE = re.compile(r"\([0-9] (\([0-9] |[^()]+\)$)")
_FASTTEXT = re.compile(r"__label__[^\s,;|]+(\s|$)")
_TREE_CURE = (
    "python -c \"import re, sys; [print(' '.join(re.findall(r'\\([0-9] ([^()]+)\\)', line)), line[1], sep='\\t')"
    ' for line in sys.stdin]" < TREES > rows.tsv, and give the columns as 1 (text) and 2 (label)'
)
# The format of a file that begins so, or what it is instead, with the cure.
_BEGINNINGS = {
    (b"PAR1",): "parquet",
    (b"ARROW1", b"\xff\xff\xff\xff"): "arrow",
    (b"PK\x03\x04",): "xlsx",
    (b"\xd0\xcf\x11\xe0",): "an old Excel workbook (.xls); save it as CSV UTF-8",
    (b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf"): "packed by bzip2, xz, zstd or 7-Zip; unpack it first",
    (b"version https://git-lfs",): "a pointer of Git LFS, not the file itself; fetch that with git lfs pull",
    (b"%PDF", b"SQLite format 3"): "a PDF or a database; save its table as CSV",
    (b"\x80",): "a Python pickle, which may run code when it is opened; save it as CSV, e.g. with pandas",
    (b"<!doctype html", b"<html", b"<?xml"): "a web page or XML, perhaps a download's error page; fetch it again",
}


@dataclass(frozen=True)
class Columns:
    """What is asked for of a file: its columns, each by name or by number from 1, and how it is to be read.

    Attributes:
        text: one, or several to join; None for `sentence`, or else `text`.
        labels: one for each label, instead of `label`.
        weight: of the row in the loss; None for ones.
        header: whether a table's first line names its columns; None to find out, as for the next four.
        drop_unusable: whether rows that cannot be used are left out; else they are an error.
        may_be_empty: whether a text may be empty, as in prediction.
        classes: names of the classes, where they are known; the names that a file has for its numbers hold only if they
            are among these.
    """

    text: str | tuple[str, ...] | None = None
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()
    weight: str | None = None
    header: bool | None = None
    format: str | None = None
    delimiter: str | None = None
    quoting: str | None = None
    encoding: str | None = None
    drop_unusable: bool = False
    may_be_empty: bool = False
    classes: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The text's columns that were named."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text or ())

    @property
    def named(self) -> set[str]:
        """All names, not numbers, that a header may have."""
        names = [*(self.texts or ("sentence", "text")), *(self.labels or [self.label]), *filter(None, [self.pair])]
        return {name.lower() for name in names if not name.isdecimal()}


def find_layout(path: Path, asked: Columns = Columns()) -> Layout:
    """Return how a file is read; UserError if it is none of rows, or nobody can tell."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _find_layout(path, asked, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _find_layout(path: Path, asked: Columns, *_: int) -> Layout:
    if path.is_dir():
        kind: str | None = "arrow" if (path / "state.json").is_file() else "folder"
    else:
        with opened(path) as (file, name):
            head = file.read(100).lstrip()
            kind = asked.format or _binary_format(path, head)
    if kind == "folder":
        if not any(file.is_file() for file in path.glob("*/*")):
            raise UserError(f"{path} is a folder, but not one with a folder of texts per class; name a file")
        return Layout("folder", asked.encoding or "utf-8", names=("text", "label", "file"))
    if kind in ("parquet", "arrow"):
        names, class_names = containers.arrow_columns(path, kind)
        return Layout(kind, names=names, class_names=class_names)
    if kind == "xlsx":
        with opened(path):  # whose errors are those of a damaged file
            cells_of_rows = [[cell or "" for cell in cells] for _, cells in containers.excel_rows(path)]
        return _with_header(path, Layout("xlsx"), cells_of_rows, asked)
    encoding = asked.encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    lines, is_whole = _sample(path, encoding)
    newline = "\n"
    if len(lines) == 1 and "\r" in lines[0][:-1] and not lines[0].endswith("\n"):
        newline, lines = "\r", [line + "\n" for line in lines[0].split("\r") if line]
    found = _text_layout(path, name, lines, is_whole, asked, kind)._replace(encoding=encoding, newline=newline)
    if found.format not in ("tsv", "csv"):
        return found
    may_be_free = found.quoting == "none" or (found.delimiter == "\t" and found.quoting == "double")
    if may_be_free and not is_whole and not asked.quoting:
        found = _with_quoting_of_whole(path, found)
    rows = _parsed(lines, found.delimiter, found.quoting, is_whole)
    if not rows:  # reading it will say where it is broken
        rows = [[cell.strip('"') for cell in lines[0].rstrip("\r\n").split(found.delimiter)]]
    return _with_header(path, found, rows[:SAMPLE_ROWS], asked)


def _binary_format(path: Path, head: bytes) -> str | None:
    """Return the format of a file that is no text; None for text. UserError for one that cannot be read."""
    beginning = head if head[:1] != b"<" else head.lower()
    found = next((what for beginnings, what in _BEGINNINGS.items() if beginning.startswith(beginnings)), None)
    if found is None or found in FORMATS:
        return found
    raise UserError(f"{path} is {found}")


def _sample(path: Path, encoding: str, most: float = SAMPLE_CHARACTERS) -> tuple[list[str], bool]:
    """Return the first lines of a file, whole ones, and whether they are all."""
    lines: list[str] = []
    characters = 0
    with opened(path) as (file, _):
        for _, line in decoded_lines(file, path, encoding):
            if characters > most:
                return lines, False
            lines.append(line)
            characters += len(line)
    return lines, True


def _text_layout(path: Path, name: str, lines: list[str], is_whole: bool, asked: Columns, kind: str | None) -> Layout:
    filled = [line for line in lines if line.strip()]
    if not filled:
        return Layout(kind or "lines", names=("text",))
    if kind == "fasttext" or (kind is None and all(map(_FASTTEXT.match, filled))):
        return Layout("fasttext", names=("text", "label"))
    if kind is None and all(map(_TREE.match, filled)):
        raise UserError(f"{path} has parse trees in brackets, as SST's; make them rows: {_TREE_CURE}")
    kind = kind or _json_format(name, filled)
    if kind == "json":
        whole = lines if is_whole else _sample(path, asked.encoding or "utf-8", math.inf)[0]
        row = next(iter(containers.json_rows("".join(whole), path)), None)
        return Layout("json", names=tuple(str(i + 1) for i in range(len(row))) if isinstance(row, list) else ())
    if kind == "jsonl":
        return Layout("jsonl")
    beside = containers.labels_beside(path)
    if kind == "lines" or (kind is None and beside):
        class_names = {"label": containers.names_beside(path)} if beside else {}
        return Layout("lines", names=("text", "label") if beside else ("text",), class_names=class_names)
    return _table(name, lines, is_whole, asked, kind)


def _json_format(name: str, filled: list[str]) -> str | None:
    """Return json or jsonl if a file has, or by its name should have, one of these; None for another."""
    first = filled[0].lstrip("\ufeff \t")
    if first[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(first)
            if isinstance(row, dict) and (len(filled) > 1 or not {*map(type, row.values())} <= {dict, list}):
                return "jsonl"
        with contextlib.suppress(ValueError, RecursionError):
            json.loads("".join(filled))
            return "json"
        if first.strip() in ("[", "{"):  # perhaps longer than the sample
            return "json"
    return "jsonl" if name.endswith((".jsonl", ".ndjson")) else "json" if name.endswith(".json") else None


def _parsed(lines: list[str], delimiter: str, quoting: str, is_whole: bool) -> list[list[str]]:
    """Return the rows of a table, without empty ones; none if they are not well-formed."""
    if quoting == "none":
        return [line.rstrip("\r\n").split(delimiter) for line in lines if line.strip("\r\n")]
    rows, start, reader = [], 0, csv_reader(lines, delimiter, quoting)
    try:
        for row in reader:
            start = reader.line_num
            rows += [row] if row else []
    except csv.Error:  # perhaps only because the sample ends in a row
        return rows if not is_whole and reader.line_num >= len(lines) and len(lines) - start < 200 else []
    return rows


def _is_quoted(lines: Iterable[str], delimiter: str, quoting: str) -> bool:
    """Whether quotes are CSV's: all cells that begin with one are well-formed, and something needs them.

    That is a quote, a delimiter or a line end inside, or a column that has them in all rows. In GLUE's files a sentence
    may begin with a quotation mark, which is part of it.
    """
    seen: list[str] = []
    quote = QUOTES[quoting]
    escape, escaped = ("\\", '\\"') if quoting == "backslash" else (quote, quote)

    def noted() -> Iterator[str]:
        for line in lines:
            seen.append(line)
            yield line

    def is_in_quotes(cell: str) -> bool:
        for mark in escaped:
            cell = cell.replace(mark, escape + mark)
        return quote + cell + quote in raw

    rows, is_needed = 0, False
    always: set[int] = set()  # the columns that have them in all rows
    try:
        for row in csv_reader(noted(), delimiter, quoting):
            raw = "".join(seen)
            if len(seen) > 1 and all(line.count(delimiter) == len(row) - 1 for line in seen):
                return False  # each of these lines is a row by itself
            seen.clear()
            quoted = {i for i, cell in enumerate(row) if is_in_quotes(cell)} if quote in raw else set()
            always = quoted if rows == 0 else always & quoted
            is_needed |= any(mark in row[i] for i in quoted for mark in (quote, delimiter, "\n"))
            rows += 1
    except csv.Error:
        return False
    return is_needed or (rows > 1 and bool(always))


def _quoting(lines: list[str], delimiter: str, is_whole: bool) -> str:
    begins = {quote for quote in "\"'" for line in lines if line.startswith(quote) or delimiter + quote in line}
    kinds = ["double", "backslash"] if any('\\"' in line for line in lines) else ["double"]
    if "'" in begins and _is_quoted(lines, delimiter, "single"):
        return "single"
    if delimiter == "\t":
        return next((kind for kind in kinds if '"' in begins and _is_quoted(lines, delimiter, kind)), "none")
    bare = re.compile(rf'(^|{re.escape(delimiter)})[^"{re.escape(delimiter)}][^{re.escape(delimiter)}]*\\"')
    if any(map(bare.search, lines)) and not any("\\" in re.sub(r'\\[\\"]', "", line) for line in lines):
        kinds.reverse()  # all backslashes escape something, also in cells without quotes
    if found := next((kind for kind in kinds if _parsed(lines, delimiter, kind, is_whole)), None):
        return found
    width, share = _share(_parsed(lines, delimiter, "none", is_whole))
    are_free = width > 1 and share == 1 and not any('""' in line or line.count('"') % 2 for line in lines)
    return "none" if are_free else "double"  # which says where it is not well-formed


def _share(rows: list[list[str]]) -> tuple[int, float]:
    """Return how many columns most rows have, and the share of these."""
    [(width, count)] = Counter(map(len, rows)).most_common(1) if rows else [(0, 0)]
    return width, count / max(1, len(rows))


def _table(name: str, lines: list[str], is_whole: bool, asked: Columns, kind: str | None) -> Layout:
    given = "\t" if kind == "tsv" else DELIMITERS.get(asked.delimiter or "", asked.delimiter)
    best: tuple[Any, ...] = ()
    for place, delimiter in enumerate([given] if given else DELIMITERS.values()):
        quoting = asked.quoting or (_quoting(lines, delimiter, is_whole) if len(delimiter) == 1 else "none")
        rows = _parsed(lines, delimiter, quoting, is_whole)
        width, share = _share(rows[1:] or rows)
        if (
            width > 1
            and (share >= _CONSISTENT or given)
            and (len(rows[0]) - width in (0, 1) or _row_names(rows, width))
        ):
            names = sum(cell.strip("\ufeff \"'").lower() in asked.named for cell in rows[0])
            is_csv = names or given or name.endswith(".csv") or any(cell[:1] != " " for row in rows for cell in row[1:])
            best = max(best, (names, round(share, 2), -place, delimiter, quoting)) if is_csv else best  # else prose
    if best:
        *_, delimiter, quoting = best
    elif name.endswith((".tsv", ".csv")) or kind or given or lines[0].strip('\ufeff\r\n "').lower() in asked.named:
        delimiter = given or ("\t" if name.endswith((".tsv", ".tab", ".txt")) else ",")
        quoting = asked.quoting or _quoting(lines, delimiter, is_whole)
    else:
        return Layout("lines", names=("text",))
    return Layout("tsv" if delimiter == "\t" else "csv", delimiter=delimiter, quoting=quoting)


def _with_quoting_of_whole(path: Path, found: Layout) -> Layout:
    """Look at the whole file for the quotes of a table that may have none."""
    cell = (found.delimiter + '"').encode(found.encoding.replace("utf-16", "utf-16-le"), "replace")
    with opened(path) as (file, _):
        blocks = iter(lambda: b"".join(file.readlines(1 << 20)), b"")  # of whole lines
        if not any(cell in block or b'\n"' in block or block.startswith(b'"') for block in blocks):
            return found
    with opened(path) as (file, _):
        lines = (line for _, line in decoded_lines(file, path, found.encoding, found.newline))
        return found._replace(quoting="double" if _is_quoted(lines, found.delimiter, "double") else "none")


def _row_names(rows: list[list[str]], width: int) -> bool:
    """Whether R has written row names, numbers, in a column that has no name in the header."""
    return len(rows[0]) == width - 1 and all(row[0].isdecimal() for row in rows[1:])


def _with_header(path: Path, found: Layout, rows: list[list[str]], asked: Columns) -> Layout:
    """Add names of columns, from the first line or numbers, and what the file says of its classes."""
    if not rows:
        return found._replace(names=("text",))
    first, width = [cell.strip() for cell in rows[0]], _share(rows[1:] or rows)[0]
    header = _has_header(path, [first, *rows[1:]], width, asked) if asked.header is None else asked.header
    if not header:
        return found._replace(names=tuple(map(str, range(1, width + 1))))
    notes, class_names = found.notes, {}
    if _row_names(rows, width):
        first, notes = ["", *first], (*notes, "the first column, row names, has no name in the header")
    ends = sum(row[0].endswith(" ") for row in rows[1:])  # as GLUE's texts of SST-2 do
    if first == ["sentence", "label"] and found.delimiter == "\t" and ends > 0.8 * len(rows[1:]):
        class_names = {"label": ("negative", "positive")}
    return found._replace(header=True, names=tuple(first), class_names=class_names, notes=notes)


def _has_header(path: Path, rows: list[list[str]], width: int, asked: Columns) -> bool:
    """Whether the first row names the columns; UserError if that cannot be told."""
    first, others = rows[0], [row for row in rows[1:] if len(row) == width]
    filled_names = [cell for cell in first if cell]
    if {"text", "sentence", *asked.named} & {cell.lower() for cell in first}:
        return True
    counted = ([f"{prefix}{i}" for i in range(start, start + len(filled_names))] for start, prefix in _COUNTED)
    if len(first) > 1 and filled_names in counted:
        return True
    like_rows, like_names = int(len(set(filled_names)) < len(filled_names)), 0
    has_classes = False  # a column whose cells repeat, but for the first
    for column, cell in enumerate(first[:width]):
        filled = [each for row in others if (each := row[column].strip())]
        if not cell or not filled:
            continue
        are_numbers, is_number = all(map(_NUMBER.fullmatch, filled)), bool(_NUMBER.fullmatch(cell))
        like_rows += cell in filled or (are_numbers and is_number)
        like_names += are_numbers and not is_number
        has_classes = has_classes or (len(filled) > 3 and len(set(filled)) <= len(filled) / 2)
    if bool(like_rows) != bool(like_names):
        return bool(like_names)
    looks_named = all(map(_NAME.fullmatch, filled_names))
    if not like_rows and (has_classes or not looks_named):
        return looks_named
    shown = shortened(" | ".join(first), 80)
    raise UserError(f"{path}: is its first line ({shown}) the columns' names or a row? say --header or --no-header")


def other_encoding(content: bytes) -> str:
    """Return the most likely encoding of text that is not UTF-8; empty if UTF-8 was cut in the middle of characters."""
    runs = list(re.finditer(rb"[\x80-\xff]+", content))
    if all(_is_utf8(run[0], content[run.end() : run.end() + 1]) for run in runs):
        return ""
    if sum(len(run[0]) == 1 for run in runs) > len(runs) / 2:  # single letters among ASCII: Western European
        return "cp1252"
    from charset_normalizer import from_bytes  # takes a while, and is needed for this error only

    best = from_bytes(content[:SAMPLE_CHARACTERS]).best()
    return best.encoding if best else "cp1252"


def _is_utf8(run: bytes, after: bytes) -> bool:
    """Whether bytes are UTF-8, perhaps cut in the middle of a character where a cell ends."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return "unexpected end" in error.reason and after in b'\t\n\r",;|'
    return True
