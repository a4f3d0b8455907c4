"""TensorBoard events of a run: scalars, plots and texts of evaluations, and hyperparameters.

All functions that take a writer raise OSError if the disk is full; all but `draw_evaluation` flush what they write.
"""

import io
import itertools
import re
import struct
import textwrap
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sst2_xlmr.config import GROUPS, Config
from sst2_xlmr.data.prepare import Split
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.task import Task

CURVES = 10
MISTAKES = 50
LINE_LENGTH, MAX_LINES = 60, 5
MAX_NAMED_CLASSES = 20  # in a plot; with more, names and numbers would not be readable
MAX_LETTERS = 32  # of a name in a plot
STYLE = {"font.family": "DejaVu Sans", "text.parse_math": False, "savefig.dpi": 100, "savefig.bbox": "tight"}
FIRST_NOT_DRAWN = "\u0590"  # matplotlib's font has few letters beyond Latin, Greek, Cyrillic and Armenian
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>|&~]")
_excepthook = threading.excepthook
TextsOf = Callable[[set[int]], dict[int, str]]  # see `Split.texts_at`


def open_events(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    """Open a new event file in a folder; TensorBoard then hides what older files have from `purge_step` on.

    It reads files in the order of their names, which begin with the second of the start: no two may share a second.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.02)

    def hide_writer_errors(arguments: threading.ExceptHookArgs) -> None:
        """Suppress tracebacks from SummaryWriter's thread: `flush` raises its error again in the calling thread."""
        is_writers = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writers and isinstance(arguments.exc_value, OSError)):
            _excepthook(arguments)

    threading.excepthook = hide_writer_errors
    return SummaryWriter(str(folder), purge_step=purge_step)


def write_hparams(writer: SummaryWriter, config: Config, precision: str, task: Task, splits: list[str]) -> None:
    """Write the options by which runs are compared, and the metrics of the evaluated splits to show beside them.

    `precision` is the one in use, never auto. `SummaryWriter.add_hparams` would create another run.
    """
    values = {name: getattr(config, name) for name in [*GROUPS["model"], *GROUPS["training"], "max_length"]}
    values |= {"precision": precision, "encoder": Path(config.encoder).name}
    # torch writes a bool as a number, and rejects a list.
    values = {name: value if type(value) in (int, float, str) else str(value) for name, value in values.items()}
    tags = [f"dev/{name}" for name in dict.fromkeys([task.best_metric, *task.tensorboard_metrics])]
    tags += [f"{split}/{task.best_metric}" for split in splits if split != "dev"]
    for summary in hparams(values, dict.fromkeys(tags, 0.0)):  # the experiment, its start and its end
        _add_summary(writer, summary)
    writer.flush()


def add_scalars(writer: SummaryWriter, step: int, group: str, values: dict[str, float]) -> None:
    """Write a point of each curve `group/name`."""
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)
    writer.flush()


def draw_evaluation(
    writer: SummaryWriter, step: int, name: str, split: Split, labels: np.ndarray, evaluation: Evaluation, task: Task
) -> None:
    """Write the plots, curves and worst mistakes of an evaluation; step 0: of a model evaluated after training."""
    outputs, confusion = evaluation.probabilities, task.confusion(evaluation.results, labels)
    if find_spec("matplotlib"):
        best = f"{task.best_metric} {evaluation.metrics[task.best_metric]:.4f}"
        title = f"{name}{f', step {step:,}' if step else ''}: {best}, {len(labels):,} rows"
        if confusion.size:
            kind, plot = "confusion", confusion_plot(confusion, task.label_names, title)
        else:
            kind, plot = "scores", scatter_plot(labels, outputs[:, 0], title)
        # `SummaryWriter.add_image` would take pixels and compress them once more.
        width, height = struct.unpack(">II", plot[16:24])
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=plot)  # 4: RGBA
        _add_summary(writer, Summary(value=[Summary.Value(tag=f"{name}/{kind}", image=image)]), step)
    for label, is_label, scores in itertools.islice(task.curves(outputs, labels), CURVES):
        # A curve has 127 equally spaced thresholds, few of them near 0 and 1, where most probabilities lie. The
        # probabilities' ranks (shares of rows with a lower one) are spread evenly, and give the same curve.
        ranks = np.searchsorted(np.sort(scores), scores) / len(labels)
        writer.add_pr_curve(f"{name}/pr_{label}", is_label, ranks, step)
    wrong, prediction_of = task.mistakes(outputs, labels)
    table = mistakes_table(wrong, prediction_of, len(labels), lambda at: split.texts_at(task, at), not confusion.size)
    writer.add_text(f"{name}/mistakes", table, step)


