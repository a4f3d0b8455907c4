"""Tables, for the console, of evaluated files and compared precisions."""

from __future__ import annotations

from typing import Any

from sst2_xlmr.evaluation.compare import Predictions, compare, compare_all
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.task import Task


def evaluation_table(task: Task, metrics_by_file: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table with a row per file, and the mean of several."""
    rows = [
        {"file": name, **task.table_cells(metrics), "rows": f"{metrics['rows']:,}"}
        for name, metrics in metrics_by_file.items()
    ]
    if len(rows) > 1:
        rows.append({"file": "mean", **task.table_cells(mean_of(list(metrics_by_file.values())))})
    return aligned([list(rows[0]), *([row.get(column, "") for column in rows[0]] for row in rows)])


def comparison_table(task: Task, files: Predictions, name: str, reference: str) -> list[str]:
    """Return the lines of a table comparing two precisions, with a row per file and one for all rows together."""
    parts = {file: compare(task, *sides) for file, sides in files.items()}
    if len(parts) > 1:
        parts["all rows"] = compare_all(task, files)
    labelled = [part["metrics"][0] for part in parts.values() if part["metrics"]]
    columns = list(task.table_cells(labelled[0])) if labelled else []
    titles = [f"{column} {name} ({reference})" for column in columns]
    rows = [["file", "labels changed", "largest change", *titles, "rows"]]
    for file, part in parts.items():
        share = f"{part['changed']:,} ({part['changed'] / part['rows']:.2%})"
        cells = ["-"] * len(columns)
        if part["metrics"]:
            actual, expected = map(task.table_cells, part["metrics"])
            cells = [f"{actual[column]} ({expected[column]})" for column in columns]
        rows.append([file, share, f"{part['largest']:.4f}", *cells, f"{part['rows']:,}"])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, its first column aligned left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    cells = [[f"{row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], others))] for row in rows]
    return ["  ".join(line).rstrip() for line in cells]
