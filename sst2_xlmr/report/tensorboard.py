"""What TensorBoard shows of an evaluation besides scalars, a run's hyperparameters, and what a resumed run keeps."""

from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sst2_xlmr.config import OPTIONS, Config
from sst2_xlmr.data.rows import columns_of, read_rows
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.errors import UserError
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import share_below
from sst2_xlmr.files import digest_of

EVENTS_PREFIX = "events.out.tfevents."  # SummaryWriter's
MISTAKES = 50
CURVES = 10
LINE_LENGTH, MOST_LINES = 60, 5
TABLE_TAG = "accuracy by file"
FIRST_COLUMNS = ("batch_size", "encoder", "epochs", "lr", "seed")  # of hyperparameters
SCALARS = ("loss", "accuracy", "macro_f1", "ece")  # of an evaluation
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|&~]")


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder."""
    return sorted(folder.glob(f"{EVENTS_PREFIX}*"))


def event_folder(run_folder: Path, config: Config) -> Path:
    """Return where a run's events go."""
    return Path(config.tensorboard_dir or run_folder / "tensorboard")


def make_event_folder(folder: Path, is_new: bool = True) -> None:
    """Make the folder for events; refuse a new run one with events of another, since TensorBoard would mix the two.

    Raises:
        UserError: for that, or if it cannot be made.
    """
    if is_new and event_files(folder):
        raise UserError(f"{folder} has events of another run; take another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; take another folder") from None


def cut_events(folder: Path, last_step: int, written_again: list[str]) -> None:
    """Remove from a folder's events what a run that goes on after `last_step` will write.

    SummaryWriter's `purge_step` asks TensorBoard to hide it, which its default data server does not do: it hides
    points only of tags that are written again. TensorBoard reads files in the order of their names, which begin with
    the second of the start; if a new one would not be the last (a start in the same second, or on a node whose clock is
    behind), the others are renamed.

    Args:
        written_again: splits that will be evaluated (once more) at `last_step`.
    """
    again = (TABLE_TAG, *(f"{split}/" for split in written_again))

    def is_kept(tag: str, step: int) -> bool:
        is_again = tag.startswith("_hparams_") or (step == last_step and tag.startswith(again))
        return step <= last_step and not is_again

    files = event_files(folder)
    if files and files[-1].name >= f"{EVENTS_PREFIX}{int(time.time()):010}":
        files = [file.rename(folder / f"{EVENTS_PREFIX}{number:010}") for number, file in enumerate(files)]
    for file in files:
        beside = folder / "cut.tmp"  # TensorBoard reads all that has "tfevents" in its name
        beside.unlink(missing_ok=True)
        with beside.open("xb") as opened:
            records = RecordWriter(opened)
            for record in RawEventFileLoader(str(file)).Load():  # ends before a record that was not written whole
                event = Event.FromString(record)
                values = [value for value in event.summary.value if is_kept(value.tag, event.step)]
                if values:
                    del event.summary.value[:]
                    event.summary.value.extend(values)
                if values or not event.HasField("summary"):
                    records.write(event.SerializeToString())
            records.flush()
        beside.replace(file)


def hyperparameters(config: Config) -> dict[str, Any]:
    """Return the options by which runs are compared: those of model and training, and the precision."""
    names = [name for name, field in OPTIONS.items() if field.metadata["group"] in ("model", "training")]
    values = {name: getattr(config, name) for name in [*names, "max_length", "precision"]}
    values["encoder"] = Path(config.encoder).name
    # torch writes a bool as a number, and refuses a list.
    return {name: value if type(value) in (int, float, str) else str(value) for name, value in values.items()}


