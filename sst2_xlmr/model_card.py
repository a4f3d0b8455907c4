"""The model card, `README.md` in a model's folder: data, settings, metrics, versions; no path of the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sst2_xlmr.config import OPTIONS, Config, flag

_HUB_NAMES = {"xlmr.base": "FacebookAI/xlm-roberta-base", "xlmr.large": "FacebookAI/xlm-roberta-large"}
_PACKAGES = ("torch", "torchtext", "torchdata", "numpy", "safetensors")
_LEFT_OUT = {"output_dir", "tensorboard_dir", "device", "threads", "num_workers", "timeout_minutes", "log_every"}


def last_evaluations(metrics_file: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` that evaluate the model as it was after `step`, the last one per file."""
    found = {}
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "split" in entry and entry["step"] == step:
            found[entry["split"]] = entry
    return list(found.values())


def write_card(
    config: Config,
    label_names: list[str],
    rows: Mapping[str, int],
    evaluations: Iterable[Mapping[str, Any]],
    step: int,
) -> str:
    """Return the card's text, Markdown with the header that the Hugging Face Hub reads.

    Args:
        config: the run's options.
        label_names: the classes 0, 1, ...
        rows: rows of every file that the run read, by its name ("train", "dev", ...).
        evaluations: of these weights, with at least split, rows, accuracy, macro_f1 and loss.
        step: after which the weights are as they are.
    """
    encoder = _HUB_NAMES.get(config.encoder, Path(config.encoder).name)
    base = [f"base_model: {encoder}"] if config.encoder in _HUB_NAMES else []
    files = [Path(config.data_dir).name] if config.data_dir else []
    files += [Path(file).name for file in (config.train_file, config.dev_file, *config.test_file) if file]
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
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("text-classification", "path/of/this/folder")',
        'classify(["A text.", "Another one."], truncation=True)',
        "```",
        "",
        "## Data",
        "",
        f"{', '.join(files) if files else 'SST-2 of the GLUE benchmark'}:"
        f" {', '.join(f'{count:,} rows {_name(split)}' for split, count in rows.items())}.",
        "",
        "## Metrics",
        "",
        *_table(
            ("file", "rows", "accuracy", "macro F1", "loss"),
            [
                (_name(e["split"]), f"{e['rows']:,}", *(f"{e[key]:.4f}" for key in ("accuracy", "macro_f1", "loss")))
                for e in evaluations
            ],
        ),
        "",
        "## Settings",
        "",
        *_table(("option", "value"), _settings(config)),
        "",
        "## Versions",
        "",
        f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {metadata.version(package)}" for package in _PACKAGES),
    ]
    return "\n".join(lines) + "\n"


def _classes(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{len(names):,} classes"


def _name(value: Any) -> str:
    """Return how a value is shown; of a path only its last part."""
    if isinstance(value, list):
        return ", ".join(map(_name, value))
    return Path(value).name if isinstance(value, str) and "/" in value else f"{value}"


def _settings(config: Config) -> list[tuple[str, str]]:
    """Return the options that say how the model came about, as they were, defaults too."""
    values = {name: getattr(config, name) for name in OPTIONS if name not in _LEFT_OUT}
    return [(f"`{flag(name)}`", _cell(_name(value))) for name, value in values.items() if value not in (None, [], "")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
