"""Rows on which an exported model is compared with the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np

from sst2_xlmr.config import named_files
from sst2_xlmr.data.formats import KINDS
from sst2_xlmr.data.rows import Columns, Row, has_labels, read_rows
from sst2_xlmr.task import Task

SENTENCES = [
    "A quiet film that stays with you for days.",
    "Das Essen war kalt, der Kellner unfreundlich und die Rechnung falsch.",
    "Un concert inoubliable !",
    "Очень скучная книга, я не дочитал её до конца.",
    "Πολύ καλή εξυπηρέτηση.",
    "الفندق نظيف والموقع ممتاز.",
    "המשלוח הגיע באיחור של שבועיים.",
    "यह फ़ोन दो दिन में ख़राब हो गया।",
    "อาหารอร่อยมากและราคาไม่แพง",
    "这家店的服务太差了,再也不来了。",
    "この本を読んで本当によかった。",
    "배터리가 하루도 못 가요.",
    "One word and another, " * 200,
    "  two  spaces, a\ttab, ﬁ and ① ",
    "",
]
# ((texts, second texts or None), labels, int [rows], or None)
Rows = tuple[tuple[list[str], Optional[list[str]]], Optional[np.ndarray]]


def read_texts(file: Path, columns: Columns, task: Task | None = None) -> Iterator[Row]:
    """Yield a file's rows, with labels if there is a task; a file of an unknown kind has one text per line."""
    return read_rows(file, columns if is_rows_file(file) else Columns(format="lines"), task)


def is_rows_file(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(KINDS)


def read_checks(
    check_files: list[str], columns: Columns, task: Task, takes_pairs: bool, has_label_column: bool
) -> dict[str, Rows]:
    """Return name -> rows of --check-file; without files, built-in sentences, and pairs if the form `takes_pairs`.

    If --label-column was given, files of rows must have this column.
    """
    if not check_files:
        pairs = {"pairs": ((SENTENCES, SENTENCES[::-1]), None)} if takes_pairs else {}
        return {"sentences": ((SENTENCES, None), None), **pairs}
    checks: dict[str, Rows] = {}
    for name, file in named_files(check_files, "--check-file").items():
        is_labelled = is_rows_file(file) and (has_label_column or has_labels(file, columns))
        rows = list(read_texts(file, columns, task if is_labelled else None))
        seconds = [row.pair for row in rows if row.pair is not None]
        labels = np.array([row.label for row in rows]) if is_labelled else None
        checks[name] = ([row.text for row in rows], seconds or None), labels
    return checks
