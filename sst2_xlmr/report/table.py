"""The console's table of evaluated files."""

from __future__ import annotations

from typing import Any

from sst2_xlmr.evaluation.metrics import mean_of


def evaluation_table(metrics_by_file: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a file each, and the mean of several."""
    width = max(len(name) for name in [*metrics_by_file, "file"])
    lines = [f"{'file':<{width}}  accuracy  95 % interval  macro F1     ECE      rows"]
    for name, metrics in metrics_by_file.items():
        interval = f"{metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f}"
        lines.append(
            f"{name:<{width}}    {metrics['accuracy']:.4f}  {interval:>13}    {metrics['macro_f1']:.4f}"
            f"  {metrics['ece']:.4f}  {metrics['rows']:>8,}"
        )
    if len(metrics_by_file) > 1:
        mean = mean_of(list(metrics_by_file.values()))
        lines.append(
            f"{'mean':<{width}}    {mean['accuracy']:.4f}  {'':>13}    {mean['macro_f1']:.4f}  {mean['ece']:.4f}"
        )
    return lines
