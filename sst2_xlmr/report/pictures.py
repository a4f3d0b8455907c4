"""Pictures for TensorBoard and the docs: a confusion matrix, the accuracy of several files. Import this to draw only.

matplotlib takes half a second to load. Its canvas is used directly, so that nothing global is set.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from sst2_xlmr.evaluation.metrics import mean_of

INK, PALE, LINE = "#202124", "#6e7278", "#dee1e6"
BLUE, BAR = "#1a5fb4", "#81a7d6"
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", BLUE])
DPI = 100
MOST_NAMED_CLASSES = 20  # with more, names and numbers would not be readable
LONGEST_NAME = 24  # characters
# matplotlib's own font comes first; it has Latin, Greek, Cyrillic, Arabic and Hebrew letters. The others are used for
# what it lacks, where the system has them.
FONTS = (
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Malgun Gothic"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI", "Leelawadee UI", "Droid Sans Fallback", "FreeSans"),
    "Arial Unicode MS",
)

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it builds its list of fonts, once, is no news


@functools.lru_cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Return the names of the fonts that are there, and the letters that they have."""
    files = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist if entry.name in FONTS}
    present = [name for name in FONTS if name in files]
    letters = (font_manager.get_font(files[name]).get_charmap() for name in present)
    return present, frozenset(letter for charmap in letters for letter in charmap)


def _font(size: float) -> FontProperties:
    return FontProperties(family=_fonts()[0], size=size)


def drawable(name: str, instead: str) -> str:
    """Return a name, cut if it is long, or what stands for it if no font has its letters."""
    _, letters = _fonts()
    if not name.isprintable() or any(ord(letter) not in letters for letter in name):
        return instead
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of so many pixels, and axes that measure pixels from its upper left corner."""
    figure = Figure((width / DPI, height / DPI), DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _pixels(figure: Figure) -> np.ndarray:
    """Draw; returns uint8 [height, width, 3]."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def confusion_picture(confusion: np.ndarray, label_names: Sequence[str], title: str) -> np.ndarray:
    """Draw a confusion matrix; a cell's shade, and its second number, is its share of the rows with that label.

    Args:
        confusion: int64 [labels, predictions].

    Returns:
        uint8 [height, width, 3].
    """
    classes = len(label_names)
    is_named = classes <= MOST_NAMED_CLASSES
    names = [drawable(name, f"class {number}") for number, name in enumerate(label_names)] if is_named else []
    cell = min(108, max(64, 960 // classes)) if is_named else max(1, 800 // classes)
    small, large = _font(max(8, cell / 12)), _font(max(9, cell / 10))
    left = 34 + (12 + 8 * max(map(len, names)) if is_named else 0)
    top = 66 + (24 if is_named else 0)
    side = classes * cell
    figure, axes = _canvas(max(left + side + 16, 32 + 9 * len(title)), top + side + 16)
    axes.text(16, 22, title, color=INK, font=large, va="center")
    axes.text(left + side / 2, 50, "predicted", color=PALE, font=small, ha="center", va="center")
    axes.text(18, top + side / 2, "true", color=PALE, font=small, ha="center", va="center", rotation=90)
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    extent = (left, left + side, top + side, top)
    axes.imshow(shares, SHADES, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    axes.set(xlim=(0, figure.bbox.width), ylim=(figure.bbox.height, 0))  # imshow has changed them
    for number, name in enumerate(names):
        middle = (number + 0.5) * cell
        axes.text(left - 8, top + middle, name, color=INK, font=small, ha="right", va="center")
        column_name = axes.text(left + middle, top - 14, name, color=INK, font=small, ha="center", va="center")
        column_name.set_text(name if 8 * len(name) <= cell else name[: cell // 8 - 1] + "…")
        for column in range(classes):
            x, share = left + (column + 0.5) * cell, shares[number, column]
            ink = "white" if share > 0.5 else INK
            y, count = top + number * cell, f"{confusion[number, column]:,}"
            axes.text(x, y + 0.4 * cell, count, color=ink, font=large, ha="center", va="center")
            axes.text(x, y + 0.68 * cell, f"{share:.1%}", color=ink, font=small, ha="center", va="center")
    for line in range(classes + 1) if is_named else (0, classes):
        axes.plot([left, left + side], [top + line * cell] * 2, color=LINE, linewidth=0.7)
        axes.plot([left + line * cell] * 2, [top, top + side], color=LINE, linewidth=0.7)
    return _pixels(figure)


def table_picture(metrics_by_file: dict[str, dict[str, Any]], title: str) -> np.ndarray:
    """Draw the accuracy of every file as a bar with its interval, numbers beside it, and the mean of several as a line.

    Returns:
        uint8 [height, width, 3].
    """
    font, large, step, bar, top = _font(10), _font(12), 28, 200, 70
    names = [drawable(name, f"file {number}") for number, name in enumerate(metrics_by_file, 1)]
    rows, has_mean = len(names), len(names) > 1
    left = 28 + 9 * max(map(len, [*names, "mean"]))
    columns = [left + bar + gap for gap in (78, 200, 288, 348)]
    figure, axes = _canvas(columns[-1] + 16, top + step * (rows + has_mean) + 12)

    def write(x: float, y: float, text: str, color: str = INK, ha: str = "right") -> None:
        axes.text(x, y, text, color=color, font=font, ha=ha, va="center")

    axes.text(16, 22, title, color=INK, font=large, va="center")
    for x, head in zip(columns, ("accuracy", "95 % interval", "macro F1", "ECE")):
        write(x, top - 18, head, PALE)
    for tick in (0, 0.5, 1):
        write(left + tick * bar, top - 18, f"{tick:g}", PALE, "center")
        axes.plot([left + tick * bar] * 2, [top - 6, top + step * rows], color=LINE, linewidth=0.7)
    for number, (name, metrics) in enumerate(zip(names, metrics_by_file.values())):
        y = top + (number + 0.5) * step
        low, high = (left + metrics[key] * bar for key in ("accuracy_low", "accuracy_high"))
        axes.barh(y, metrics["accuracy"] * bar, 16, left, color=BAR)
        axes.plot([low, low, low, high, high, high], [y - 5, y + 5, y, y, y - 5, y + 5], color=INK, linewidth=1.2)
        interval = f"{metrics['accuracy_low']:.2f} - {metrics['accuracy_high']:.2f}"
        numbers = (f"{metrics['accuracy']:.4f}", interval, f"{metrics['macro_f1']:.4f}", f"{metrics['ece']:.3f}")
        for x, text in zip((left - 12, *columns), (name, *numbers)):
            write(x, y, text)
    if has_mean:
        mean, y = mean_of(list(metrics_by_file.values())), top + (rows + 0.5) * step
        axes.plot([16, columns[-1]], [y - step / 2] * 2, color=PALE, linewidth=0.7)
        axes.plot([left + mean["accuracy"] * bar] * 2, [top - 6, y + 8], color=BLUE, linewidth=1.6)
        numbers = (f"{mean['accuracy']:.4f}", "", f"{mean['macro_f1']:.4f}", f"{mean['ece']:.3f}")
        for x, text in zip((left - 12, *columns), ("mean", *numbers)):
            write(x, y, text)
    axes.set(xlim=(0, figure.bbox.width), ylim=(figure.bbox.height, 0))
    return _pixels(figure)
