"""Labels as they stand in files: how a cell is read, which classes there are, and what number each one has.

What a label means for training is said in task.py.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from sst2_xlmr.config import MAX_CLASSES
from sst2_xlmr.util.errors import UserError

_INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")
_DELIMITERS = re.compile(r"[,;|]")
_NUMPY = re.compile(r"\[[\s0-9.]*\]")
_INVISIBLE = re.compile(r"[\W_]")  # what labels that mean the same may differ by
# What files have for no label, as pandas, R, MySQL, SNLI, ... write it. `none` and `NONE` are classes in some.
MISSING = {*("", "-", "?", "NULL", "null", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "None", "\\N")}


def find_label_names(found: Mapping[str, Sequence[int]], path: object) -> list[str]:
    """Return the names of a training file's classes, in the order of their numbers.

    Integers are in numerical, words in alphabetical order. `found` has rows and first line of every label, by
    `label_text`. UserError, with the file's path, if there are fewer than two or more than `MAX_CLASSES`, or if
    they are not classes.
    """
    first_lines: dict[str, int] = {}
    for raw, (_, line) in found.items():
        if raw not in MISSING:
            first_lines.setdefault(plain(raw), line)
    integers = [int(label) for label in first_lines if _INTEGER.fullmatch(label)]
    is_from_0 = sorted(integers)[:2] == [-1, 0] or (sorted(integers)[:2] == [-1, 1] and len(integers) > 3)
    if integers == [-1] or (is_from_0 and len(integers) == len(first_lines)):  # beside words, or labels from 0
        del first_lines["-1"]
    _check_one_each(first_lines, path)
    return _in_order(first_lines, path)


def listed(names: Sequence[str]) -> str:
    """Return names, separated by commas; of many only the first."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in names[:10]) + more


def _quoted(value: object) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."


# What a cell says of several labels: 1 for those that the row has, or their probabilities; by name, or by position.
LabelValues = dict[Union[str, int], float]


def split_labels(text: str, delimiter: str | None = None, known: Iterable[str] = ()) -> LabelValues | str:
    """Return what a cell says of several labels, or its text if it has one label.

    An object gives every label a number, a list names the labels, or has a number for each: floats, or 0 and 1 more
    than once. JSON is read, and what Python and NumPy print. Anything else is cut at the delimiter, or without one at
    `,`, `;` and `|`, unless it is a label that is `known`.
    """
    found: Any = text
    if text.startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text)
        if found is text:
            literal = f"[{','.join(text[1:-1].split())}]" if _NUMPY.fullmatch(text) else text
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = ast.literal_eval(literal)
    if isinstance(found, dict):
        prefix = "probability_" if all(str(name).startswith("probability_") for name in found) else ""
        return {str(name)[len(prefix) :]: _number(value, text) for name, value in found.items()}
    if isinstance(found, str):
        parts = [] if text in MISSING else text.split(delimiter) if delimiter else _DELIMITERS.split(text)
        if text in known or (len(parts) == 1 and not delimiter):
            return text
        return {plain(part.strip()): 1.0 for part in parts if part.strip()}
    values = list(found)
    if any(isinstance(each, float) for each in values) or (len(set(map(str, values))) < len(values)):
        return {place: _number(value, text) for place, value in enumerate(values)}
    return {label_text(each): 1.0 for each in values}


def _number(value: object, text: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"label {_quoted(text)}: {_quoted(value)} is not a number") from None


def unknown_labels(labels: Sequence[str], names: Sequence[str], numbers: Mapping[str, int]) -> str:
    """Return, for an error, what is wrong with labels that are none of the classes, and the cure."""
    shown, known = ", ".join(_quoted(label) for label in labels[:10]), f"of {listed(names)}"
    counted = [int(label) for label in numbers if label not in names]
    if counted:
        known += f" nor a number from {min(counted)} to {max(counted)}"
    cure = ""
    if all(_INTEGER.fullmatch(plain(label)) for label in labels):
        cure = "; numbers stand for names only with --label-names, the names in the order of the numbers"
    elif set(map(_key, labels)) <= set(map(_key, names)):
        cure = "; they differ by case, spaces or signs only: write them alike"
    is_one = ("is" if len(labels) == 1 else "are") + (" neither" if counted else " not")
    of_what = "the classes of the training file or of --label-names"
    return f"label{'s' * (len(labels) > 1)} {shown} {is_one} one {known}, {of_what}{cure}"


def numbers_by_label(names: Sequence[str], standing: Mapping[str, int] | None) -> dict[str, int]:
    """Return the classes' numbers by their names and by what stands for them, in files: without `standing`, 0, 1, ...

    These stand for LABEL_0, LABEL_1, ..., too: so transformers calls classes without names.
    """
    has_no_names = list(names) == [f"LABEL_{number}" for number in range(len(names))]
    is_open = standing is None and not any(_INTEGER.fullmatch(name) for name in names)
    if not standing and (has_no_names or is_open):
        standing = {str(number): number for number in range(len(names))}
    return {**(standing or {}), **{name: number for number, name in enumerate(names)}}


def is_number(label: str) -> bool:
    return bool(_INTEGER.fullmatch(label) or _FRACTION.fullmatch(label))


