"""The model card, `README.md` in a model's folder: data, settings, metrics, versions; no path of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sst2_xlmr.config import GROUPS, OPTIONS, Config, flag, named_file, shown
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.training.state import Progress
from sst2_xlmr.util import versions

_HUB_NAMES = {"xlmr.base": "FacebookAI/xlm-roberta-base", "xlmr.large": "FacebookAI/xlm-roberta-large"}
_USAGE = """```python
from transformers import pipeline

classify = pipeline("text-classification", "path/of/this/folder")
classify(["A text.", "Another one."], truncation=True)
```"""


def last_evaluations(metrics_file: Path, step: int) -> list[dict[str, Any]]:
    """Return the last evaluation per file of the model after `step`, from `metrics.jsonl`."""
    newest = {}
    for entry in read_metrics(metrics_file):
        if "split" in entry and entry["step"] == step:
            newest[entry["split"]] = entry
    return list(newest.values())


def card_text(
    config: Config,
    label_names: list[str],
    rows: Mapping[str, int],
    evaluations: Iterable[Mapping[str, Any]],
    progress: Progress,
    is_chosen: bool = False,
) -> str:
    """Return the card's text, Markdown with the header that the Hugging Face Hub reads.

    Args:
        config: the run's options.
        label_names: the classes 0, 1, ...
        rows: rows of every file that the run read, by its name ("train", "dev", ...).
        evaluations: of these weights, with at least split, rows, accuracy, macro_f1 and loss.
        progress: of the run, whose weights these are.
        is_chosen: whether they were chosen among others by their accuracy on dev.
    """
    step = progress.step
    encoder = _HUB_NAMES.get(config.encoder, Path(config.encoder).name)
    base = [f"base_model: {encoder}"] if config.encoder in _HUB_NAMES else []
    results = [
        (Path(e["split"]).name, f"{e['rows']:,}", *(f"{e[key]:.4f}" for key in ("accuracy", "macro_f1", "loss")))
        for e in evaluations
    ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "language: multilingual",
        *base,
        "tags: [text-classification, xlm-roberta]",
        "metrics: [accuracy, f1]",
        "---",
        "",
        f"# Text classifier: {_classes(label_names)}",
        "",
        f"{encoder}, fine-tuned with sst2_xlmr for {step:,} steps.",
        "",
        _USAGE,
        "",
        "## Data",
        "",
        f"{', '.join(f'{count:,} rows {Path(split).name}' for split, count in rows.items())};"
        f" from {', '.join(_files(config)) or 'SST-2 of the GLUE benchmark'}.",
        "",
        "## Metrics",
        "",
        *_table(("file", "rows", "accuracy", "macro F1", "loss"), results),
        "",
        *_remarks(progress, is_chosen),
        "## Settings",
        "",
        *_table(("option", "value"), _settings(config)),
        "",
        "## Versions",
        "",
        versions.versions(),
    ]
    return "\n".join(lines) + "\n"


def _files(config: Config) -> list[str]:
    """Return the names of the folder and the files that hold the rows; none for the downloaded SST-2."""
    files = [config.data_dir, config.train_file, config.dev_file]
    files += [str(named_file(value)[1]) for value in config.eval_file] + config.test_file
    return [Path(file).name for file in files if file]


def _remarks(progress: Progress, is_chosen: bool) -> list[str]:
    """Return what must be known to read the metrics; each sentence is followed by an empty line."""
    remarks = []
    if is_chosen:
        remarks.append("These weights were chosen by their accuracy on dev, which is therefore a little too high.")
    if progress.collapsed_step:
        remarks.append(
            f"At step {progress.collapsed_step} the run had collapsed: on dev it was hardly better than one label for"
            " all texts."
        )
    if progress.restarts:
        times = "once" if progress.restarts == 1 else f"{progress.restarts} times"
        remarks.append(
            f"Training stopped learning and was begun again {times}, each time with half the rate and another seed; the"
            " settings below are the last ones."
        )
    if progress.calibration:
        temperature, before, after = progress.calibration
        if temperature == 1:
            remarks.append(
                "The probabilities are calibrated: temperature 1, as no other is significantly better on dev; their"
                f" expected calibration error there is {before:.4f}."
            )
        else:
            remarks.append(
                f"The probabilities are calibrated: the last layer is divided by a temperature of {temperature:.3f},"
                f" fitted on dev, where it takes the expected calibration error from {before:.4f} to {after:.4f}."
                " Losses above are without it."
            )
    return [line for remark in remarks for line in (remark, "")]


def _classes(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{len(names):,} classes"


def _settings(config: Config) -> list[tuple[str, str]]:
    """Return the options that affect the result, also defaults, but not those that a resumed run may change."""
    result = []
    for name, field in OPTIONS.items():
        value = getattr(config, name)
        affects_result = name in (*GROUPS["data"], *GROUPS["model"], *GROUPS["training"], "precision")
        if affects_result and not field.metadata["changeable"] and value is not None:
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else shown(value)
            result.append((f"`{flag(name)}`", text.replace("|", "\\|").replace("\n", " ")))
    return result


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
