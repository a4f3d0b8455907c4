"""The model card, `README.md` in a model's folder: data, metrics, settings, versions; no paths of this machine.

Its template is `model_card.md`, Markdown with the header that the Hugging Face Hub reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from sst2_xlmr.config import GROUPS, OPTIONS, Config, flag, named_file, shown
from sst2_xlmr.task import Task
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import versions

Metrics = Mapping[str, dict[str, Any]]  # by split
_HUB_NAMES = {"xlmr.base": "FacebookAI/xlm-roberta-base", "xlmr.large": "FacebookAI/xlm-roberta-large"}
_CHOSEN = "\nThese weights were chosen by their {} on dev, which is therefore slightly optimistic.\n"
_LONG = {
    "head-tail": "\nOf texts that are too long, it was trained on the beginning and the end; the pipeline takes only"
    " the beginning.\n",
    "windows": "\nLong texts were read in windows, whose features are averaged; the pipeline takes only the first one."
    " sst2_xlmr and its ONNX export read all of them, as in training.\n",
}
_NOT_SCALED = """
The probabilities are calibrated: temperature 1, as no other is significantly better on dev; their expected calibration\
 error there is {1:.4f}.
"""
_SCALED = """
The probabilities are calibrated: the last layer is divided by a temperature of {0:.3f}, fitted on dev, where\
 it takes the expected calibration error from {1:.4f} to {2:.4f}.
"""


def card_text(
    config: Config, task: Task, state: TrainState, rows: Mapping[str, int], evaluations: Metrics, is_best: bool = False
) -> str:
    """Return the card's text, with each split's number of rows, and of these weights its metrics.

    With --calibrate, the state has the temperature and its calibration errors. `is_best`: of several evaluations.
    """
    encoder, names, results = _HUB_NAMES.get(config.encoder, Path(config.encoder).name), task.label_names, []
    eval_files = [str(named_file(value)[1]) for value in config.eval_file]
    files = [config.data_dir, *config.train_file, config.dev_file, *eval_files, *config.test_file]
    table: list[Iterable[str]] = []
    for split, metrics in evaluations.items():
        row = {"file": Path(split).name, "rows": f"{metrics['rows']:,}", **task.table_cells(metrics)}
        table = table or [[*row, "loss"], ["---"] * (len(row) + 1)]
        table.append([*row.values(), f"{metrics['loss']:.4f}"])
        dataset = dict.fromkeys(("name", "type", "split"), Path(split).name)
        scores = [{"type": kind, "name": name, "value": metrics[key]} for key, (kind, name) in task.hub_metrics.items()]
        results.append({"task": {"type": "text-classification"}, "dataset": dataset, "metrics": scores})
    # From this line of the header, in JSON, which is also YAML, the Hub shows the metrics.
    index = json.dumps([{"name": f"{encoder}-classifier", "results": results}], ensure_ascii=False)
    settings = []  # that affect the result: those that --resume may change do not
    for name in (*GROUPS["data"], *GROUPS["model"], *GROUPS["training"], "precision"):
        value = getattr(config, name)
        if value is not None and not OPTIONS[name].metadata["changeable"]:
            text = ("off", "on")[value] if isinstance(value, bool) else shown(value)
            settings.append([f"`{flag(name)}`", text.replace("|", "\\|").replace("\n", " ")])
    remarks = _CHOSEN.format(config.best_by or task.best_metric) if is_best else ""
    remarks += f"\n{task.card_note}\n" if task.card_note else ""
    remarks += _LONG.get(config.long_texts, "")
    if config.calibrate:
        remark = _NOT_SCALED if state.temperature == 1 else _SCALED
        remarks += remark.format(state.temperature, state.ece_before, state.ece_after)
    return Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).substitute(
        metric_types=", ".join(dict.fromkeys(kind for kind, _ in task.hub_metrics.values())),
        base_model=f"base_model: {encoder}\n" if config.encoder in _HUB_NAMES else "",
        model_index=f"model-index: {index}\n" if results else "",
        classes=", ".join(names) if len(names) <= 10 else f"{len(names):,} classes",
        encoder=encoder,
        steps=f"{state.step:,}",
        rows=", ".join(f"{count:,} rows {Path(split).name}" for split, count in rows.items()),
        files=", ".join(Path(file).name for file in files if file) or "SST-2 of the GLUE benchmark",
        metrics=_lines(table),
        remarks=remarks,
        settings=_lines(settings),
        versions=versions.versions(),
    )


def _lines(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