def is_fraction(label: str) -> bool:
    return bool(_FRACTION.fullmatch(label)) and plain(label) == label


def label_text(cell: object) -> str:
    """Return a label as text, stripped of spaces: empty for JSON's null and NaN; 3.0 is 3, true is true."""
    if isinstance(cell, str):
        return cell.strip()
    if type(cell) is int:
        return str(cell)
    if isinstance(cell, list) and len(cell) < 2:
        return label_text(cell[0] if cell else None)
    if cell is None or cell != cell:
        return ""
    return plain(json.dumps(cell, ensure_ascii=False, default=str))


def plain(label: str) -> str:
    """Return a whole float as integer, any other label as it is."""
    whole = _WHOLE.fullmatch(label)
    return str(int(whole[1])) if whole and len(whole[1]) < 19 else label


def _key(label: str) -> str:
    if _INTEGER.fullmatch(label) or _FRACTION.fullmatch(label):
        return label
    return _INVISIBLE.sub("", label).casefold() or label


def alike(labels: Iterable[str]) -> list[list[str]]:
    """Return the labels, as they stand in a file, that differ only by case, spaces, signs or what cannot be seen."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_key(plain(label)), []).append(label)
    return [group for group in groups.values() if len({plain(label) for label in group}) > 1]


def notes(labels: Mapping[str, Sequence[int]]) -> list[str]:
    """Return what looks wrong in the labels of a file, which have rows and first line each."""
    found = [f"labels that differ only by case, spaces or signs: {listed(each)}" for each in alike(labels)]
    usable = sum(count for count, _ in labels.values())
    if usable > 20 and len(labels) > usable / 2:
        found.append(f"{len(labels):,} different labels in {usable:,} rows: is that the labels' column?")
    return found


def numbers_for(names: Sequence[str], labels: Iterable[str], path: object) -> tuple[list[str], dict[str, int]]:
    """Return the names of `--label-names`, and the classes' numbers by the integers that stand for them in files.

    Names may say their integers themselves, `1=World`. Else they are in the order of the integers among `labels`, those
    of the file, which begin at 0, at 1, or are all there. UserError if that cannot be told.
    """
    pairs = [match for name in names if (match := re.fullmatch("(-?[0-9]+)=(.+)", name))]
    if len(pairs) == len(names):
        return [pair[2] for pair in pairs], {pair[1]: number for number, pair in enumerate(pairs)}
    bare = {plain(label) for label in labels} - MISSING - set(names)
    integers = sorted(int(label) for label in bare if _INTEGER.fullmatch(label))
    integers = integers[1:] if integers[:2] == [-1, 0] else integers
    count, first = len(names), 0
    if any(_INTEGER.fullmatch(name) for name in names):
        return list(names), {}
    if len(integers) == count:
        return list(names), {str(integer): number for number, integer in enumerate(integers)}
    if integers and integers[0] != 0 and integers[-1] == count:
        first = 1
    elif integers and (integers[0] != 0 or integers[-1] >= count):
        stand = ", ".join(map(str, integers[:10]))
        raise UserError(
            f"{path} has the labels {stand}, and --label-names has {count} names: which number has which? Say it with"
            f" them: --label-names {integers[0]}={names[0]},..."
        )
    return list(names), {str(first + number): number for number in range(count)}


def _check_one_each(first_lines: dict[str, int], path: object) -> None:
    """Raise UserError if labels are several a row, scores, or more than there may be classes."""
    for label, line in first_lines.items():
        where, parts = f"{path}, line {line}", [part.strip() for part in _DELIMITERS.split(label)]
        is_list = label[:1] in "[{" and label[-1:] in "]}"
        if is_list or (len(parts) > 1 and all(part in first_lines or part.isdecimal() for part in parts)):
            raise UserError(
                f"{where}: label {_quoted(label)} is several labels, but a row has one label in this task; use --task"
                " multi-label, or name a column of single labels with --label-column"
            )
        if _FRACTION.fullmatch(label):
            raise UserError(
                f"{where}: label {_quoted(label)} is a fraction, but a class is an integer or a word; use --task"
                " regression for scores, or name another column with --label-column"
            )
    if len(first_lines) > MAX_CLASSES:
        raise UserError(
            f"{path}, line {list(first_lines.values())[MAX_CLASSES]}: more than {MAX_CLASSES:,} different labels; name"
            " the column with the classes with --label-column"
        )


def _in_order(first_lines: dict[str, int], path: object) -> list[str]:
    """Return the labels of a file, each given with the line of its first row, in the order of their numbers."""
    labels = sorted(first_lines)
    if len(labels) < 2:
        have = f"all rows have the label {_quoted(labels[0])}" if labels else "no row has a label"
        raise UserError(
            f"{path}: {have}; name the column with the classes with --label-column, or all classes with --label-names"
        )
    integers = [label for label in labels if _INTEGER.fullmatch(label)]
    if len(integers) == len(labels):
        return sorted(labels, key=int)
    if integers:
        word = next(label for label in labels if label not in integers)
        raise UserError(
            f"{path} has integers and words as labels ({integers[0]!r} in line {first_lines[integers[0]]},"
            f" {_quoted(word)} in line {first_lines[word]}); make them one, or name the classes with --label-names"
        )
    return labels
