"""A confusion matrix, or a scatter plot of scores, as a PNG file, for TensorBoard.

matplotlib is imported only for drawing, as it takes half a second. Its global state does not change: pyplot is not
used, and the user's settings are replaced for one plot only.
"""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np

MOST_NAMED_CLASSES = 20  # with more, names and numbers would not be readable
MOST_LETTERS = 32  # of a name
STYLE = {"font.family": "DejaVu Sans", "text.parse_math": False, "savefig.dpi": 100, "savefig.bbox": "tight"}
FIRST_NOT_DRAWN = "\u0590"  # matplotlib's font has few letters beyond Latin, Greek, Cyrillic and Armenian


def can_draw() -> bool:
    """Whether matplotlib is installed; without it, a run has no plots."""
    return importlib.util.find_spec("matplotlib") is not None


def confusion_picture(confusion: np.ndarray, label_names: list[str], title: str) -> bytes:
    """Return a confusion matrix, int64 [labels, predictions], as a PNG file.

    A cell's shade, and its second number, is its share of the rows with that label. A class whose name has letters
    beyond `FIRST_NOT_DRAWN` is shown by its number.
    """
    import matplotlib.style

    classes = len(label_names)
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _axes(max(3.0, min(0.75 * classes, 15.0)), title, "predicted", "true")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set(xticks=[], yticks=[])
        if classes <= MOST_NAMED_CLASSES:
            names = [_shown(name, f"class {number}") for number, name in enumerate(label_names)]
            is_wide = max(map(len, names)) > 8
            axes.set_xticks(range(classes), names, rotation=40 * is_wide, ha="left" if is_wide else "center")
            axes.set_yticks(range(classes), names)
            for (label, prediction), share in np.ndenumerate(shares):
                count = confusion[label, prediction]
                numbers, color = f"{count:,}\n{share:.1%}" if count else "0", "white" if share > 0.5 else "black"
                axes.text(prediction, label, numbers, color=color, ha="center", va="center", size=8)
        return _png(figure)


def scatter_picture(true: np.ndarray, predicted: np.ndarray, title: str) -> bytes:
    """Return true against predicted scores, float [rows] each, as a PNG file, with the line where they are equal."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        figure, axes = _axes(4.0, title, "true", "predicted")
        axes.scatter(true, predicted, s=6, alpha=0.4)
        axes.axline((float(true.mean()), float(true.mean())), slope=1, color="lightgray", zorder=0)
        return _png(figure)


def _axes(size: float, title: str, x: str, y: str) -> tuple[Any, Any]:
    """Return a figure of `size` inches and its axes; labels around them make the picture larger."""
    from matplotlib.figure import Figure

    figure = Figure((size, size))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_title("".join(letter if letter < FIRST_NOT_DRAWN else "?" for letter in title), loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _shown(name: str, substitute: str) -> str:
    """Return a name, truncated if it is long, or the substitute if the font lacks its letters."""
    if max(name, default="") >= FIRST_NOT_DRAWN:
        return substitute
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
