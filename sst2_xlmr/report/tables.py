"""Tables for the console: of evaluated files, of compared precisions, and of settings run with the same seeds."""

import statistics
from typing import Any

from sst2_xlmr.evaluation.compare import Comparisons
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.task import Task

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, intervals are slightly too wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Figures = dict[str, float | None]  # by column; None for unknown seconds
Results = dict[int, Figures]  # by seed


def interval(differences: list[float]) -> dict[str, float]:
    """Return the mean of two or more paired differences, and half the width of its 95 % interval."""
    half = _T95[: len(differences) - 1][-1] * statistics.stdev(differences) / len(differences) ** 0.5
    return {"mean": statistics.mean(differences), "half_width": half}


def summary(results: dict[str, Results]) -> dict[str, Any]:
    """Return each setting's mean and standard deviation (n - 1) by column, and its differences to the first setting.

    The columns are the first run's. Unknown figures are left out; a mean or deviation of none is None.
    """
    reference = next(iter(results.values()))
    found: dict[str, Any] = {}
    for name, by_seed in results.items():
        of_setting: dict[str, Any] = {"mean": {}, "deviation": {}, "difference": {}}
        for column in next(iter(reference.values())):
            known = {seed: value for seed, run in by_seed.items() if (value := run.get(column)) is not None}
            of_setting["mean"][column] = statistics.mean(known.values()) if known else None
            of_setting["deviation"][column] = statistics.stdev(known.values()) if len(known) > 1 else None
            pairs = [(value, reference[seed].get(column)) for seed, value in known.items()]
            differences = [value - other for value, other in pairs if other is not None]
            if by_seed is not reference and len(differences) > 1:
                of_setting["difference"][column] = interval(differences)
        found[name] = of_setting
    return found


def settings_table(results: dict[str, Results], unit: str = "seed") -> list[str]:
    """Return the lines of a table: every run, then means and deviations, then differences in points."""
    statistics_of, reference = summary(results), next(iter(results))
    columns, width = statistics_of[reference]["mean"], max(12, *(len(name) + 2 for name in results))

    def line(name: str, seed: object, run: Figures) -> str:
        cells = ["-" if (value := run.get(c)) is None else f"{value:.{0 if c == 'seconds' else 4}f}" for c in columns]
        return f"{name:<{width}}{seed!s:<10}" + "".join(f"{cell:>12}" for cell in cells)

    lines = [f"{'setting':<{width}}{unit:<10}" + "".join(f"{column[-11:]:>12}" for column in columns)]
    lines += [line(name, seed, run) for name, by_seed in results.items() for seed, run in by_seed.items()]
    for name, figures in statistics_of.items():
        lines += [line(name, which, figures[which]) for which in ("mean", "deviation") if len(results[name]) > 1]
    for name, figures in statistics_of.items():
        for column, difference in figures["difference"].items():
            if column != "seconds":
                points, half = difference["mean"] * 100, difference["half_width"] * 100
                lines.append(f"{name} - {reference}, {column}: {points:+.2f} points, 95 % interval +-{half:.2f}")
    return lines


def evaluation_table(task: Task, metrics_by_file: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table with a row per file, and the mean of several."""
    rows = []
    for name, metrics in metrics_by_file.items():
        rows.append({"file": name, **task.table_cells(metrics), "rows": f"{metrics['rows']:,}"})
    if len(rows) > 1:
        rows.append({"file": "mean", **task.table_cells(mean_of(list(metrics_by_file.values())))})
    return aligned([list(rows[0]), *([row.get(column, "") for column in rows[0]] for row in rows)])


def comparison_table(task: Task, compared: Comparisons, name: str, reference: str) -> list[str]:
    """Return the lines of a table comparing two precisions, with a row per file and one for all rows together."""
    labelled = [part["metrics"][0] for part in compared.values() if part["metrics"]]
    columns = list(task.table_cells(labelled[0])) if labelled else []
    titles = [f"{column} {name} ({reference})" for column in columns]
    rows = [["file", "labels changed", "largest change", *titles, "rows"]]
    for file, part in compared.items():
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
