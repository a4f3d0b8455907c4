"""Formats that are not lines of text: JSON, folders; Parquet, `datasets` and Excel, whose libraries are extras."""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input, read_errors

Cells = Iterator[tuple[int, list[Any]]]
_FIX = "save it as CSV UTF-8"


def shortened(text: object, longest: int = 200) -> str:
    """Return a text on one line, truncated if it is longer than `longest`."""
    text = " ".join(str(text).split())
    return text if len(text) <= longest else text[:longest] + "..."


def import_extra(module: str, path: Path, what: str) -> Any:
    """Import a module of an optional dependency; UserError with the command to install it if that fails."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({shortened(error, 100)})"
        requirement = "'pyarrow<25'" if package == "pyarrow" else package
        fix = f"pip install {requirement} (extra: files), or save it as CSV"
        raise UserError(f"{path} is {what}, which needs {package}{why}: {fix}") from None


def json_rows(text: str, path: Path) -> list[Any]:
    """Return the rows of a JSON document: an array of objects or arrays, or a table that pandas wrote."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, neither one document nor one object per line: {error}") from None
    if isinstance(content, dict) and content:
        values = list(content.values())
        if {"columns", "data"} <= content.keys():  # orient="split"
            return [dict(zip(content["columns"], row)) for row in content["data"]]
        if len(values) == 1 and isinstance(values[0], list):  # {"data": [...]}
            content = values[0]
        elif [value for value in values if isinstance(value, list)] == [content.get("data")]:
            content = content["data"]  # beside a version, or a schema: orient="table"
        elif all(map(str.isdecimal, content)) and all(isinstance(value, dict) for value in values):
            content = values  # orient="index"
        elif all(isinstance(value, list) and {*map(type, value)} & {dict, list} for value in values):
            raise UserError(f"{path} holds several tables ({', '.join(content)}); write each to a file of its own")
        elif all(isinstance(value, (dict, list)) and len(value) == len(values[0]) for value in values):
            columns = [list(value.values()) if isinstance(value, dict) else value for value in values]
            return [dict(zip(content, cells)) for cells in zip(*columns)]
    kinds = {type(row) for row in content} if isinstance(content, list) else set()
    if kinds not in ({dict}, {list}):
        raise UserError(f"{path} is JSON, but not a table: neither an array of objects nor one object per line")
    return list(content)


def labels_file_of(path: Path) -> Path | None:
    """Return the file of labels, `x_labels.txt`, for a file of texts, `x_text.txt`; None if it does not exist."""
    labels_file = path.with_name(path.name.replace("_text.", "_labels."))
    return labels_file if labels_file != path and labels_file.is_file() else None


def mapped_names(path: Path) -> tuple[str, ...]:
    """Return the names of labels 0, 1, ... in the `mapping.txt` beside a file; () if it does not exist."""
    mapping = path.with_name("mapping.txt")
    lines = mapping.read_text(encoding="utf-8").splitlines() if mapping.is_file() else []
    entries = [[*line.split("\t"), ""][:2] for line in lines]
    is_in_order = all(number == str(i) for i, (number, _) in enumerate(entries))
    return tuple(name for _, name in entries) if is_in_order else ()


def with_labels(path: Path, texts: Iterable[tuple[int, list[Any]]], labels_file: Path) -> Cells:
    """Append to each text its line of the labels file; UserError unless both have the same number of lines."""
    labels, rows = labels_file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n"), list(texts)
    if len(labels) != len(rows):
        raise UserError(f"{path} has {len(rows):,} lines, but {labels_file} has {len(labels):,}; fix one of them")
    yield from ((number, [*cells, label]) for (number, cells), label in zip(rows, labels))


def _folder_rows(path: Path, _: str, encoding: str) -> Cells:
    """Yield text, label and file of every file in a folder's subfolders, which are named after the labels."""
    files = [file.relative_to(path) for file in sorted(path.glob("*/**/*")) if file.is_file()]
    visible = (file for file in files if not file.parts[0].startswith(".") and not file.name.startswith("."))
    for number, file in enumerate(visible, 1):
        label = file.parts[0] if file.parts[0] != "unsup" else None  # the Large Movie Review Dataset's unlabelled texts
        text = (path / file).read_bytes().decode(encoding, "surrogateescape")
        yield number, [text.removeprefix("\ufeff").rstrip("\r\n"), label, str(file)]


def source_digest(path: Path) -> str:
    """Return the SHA-256 of a file, of a folder's files, or of a file with its labels file and `mapping.txt`."""
    folder, labels = path, labels_file_of(path)
    if path.is_dir():
        files = sorted(path.rglob("*"))
    elif labels:
        folder, files = path.parent, [path, labels, path.with_name("mapping.txt")]
    else:
        return digest_of_input(path)
    lines = [f"{file.relative_to(folder)} {digest_of_input(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _arrow_batches(path: Path, kind: str) -> tuple[Any, Iterable[Any]]:
    """Return the schema and record batches of a Parquet file, an Arrow file, or a folder of `datasets`."""
    pyarrow = import_extra("pyarrow", path, kind.title())
    if kind == "parquet":
        file = import_extra("pyarrow.parquet", path, kind.title()).ParquetFile(path)
        return file.schema_arrow, file.iter_batches(1000)
    files, tables = [path], []
    if path.is_dir():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
    for arrow_file in files:
        source = pyarrow.memory_map(str(arrow_file))
        is_stream = source.read(6) != b"ARROW1"
        source.seek(0)
        tables.append((pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(source).read_all())
    table = pyarrow.concat_tables(tables)
    return table.schema, table.to_batches(1000)


def arrow_columns(path: Path, kind: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return the columns, and column -> class names from the metadata of `datasets`."""
    with read_errors(f"{path} as {kind.title()}", _FIX):
        schema = _arrow_batches(path, kind)[0]
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", "{}"))
        features = metadata.get("info", {}).get("features") or {}
        return tuple(schema.names), {name: tuple(f["names"]) for name, f in features.items() if "names" in f}


def _arrow_rows(path: Path, kind: str, _: str) -> Cells:
    with read_errors(f"{path} as {kind.title()}", _FIX):
        batches = ([column.to_pylist() for column in batch.columns] for batch in _arrow_batches(path, kind)[1])
        yield from enumerate((list(cells) for columns in batches for cells in zip(*columns)), 1)


@contextlib.contextmanager
def excel_sheets(path: Path) -> Iterator[list[Any]]:
    """Open a workbook, and return its sheets of cells."""
    openpyxl = import_extra("openpyxl", path, "an Excel workbook")
    with read_errors(f"{path} as an Excel workbook", _FIX), path.open("rb") as file:
        yield openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets


def sheet_rows(sheet: Any) -> Cells:
    """Yield a sheet's rows, including the header; cells are text, or None if empty."""
    for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
        if any(cell is not None for cell in row):
            yield number, [None if cell is None else str(cell) for cell in row]


def _excel_rows(path: Path, *_: str) -> Cells:
    with excel_sheets(path) as sheets:
        yield from sheet_rows(sheets[0])


# Format -> rows of a path, given the format and an encoding.
READERS: dict[str, Callable[[Path, str, str], Cells]] = {"folder": _folder_rows, "xlsx": _excel_rows}
READERS |= {"parquet": _arrow_rows, "arrow": _arrow_rows}