def figure_png(draw: Callable[[Any], None], size: float, title: str, x: str, y: str) -> bytes:
    """Return axes of `size` inches as a PNG file; labels around them make it larger.

    matplotlib is imported only here, as it takes half a second. Its global state does not change: pyplot is not used,
    and the user's settings are replaced for one plot only.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((size, size))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_title("".join(letter if letter < FIRST_NOT_DRAWN else "?" for letter in title), loc="left")
        axes.set(xlabel=x, ylabel=y)
        draw(axes)
        figure.savefig(content, format="png")
    return content.getvalue()


def confusion_plot(confusion: np.ndarray, label_names: list[str], title: str) -> bytes:
    """Return a confusion matrix, int64 [labels, predictions], as a PNG file.

    A cell's shade, and its second number, is its share of the rows with that label. A class whose name has letters
    beyond `FIRST_NOT_DRAWN` is shown by its number.
    """
    classes, names = len(label_names), []
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    for number, name in enumerate(label_names):
        shown = name if len(name) <= MAX_LETTERS else name[: MAX_LETTERS - 1] + "…"
        names.append(f"class {number}" if max(name, default="") >= FIRST_NOT_DRAWN else shown)

    def draw(axes: Any) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set(xticks=[], yticks=[])
        if classes > MAX_NAMED_CLASSES:
            return
        is_wide = max(map(len, names)) > 8
        axes.set_xticks(range(classes), names, rotation=40 * is_wide, ha="left" if is_wide else "center")
        axes.set_yticks(range(classes), names)
        for (label, prediction), share in np.ndenumerate(shares):
            count = confusion[label, prediction]
            numbers, color = f"{count:,}\n{share:.1%}" if count else "0", "white" if share > 0.5 else "black"
            axes.text(prediction, label, numbers, color=color, ha="center", va="center", size=8)

    return figure_png(draw, max(3.0, min(0.75 * classes, 15.0)), title, "predicted", "true")


def scatter_plot(true: np.ndarray, predicted: np.ndarray, title: str) -> bytes:
    """Return true against predicted scores, float [rows] each, as a PNG file, with the line where they are equal."""

    def draw(axes: Any) -> None:
        axes.scatter(true, predicted, s=6, alpha=0.4)
        axes.axline((float(true.mean()), float(true.mean())), slope=1, color="lightgray", zorder=0)

    return figure_png(draw, 4.0, title, "true", "predicted")


def mistakes_table(
    wrong: np.ndarray, prediction_of: Callable[[int], list[str]], rows: int, texts_of: TextsOf, are_scores: bool = False
) -> str:
    """Return the most confident mistakes, or largest errors, as a Markdown table; see `SingleLabel.mistakes`."""
    chosen = wrong[:MISTAKES].tolist()
    texts = texts_of(set(chosen))
    title = f"{len(wrong):,} of {rows:,} rows are wrong; these are the {len(chosen)} most confident."
    if are_scores:
        title = f"The {len(chosen)} largest errors of {rows:,} rows."
    lines = [title, "", f"| row | text | true | predicted | {'error' if are_scores else 'probability'} |"]
    lines.append("| ---: | --- | --- | --- | ---: |")
    for row in chosen:
        text = escape(texts[row]) if row in texts else "(the file has changed)"
        lines.append(f"| {row + 1} | {text} | {' | '.join(map(escape, prediction_of(row)))} |")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return Markdown that shows a text literally: truncated, with line breaks, as TensorBoard wraps no cells."""
    lines = textwrap.wrap(" ".join(text.split()), LINE_LENGTH, max_lines=MAX_LINES, placeholder=" ...")
    return "<br>".join(_MARKDOWN.sub(lambda match: f"&#{ord(match[0])};", line) for line in lines)


def _add_summary(writer: SummaryWriter, summary: Any, step: int | None = None) -> None:
    assert writer.file_writer is not None
    writer.file_writer.add_summary(summary, step)