def begin_hparams(writer: SummaryWriter, config: Config, splits: list[str]) -> None:
    """Write hyperparameters, and which metrics to show beside them; `SummaryWriter.add_hparams` makes a run of its own.

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


def _add_summary(writer: SummaryWriter, summary: Any) -> None:
    assert writer.file_writer is not None
    writer.file_writer.add_summary(summary)


def escape(text: str) -> str:
    """Return Markdown that shows the text as it is, cut if it is long.

    TensorBoard's tables break words of narrow columns in favour of a wide one, so the lines are broken here.
    """
    lines = textwrap.wrap(" ".join(text.split()), LINE_LENGTH) or [""]
    lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " ..."] if len(lines) > MOST_LINES else lines
    return "<br>".join(_MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", line) for line in lines)


def read_texts(file: Path, digest: str, rows: set[int], config: Config) -> dict[int, str]:
    """Return the texts of some rows; none if the file is no longer the one that was tokenized."""
    try:
        if digest_of(file) != digest:
            return {}
        lines = read_rows(file, columns_of(config), config.classes)
        found = ((row, line) for row, line in enumerate(lines) if row in rows)
        return {row: line.text if line.pair is None else f"{line.text} / {line.pair}" for row, line in found}
    except (OSError, UserError):  # it is being changed just now
        return {}


def mistakes_table(probabilities: np.ndarray, cache: TokenCache, file: Path, config: Config) -> str:
    """Return the mistakes that the model is surest of as a Markdown table; texts are read from the file.

    Args:
        probabilities: float32 [rows, labels].
        cache: of the file.
    """
    predictions = probabilities.argmax(-1)
    wrong = np.flatnonzero(predictions != cache.labels)
    confidences = probabilities[wrong, predictions[wrong]]
    chosen = wrong[np.argsort(-confidences, kind="stable")[:MISTAKES]].tolist()
    texts = read_texts(file, cache.digest, set(chosen), config)
    names = [escape(name) for name in config.classes]
    lines = [f"{len(wrong):,} of {len(cache):,} rows are mistaken; of these the {len(chosen)} surest.", ""]
    lines += ["| row | text | true | predicted | probability |", "| ---: | --- | --- | --- | ---: |"]
    for row in chosen:
        label, prediction = int(cache.labels[row]), int(predictions[row])
        text = escape(texts[row]) if row in texts else "(the file has changed)"
        share = f"{probabilities[row, prediction]:.4f}"
        lines.append(f"| {row + 1} | {text} | {names[label]} | {names[prediction]} | {share} |")
    return "\n".join(lines)


def draw_evaluation(
    writer: SummaryWriter, step: int, split: str, found: Evaluation, cache: TokenCache, file: Path, config: Config
) -> None:
    """Write confusion matrix, precision-recall curves and the mistakes that the model is surest of.

    Args:
        found: with probabilities.
        cache: of the evaluated file.
    """
    from sst2_xlmr.report.pictures import confusion_picture  # loads matplotlib

    assert found.probabilities is not None
    names = config.classes
    title = f"{split}{_at(step)}: accuracy {found.metrics['accuracy']:.4f}, {len(cache):,} rows"
    writer.add_image(f"{split}/confusion", confusion_picture(found.confusion, names, title), step, dataformats="HWC")
    for number in [1] if len(names) == 2 else range(min(len(names), CURVES)):
        # A curve has 127 equally spaced thresholds. Most probabilities lie near 0 and 1, where few of them are; ranks
        # are spread evenly, and give the same curve.
        ranks = share_below(found.probabilities[:, number])
        writer.add_pr_curve(f"{split}/pr_{names[number]}", np.asarray(cache.labels) == number, ranks, step)
    writer.add_text(f"{split}/mistakes", mistakes_table(found.probabilities, cache, file, config), step)


def draw_table(writer: SummaryWriter, step: int, found: dict[str, dict[str, Any]]) -> None:
    """Write a picture of several files' accuracy.

    Args:
        found: metrics by the files' names.
    """
    from sst2_xlmr.report.pictures import table_picture  # loads matplotlib

    picture = table_picture(found, f"accuracy by file{_at(step)}")
    writer.add_image(TABLE_TAG, picture, step, dataformats="HWC")


def _at(step: int) -> str:
    """Return words for a title; a model that is evaluated after its training has step 0, which says nothing."""
    return f", step {step:,}" if step else ""
