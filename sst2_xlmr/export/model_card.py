"""The model card, `README.md` in a model's folder: data, settings, metrics, versions; no path of the machine.

Its text is `model_card.md`, Markdown with the header that the Hugging Face Hub reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from sst2_xlmr.config import OPTIONS, Config, flag, named_file, shown
from sst2_xlmr.evaluation.calibration import Calibration
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util import versions

_HUB_NAMES = {"xlmr.base": "FacebookAI/xlm-roberta-base", "xlmr.large": "FacebookAI/xlm-roberta-large"}
_CHOSEN = "\nThese weights were chosen by their accuracy on dev, which is therefore slightly optimistic.\n"
_NOT_SCALED = """
The probabilities are calibrated: temperature 1, as no other is significantly better on dev; their expected calibration\
 error there is {before:.4f}.
"""
_SCALED = """
The probabilities are calibrated: the last layer is divided by a temperature of {temperature:.3f}, fitted on dev, where\
 it takes the expected calibration error from {before:.4f} to {after:.4f}. Losses above are without it.
"""


def last_evaluations(metrics_file: Path, step: int) -> list[dict[str, Any]]:
    """Return the last evaluation per file of the model after `step`, from `metrics.jsonl`."""
    entries = [entry for entry in read_metrics(metrics_file) if "split" in entry and entry["step"] == step]
    return list({entry["split"]: entry for entry in entries}.values())


def card_text(
    config: Config,
    rows: Mapping[str, int],
    evaluations: Iterable[Mapping[str, Any]],
    step: int,
    calibration: Calibration | None = None,
    is_chosen: bool = False,
) -> str:
    """Return the card's text.

    Args:
        config: the run's options.
        rows: rows of every file that the run read, by its name ("train", "dev", ...).
        evaluations: of these weights, with at least split, rows, accuracy, macro_f1 and loss.
        step: optimizer steps that led to these weights.
        calibration: of the probabilities; None if that was not asked for.
        is_chosen: whether the weights were chosen among others by their accuracy on dev.
    """
    encoder = _HUB_NAMES.get(config.encoder, Path(config.encoder).name)
    names = config.classes
    eval_files = [str(named_file(value)[1]) for value in config.eval_file]
    files = [config.data_dir, config.train_file, config.dev_file, *eval_files, *config.test_file]
    metrics = [
        _line(Path(e["split"]).name, f"{e['rows']:,}", *(f"{e[key]:.4f}" for key in ("accuracy", "macro_f1", "loss")))
        for e in evaluations
    ]
    remarks = _CHOSEN if is_chosen else ""
    if calibration:
        temperature, before, after = calibration
        remark = _NOT_SCALED if temperature == 1 else _SCALED
        remarks += remark.format(temperature=temperature, before=before, after=after)
    return Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).substitute(
        base_model=f"base_model: {encoder}\n" if config.encoder in _HUB_NAMES else "",
        classes=", ".join(names) if len(names) <= 10 else f"{len(names):,} classes",
        encoder=encoder,
        steps=f"{step:,}",
        rows=", ".join(f"{count:,} rows {Path(split).name}" for split, count in rows.items()),
        files=", ".join(Path(file).name for file in files if file) or "SST-2 of the GLUE benchmark",
        metrics="\n".join(metrics),
        remarks=remarks,
        settings="\n".join(_settings(config)),
        versions=versions.versions(),
    )


def _settings(config: Config) -> Iterable[str]:
    """Yield lines with the options that affect the result, also defaults; not those that a resumed run may change."""
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        affects_result = option.metadata["group"] in ("data", "model", "training") or name == "precision"
        if affects_result and not option.metadata["changeable"] and value is not None:
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else shown(value)
            yield _line(f"`{flag(name)}`", text.replace("|", "\\|").replace("\n", " "))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
