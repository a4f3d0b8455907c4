"""Pictures for TensorBoard and the docs, drawn with Pillow: a confusion matrix, the accuracy of several files."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sst2_xlmr.evaluation.metrics import mean_of

INK, PALE, LINE = (32, 33, 36), (110, 114, 120), (222, 225, 230)
BLUE, BAR = (26, 95, 180), (129, 167, 214)
MOST_NAMED_CLASSES = 20  # with more, names and numbers would not be readable


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def drawable(name: str, instead: str) -> str:
    """Return the name, or what stands for it: Pillow's own font has no letters but ASCII's."""
    return name if name.isascii() and name.isprintable() else instead


def _fit(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a text so that it is at most so many pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def confusion_picture(confusion: np.ndarray, label_names: list[str], title: str) -> np.ndarray:
    """Draw a confusion matrix; a cell's shade, and its second number, is its share of the rows with that label.

    Args:
        confusion: int64 [labels, predictions].

    Returns:
        uint8 [height, width, 3].
    """
    classes = len(label_names)
    is_named = classes <= MOST_NAMED_CLASSES
    cell = min(108, max(64, 960 // classes)) if is_named else max(1, 800 // classes)
    small, large = _font(max(12, cell // 8)), _font(max(13, cell // 7))
    names = [drawable(name, f"class {number}") for number, name in enumerate(label_names)]
    left = 30 + (round(min(200, max(small.getlength(name) for name in names))) + 12 if is_named else 0)
    top = 66 + (24 if is_named else 0)
    width = max(left + classes * cell + 16, round(large.getlength(title)) + 32)
    picture = Image.new("RGB", (width, top + classes * cell + 16), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((16, 12), title, INK, large)
    draw.text((left + classes * cell / 2, 50), "predicted", PALE, small, anchor="mm")
    sideways = Image.new("RGB", (round(small.getlength("true")) + 4, 20), "white")
    ImageDraw.Draw(sideways).text((2, 2), "true", PALE, small)
    sideways = sideways.rotate(90, expand=True)
    picture.paste(sideways, (6, top + (classes * cell - sideways.height) // 2))
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    shades = (255 + (np.array(BLUE) - 255) * shares[..., None]).round().astype(np.uint8)
    picture.paste(Image.fromarray(shades.repeat(cell, 0).repeat(cell, 1)), (left, top))
    for number, name in enumerate(names if is_named else []):
        middle = (number + 0.5) * cell
        draw.text((left - 8, top + middle), _fit(name, 200, small), INK, small, anchor="rm")
        draw.text((left + middle, top - 14), _fit(name, cell - 6, small), INK, small, anchor="mm")
        for column in range(classes):
            x, y, share = left + column * cell, top + number * cell, shares[number, column]
            ink = "white" if share > 0.5 else INK
            draw.rectangle((x, y, x + cell, y + cell), outline=LINE)
            draw.text((x + cell / 2, y + cell * 0.4), f"{confusion[number, column]:,}", ink, large, anchor="mm")
            draw.text((x + cell / 2, y + cell * 0.68), f"{share:.1%}", ink, small, anchor="mm")
    draw.rectangle((left - 1, top - 1, left + classes * cell, top + classes * cell), outline=LINE)
    return np.asarray(picture)


def table_picture(found: dict[str, dict[str, Any]], title: str) -> np.ndarray:
    """Draw the accuracy of every file as a bar with its interval, numbers beside it, and the mean of several as a line.

    Args:
        found: metrics by the files' names.

    Returns:
        uint8 [height, width, 3].
    """
    font, large, step, bar, top = _font(15), _font(18), 28, 200, 70
    names = [drawable(name, f"file {number}") for number, name in enumerate(found, 1)]
    left = 28 + round(min(200, max(font.getlength(name) for name in [*names, "mean"])))
    columns = [left + bar + gap for gap in (78, 192, 280, 340)]
    picture = Image.new("RGB", (columns[-1] + 16, top + step * (len(found) + (len(found) > 1)) + 12), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((16, 12), title, INK, large)
    for x, head in zip(columns, ("accuracy", "95 % interval", "macro F1", "ECE")):
        draw.text((x, top - 18), head, PALE, font, anchor="rm")
    for tick in (0, 0.5, 1):
        at = left + tick * bar
        draw.text((at, top - 18), f"{tick:g}", PALE, font, anchor="mm")
        draw.line((at, top - 6, at, top + step * len(found)), LINE)
    for number, (name, metrics) in enumerate(zip(names, found.values())):
        y = top + (number + 0.5) * step
        low, high = (left + metrics[key] * bar for key in ("accuracy_low", "accuracy_high"))
        draw.text((left - 12, y), _fit(name, 200, font), INK, font, anchor="rm")
        draw.rectangle((left, y - 8, left + metrics["accuracy"] * bar, y + 8), BAR)
        draw.line((low, y, high, y), INK, 2)
        for end in (low, high):
            draw.line((end, y - 5, end, y + 5), INK, 2)
        interval = f"{metrics['accuracy_low']:.2f} - {metrics['accuracy_high']:.2f}"
        numbers = (f"{metrics['accuracy']:.4f}", interval, f"{metrics['macro_f1']:.4f}", f"{metrics['ece']:.3f}")
        for x, text in zip(columns, numbers):
            draw.text((x, y), text, INK, font, anchor="rm")
    if len(found) > 1:
        mean, y = mean_of(list(found.values())), top + (len(found) + 0.5) * step
        draw.line((16, y - step / 2, columns[-1], y - step / 2), PALE)
        draw.text((left - 12, y), "mean", INK, font, anchor="rm")
        at = left + mean["accuracy"] * bar
        draw.line((at, top - 6, at, y + 8), BLUE, 2)
        numbers = (f"{mean['accuracy']:.4f}", "", f"{mean['macro_f1']:.4f}", f"{mean['ece']:.3f}")
        for x, text in zip(columns, numbers):
            draw.text((x, y), text, INK, font, anchor="rm")
    return np.asarray(picture)
