"""What TensorBoard shows of a run besides curves: pictures and texts of evaluations, and hyperparameters."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sst2_xlmr.config import GROUPS, Config
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import share_below
from sst2_xlmr.report.mistakes import EvaluatedFile, mistakes_table
from sst2_xlmr.report.pictures import accuracy_picture, can_draw, confusion_picture

CURVES = 10
TABLE_TAG = "accuracy by file"
FIRST_COLUMNS = ("batch_size", "encoder", "epochs", "lr", "seed")  # of hyperparameters
SCALARS = ("loss", "accuracy", "macro_f1", "ece")  # of an evaluation


def hyperparameters(config: Config) -> dict[str, Any]:
    """Return the options by which runs are compared: those of model and training, and the precision."""
    names = [*GROUPS["model"], *GROUPS["training"], "max_length", "precision"]
    values = {name: getattr(config, name) for name in names}
    values["encoder"] = Path(config.encoder).name
    # torch writes a bool as a number, and refuses a list.
    return {name: value if type(value) in (int, float, str) else str(value) for name, value in values.items()}


def begin_hparams(writer: SummaryWriter, config: Config, splits: list[str]) -> None:
    """Write hyperparameters, and which metrics to show with them; `SummaryWriter.add_hparams` makes a run of its own.

    Args:
        splits: that are evaluated, dev among them.
    """
    tags = ["dev/accuracy", "dev/macro_f1", "dev/loss"]
    tags += [f"{split}/accuracy" for split in splits if split != "dev"]
    experiment, start, _ = hparams(hyperparameters(config), dict.fromkeys(tags, 0.0))
    # TensorBoard shows five columns unless asked for more, first those that differ between runs: here, we say which.
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in FIRST_COLUMNS
    plugin.content = data.SerializeToString()
    for summary in (experiment, start):
        _add_summary(writer, summary)


def end_hparams(writer: SummaryWriter) -> None:
    """Mark the run as finished."""
    _add_summary(writer, hparams({}, {})[2])


def _add_summary(writer: SummaryWriter, summary: Any, step: int | None = None) -> None:
    assert writer.file_writer is not None
    writer.file_writer.add_summary(summary, step)


def _add_picture(writer: SummaryWriter, tag: str, png: bytes, step: int) -> None:
    """Write a PNG file as it is; `SummaryWriter.add_image` would take pixels and compress them once more."""
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)  # 4: RGBA
    _add_summary(writer, Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def draw_evaluation(writer: SummaryWriter, step: int, file: EvaluatedFile, evaluation: Evaluation) -> None:
    """Write confusion matrix, precision-recall curves and the mistakes that the model is surest of.

    Args:
        evaluation: with probabilities.
    """
    assert evaluation.probabilities is not None
    classes, labels = file.config.classes, np.asarray(file.cache.labels)
    title = f"{file.name}{_at(step)}: accuracy {evaluation.metrics['accuracy']:.4f}, {len(labels):,} rows"
    if can_draw():
        _add_picture(writer, f"{file.name}/confusion", confusion_picture(evaluation.confusion, classes, title), step)
    for number in [1] if len(classes) == 2 else range(min(len(classes), CURVES)):
        # A curve has 127 equally spaced thresholds. Most probabilities lie near 0 and 1, where few of them are; ranks
        # are spread evenly, and give the same curve.
        ranks = share_below(evaluation.probabilities[:, number])
        writer.add_pr_curve(f"{file.name}/pr_{classes[number]}", labels == number, ranks, step)
    writer.add_text(f"{file.name}/mistakes", mistakes_table(file, evaluation.probabilities), step)


def draw_accuracy(writer: SummaryWriter, step: int, metrics_by_file: dict[str, dict[str, Any]]) -> None:
    """Write a picture of several files' accuracy."""
    if can_draw():
        _add_picture(writer, TABLE_TAG, accuracy_picture(metrics_by_file, f"accuracy by file{_at(step)}"), step)


def _at(step: int) -> str:
    """Return words for a title; a model that is evaluated after its training has step 0, which says nothing."""
    return f", step {step:,}" if step else ""
