"""The console's table of evaluated files."""

from __future__ import annotations

from typing import Any

from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.task import Task


def evaluation_table(task: Task, metrics_by_file: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a file each, and the mean of several."""
    rows = [
        {"file": name, **task.table_cells(metrics), "rows": f"{metrics['rows']:,}"}
        for name, metrics in metrics_by_file.items()
    ]
    if len(rows) > 1:
        rows.append({"file": "mean", **task.table_cells(mean_of(list(metrics_by_file.values())))})
    return lines_of(rows)


def lines_of(rows: list[dict[str, str]]) -> list[str]:
    """Return the lines of a table with a header; a row may lack cells. The first column is left-aligned."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [dict(zip(columns, columns)), *rows]
    widths = {column: max(len(row.get(column, "")) for row in table) for column in columns}
    cells = [[f"{row.get(column, ''):>{widths[column]}}" for column in columns[1:]] for row in table]
    return ["  ".join([f"{row[columns[0]]:<{widths[columns[0]]}}", *line]).rstrip() for row, line in zip(table, cells)]
