"""Compare settings that were each run with the same seeds: means, deviations, and paired differences."""

from __future__ import annotations

import statistics
from typing import Any, Optional

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more, the last makes intervals a little
# too wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Figures = dict[str, Optional[float]]  # by column; None for seconds that are not known
Results = dict[int, Figures]  # by seed


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean of paired differences, and half the width of its 95 % interval (Student's t)."""
    count = len(differences)
    quantile = _T95[min(count - 2, len(_T95) - 1)]
    return statistics.mean(differences), quantile * statistics.stdev(differences) / count**0.5


def shared_columns(results: dict[str, Results]) -> list[str]:
    """Return the columns that all runs have; settings may evaluate on different files."""
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    return [column for column in runs[0] if all(column in run for run in runs)]


def summary(results: dict[str, Results]) -> dict[str, Any]:
    """Return mean and deviation (n - 1) of every column per setting, and the differences to the first setting.

    What is not known is left out; None stands for a mean of nothing.
    """
    reference, columns = next(iter(results)), shared_columns(results)
    found: dict[str, Any] = {}
    for name, by_seed in results.items():
        known = {c: [value for run in by_seed.values() if (value := run[c]) is not None] for c in columns}
        found[name] = {"mean": {c: statistics.mean(values) if values else None for c, values in known.items()}}
        if len(by_seed) > 1:
            found[name]["deviation"] = {c: statistics.stdev(v) if len(v) > 1 else None for c, v in known.items()}
            if name != reference:
                found[name]["difference"] = {}
                for column in columns:
                    pairs = [(by_seed[seed][column], results[reference][seed][column]) for seed in by_seed]
                    differences = [a - b for a, b in pairs if a is not None and b is not None]
                    if len(differences) > 1:
                        mean, half = interval(differences)
                        found[name]["difference"][column] = {"mean": mean, "half_width": half}
    return found


def table(results: dict[str, Results]) -> list[str]:
    """Return the results in lines: every run, then means and deviations, then differences in points."""
    reference, columns = next(iter(results)), shared_columns(results)
    width = max(12, *(len(name) + 2 for name in results))

    def cell(column: str, value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}" if column == "seconds" else f"{value:.4f}"

    def line(name: str, seed: object, values: Figures) -> str:
        return f"{name:<{width}}{seed!s:<10}" + "".join(f"{cell(c, values[c]):>12}" for c in columns)

    lines = [f"{'setting':<{width}}{'seed':<10}" + "".join(f"{column[-11:]:>12}" for column in columns)]
    lines += [line(name, seed, by_seed[seed]) for name, by_seed in results.items() for seed in by_seed]
    found = summary(results)
    for name, figures in found.items():
        lines += [line(name, which, figures[which]) for which in ("mean", "deviation") if which in figures]
    for name, figures in found.items():
        for column, difference in figures.get("difference", {}).items():
            if column != "seconds":
                points, half = difference["mean"] * 100, difference["half_width"] * 100
                lines.append(f"{name} - {reference}, {column}: {points:+.2f} points, 95 % interval +-{half:.2f}")
    return lines
