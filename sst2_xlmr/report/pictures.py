"""A confusion matrix, or a scatter plot of scores, as a PNG file, for TensorBoard.

matplotlib is imported when something is drawn: it takes half a second, and few commands draw. Its global state stays as
it is: no pyplot, and settings (the user's own, too) hold for one picture only.
"""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np

INK, PALE, LINE, BLUE = "#202124", "#6e7278", "#dee1e6", "#1a5fb4"
MOST_NAMED_CLASSES = 20  # with more, names and numbers would not be readable
MOST_LETTERS = 32  # of a name
DOTS_PER_INCH = 100
FONT = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 12, "text.parse_math": False}
FIRST_NOT_DRAWN = "\u0590"  # Latin, Greek, Cyrillic and Armenian come before; matplotlib's font has few others


def can_draw() -> bool:
    """Whether matplotlib is there; without it a run has no pictures."""
    return importlib.util.find_spec("matplotlib") is not None


def confusion_picture(confusion: np.ndarray, label_names: list[str], title: str) -> bytes:
    """Return a confusion matrix, int64 [labels, predictions], as a PNG file.

    A cell's shade, and its second number, is its share of the rows with that label. A class whose name has letters of
    other alphabets is shown by its number.
    """
    import matplotlib.style
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shares", ["white", BLUE])
    classes = len(label_names)
    is_named = classes <= MOST_NAMED_CLASSES
    # Of the matrix, in inches; without names a whole number of pixels to a cell, so that none is left out.
    size = max(2.2, 0.72 * classes) if is_named else classes * max(1, 800 // classes) / DOTS_PER_INCH
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    with matplotlib.style.context(["default", FONT]):
        figure, axes = _axes(size, title, "predicted", "true")
        axes.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.xaxis.set_label_position("top")
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, colors=INK)
        axes.spines[:].set(color=LINE, position=("outward", 1))
        axes.set(xticks=[], yticks=[])
        if is_named:
            names = [_shown(name, f"class {number}") for number, name in enumerate(label_names)]
            is_wide = max(map(len, names)) > 8
            axes.set_xticks(range(classes), names, rotation=40 * is_wide, ha="left" if is_wide else "center")
            axes.set_yticks(range(classes), names)
            edges = np.arange(1, classes) - 0.5
            axes.hlines(edges, -0.5, classes - 0.5, LINE, linewidth=0.8)
            axes.vlines(edges, -0.5, classes - 0.5, LINE, linewidth=0.8)
            for (label, prediction), share in np.ndenumerate(shares):
                count = confusion[label, prediction]
                numbers = f"{count:,}\n{share:.1%}" if count else "0"
                ink = "white" if share > 0.5 else INK if count else PALE
                axes.text(prediction, label, numbers, color=ink, ha="center", va="center", size=8)
        return _png(figure)


def scatter_picture(true: np.ndarray, predicted: np.ndarray, title: str) -> bytes:
    """Return true against predicted scores, float [rows] each, as a PNG file; a line shows where they are equal."""
    import matplotlib.style

    with matplotlib.style.context(["default", FONT]):
        figure, axes = _axes(4, title, "true", "predicted")
        axes.scatter(true, predicted, s=6, color=BLUE, alpha=0.4, linewidths=0)
        axes.axline((float(true.mean()), float(true.mean())), slope=1, color=LINE, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        return _png(figure)


def _axes(size: float, title: str, x: str, y: str) -> tuple[Any, Any]:
    """Return a figure of so many inches, and its axes; what stands around them makes the picture larger."""
    from matplotlib.figure import Figure

    figure = Figure((size, size), DOTS_PER_INCH)
    axes = figure.add_axes((0, 0, 1, 1))
    drawn = "".join(letter if letter < FIRST_NOT_DRAWN else "?" for letter in title)
    axes.set_title(drawn, color=INK, loc="left", pad=12)
    axes.set_xlabel(x, color=PALE)
    axes.set_ylabel(y, color=PALE)
    return figure, axes


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.15)
    return content.getvalue()


def _shown(name: str, instead: str) -> str:
    """Return the name, cut if it is long, or what stands for one in another alphabet."""
    if max(name, default="") >= FIRST_NOT_DRAWN:
        return instead
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
