"""Rows that are no lines of a text: JSON documents, folders of texts, Parquet, `datasets`' folders, Excel.

Parquet and `datasets` need pyarrow, Excel needs openpyxl: extras, imported when such a file is read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input

Cells = Iterator[tuple[int, list[Any]]]
UNLABELLED_FOLDERS = ("unsup",)  # of the Large Movie Review Dataset


def needed(module: str, path: Path, what: str) -> Any:
    """Import a module of an extra; UserError, with the command that brings it, if it is not there."""
    package, wanted = {"pyarrow": ("pyarrow", "pyarrow<25"), "openpyxl": ("openpyxl",) * 2}[module.split(".")[0]]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({' '.join(str(error).split())[:100]})"
        raise UserError(
            f"{path} is {what}, which needs {package}{why}: pip install '{wanted}' (extra: files), or save it as CSV"
        ) from None


# --- JSON


def json_rows(text: str, path: Path) -> list[Any]:
    """Return the rows of a JSON document: an array of objects or arrays, or what pandas makes of a table."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, neither one document nor one object per line: {error}") from None
    if isinstance(found, dict):
        parts = list(found.values())
        if {"columns", "data"} <= found.keys():  # orient="split"
            return [dict(zip(found["columns"], row)) for row in found["data"]]
        if len(found) == 1 and isinstance(parts[0], list):  # {"data": [...]}
            found = parts[0]
        elif len(found) > 1 and all(
            isinstance(part, list) and part and isinstance(part[0], (dict, list)) for part in parts
        ):
            split = "[json.dump(rows, open(name + '.json', 'w')) for name, rows in json.load(sys.stdin).items()]"
            raise UserError(
                f"{path} holds several tables ({', '.join(found)}); write each to a file of its own:"
                f' python -c "import json, sys; {split}" < {path.name}'
            )
        elif parts and all(isinstance(part, (dict, list)) and len(part) == len(parts[0]) for part in parts):
            columns = [list(part.values()) if isinstance(part, dict) else part for part in parts]
            return [dict(zip(found, cells)) for cells in zip(*columns)]
    kinds = {type(row) for row in found} if isinstance(found, list) else set()
    if kinds not in ({dict}, {list}):
        raise UserError(f"{path} is JSON, but no table: neither an array of objects nor one object per line")
    return list(found)


# --- texts in files of their own


def labels_beside(path: Path) -> Path | None:
    """Return the file of labels, `x_labels.txt`, of a file of texts, `x_text.txt`; None if there is none."""
    beside = path.with_name(path.name.replace("_text.", "_labels."))
    return beside if beside != path and beside.is_file() else None


def names_beside(path: Path) -> tuple[str, ...]:
    """Return the names of the labels 0, 1, ... in a `mapping.txt` beside a file; none if it is not there."""
    mapping = path.with_name("mapping.txt")
    rows = [line.split("\t") for line in mapping.read_text(encoding="utf-8").splitlines()] if mapping.is_file() else []
    return (
        tuple(row[1] for row in rows) if all(len(row) == 2 and row[0] == str(i) for i, row in enumerate(rows)) else ()
    )


def with_labels_beside(path: Path, texts: Iterable[tuple[int, list[Any]]]) -> Cells:
    """Add to every text the line of the labels' file; UserError unless both have as many lines."""
    labels_file = labels_beside(path)
    assert labels_file is not None
    labels, rows = labels_file.read_text(encoding="utf-8-sig").splitlines(), list(texts)
    if len(labels) != len(rows):
        raise UserError(
            f"{path} has {len(rows):,} lines, but {labels_file} has {len(labels):,}; they must belong together"
        )
    yield from ((number, [*cells, label]) for (number, cells), label in zip(rows, labels))


def _folder_rows(path: Path, encoding: str) -> Cells:
    """Yield text, label and file for every file in the folders of a folder, whose names are the labels."""
    number = 0
    for folder in sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")):
        label = None if folder.name in UNLABELLED_FOLDERS else folder.name
        for file in sorted(each for each in folder.rglob("*") if each.is_file() and not each.name.startswith(".")):
            number += 1
            text = file.read_bytes().decode(encoding, "surrogateescape")
            yield number, [text.removeprefix("\ufeff").rstrip("\r\n"), label, str(file.relative_to(path))]


def source_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder or beside a file that are read with it."""
    beside = [file for file in (labels_beside(path), path.with_name("mapping.txt")) if file and file.is_file()]
    if not path.is_dir() and labels_beside(path) is None:
        return digest_of_input(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path, *beside]
    parts = [f"{file.relative_to(path if path.is_dir() else path.parent)} {digest_of_input(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


# --- Arrow and Excel


def _features(metadata: Any) -> dict[str, Any]:
    """Return the features that `datasets` writes into a schema, by their columns."""
    try:
        features: dict[str, Any] = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features


def _arrow_batches(path: Path, kind: str) -> tuple[Any, dict[str, Any], Iterable[Any]]:
    """Return schema, features and batches of rows of a Parquet file, an Arrow file, or a folder of `datasets`."""
    what = "Parquet" if kind == "parquet" else "a folder of datasets" if path.is_dir() else "Arrow"
    pyarrow = needed("pyarrow", path, what)
    try:
        if kind == "parquet":
            file = needed("pyarrow.parquet", path, what).ParquetFile(path)
            return file.schema_arrow, _features(file.schema_arrow.metadata), file.iter_batches(1000)
        info: dict[str, Any] = {}
        files = [path]
        if path.is_dir():
            info = json.loads((path / "dataset_info.json").read_text(encoding="utf-8")).get("features") or {}
            files = [path / each["filename"] for each in json.loads((path / "state.json").read_text())["_data_files"]]
        sources = [pyarrow.memory_map(str(file)) for file in files]
        readers = [_arrow_reader(pyarrow, source) for source in sources]
        schema = readers[0].schema
        return (
            schema,
            info or _features(schema.metadata),
            (batch for reader in readers for batch in _all_batches(reader)),
        )
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"cannot read {path} as {what}: {shorten(error)}") from None


def shorten(error: BaseException) -> str:
    return " ".join(str(error).split())[:150]


def _arrow_reader(pyarrow: Any, source: Any) -> Any:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)


def _all_batches(reader: Any) -> Iterable[Any]:
    return (reader.get_batch(i) for i in range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader


def arrow_columns(path: Path, kind: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return the names of the columns, and those of the classes by the columns that have any."""
    schema, features, _ = _arrow_batches(path, kind)
    return tuple(schema.names), {
        name: tuple(each["names"]) for name, each in features.items() if isinstance(each, dict) and "names" in each
    }


def _arrow_rows(kind: str) -> Callable[[Path, str], Cells]:
    def rows(path: Path, _: str) -> Cells:
        number = 0
        for batch in _arrow_batches(path, kind)[2]:
            for cells in zip(*(column.to_pylist() for column in batch.columns)):
                number += 1
                yield number, list(cells)

    return rows


def excel_rows(path: Path, _: str = "") -> Cells:
    """Yield the rows of a workbook's first sheet, the header too: texts, numbers as Excel shows them, None if empty."""
    openpyxl = needed("openpyxl", path, "an Excel workbook")
    try:
        with path.open("rb") as file:
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
            for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
                if any(cell is not None for cell in row):
                    yield number, [_excel_text(cell) for cell in row]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"cannot read {path} as an Excel workbook: {shorten(error)}; save it as CSV UTF-8") from None


def _excel_text(cell: Any) -> str | None:
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return None if cell is None else str(cell)


READERS: dict[str, Callable[[Path, str], Cells]] = {
    "folder": _folder_rows,
    "parquet": _arrow_rows("parquet"),
    "arrow": _arrow_rows("arrow"),
    "xlsx": excel_rows,
}
