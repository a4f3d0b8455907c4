"""Labels in files: how a cell is read, which classes there are, and their ids; task.py defines what they mean."""

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sst2_xlmr.config import MAX_CLASSES
from sst2_xlmr.util.errors import UserError

_INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+|\+[0-9]+")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_DELIMITERS = re.compile(r"[,;|]")
_NUMPY = re.compile(r"\[[\s0-9.]*\]")
_INSIGNIFICANT = re.compile(r"[\W_]")  # ignored when looking for labels that are probably the same
# How pandas, R, MySQL, SNLI, ... write a missing label. `none` and `NONE` are classes in some files.
MISSING = {*("", "-", "?", "NULL", "null", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "None", "\\N")}
_BOOLEANS = {"true": 1.0, "yes": 1.0, "y": 1.0, "false": 0.0, "no": 0.0, "n": 0.0}
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+")
LabelValues = dict[str | int, float]  # several labels of a row: name or position -> 1, or its probability


def find_label_names(labels: Mapping[str, Sequence[int]], path: object) -> list[str]:
    """Return the names of a training file's classes, in the order of their ids.

    Integers are in numerical, words in alphabetical order. `labels` maps `label_text` to (rows, first line). UserError,
    with the file's path, if the labels are not classes, or if there are fewer than two or more than `MAX_CLASSES`.
    """
    first_lines: dict[str, int] = {}
    for raw, (_, line) in labels.items():
        if raw not in MISSING:
            first_lines.setdefault(canonical(raw), line)
    numbers = sorted(int(label) for label in first_lines if _INTEGER.fullmatch(label))
    is_from_0 = numbers[:2] == [-1, 0] or (numbers[:2] == [-1, 1] and len(numbers) > 3)
    if numbers == [-1] or (is_from_0 and len(numbers) == len(first_lines)):
        del first_lines["-1"]  # it means no label: beside words, or before 0, 1, ...
    _check_one_each(first_lines, path)
    integers = [label for label in sorted(first_lines) if _INTEGER.fullmatch(label)]
    words = sorted(first_lines.keys() - integers)
    if len(first_lines) < 2:
        problem = f"all rows have the label {_quoted(next(iter(first_lines)))}" if first_lines else "no row has a label"
        fix = "name the label column with --label-column, or all classes with --label-names"
        raise UserError(f"{path}: {problem}; {fix}")
    if integers and words:
        places = [f"{_quoted(label)} in line {first_lines[label]}" for label in (integers[0], words[0])]
        fix = "make them one, or name the classes with --label-names"
        raise UserError(f"{path} has integers and words as labels ({', '.join(places)}); {fix}")
    return words or sorted(integers, key=int)


def listed(names: Sequence[str]) -> str:
    """Return names separated by commas, only the first ten of many."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in names[:10]) + more


def _quoted(label: str) -> str:
    return repr(label) if len(label) <= 40 else repr(label[:40]) + "..."


def _parsed(text: str) -> Any:
    """Return the value of JSON, or of what Python or NumPy print; any other text unchanged."""
    if text.startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
        literal = f"[{','.join(text[1:-1].split())}]" if _NUMPY.fullmatch(text) else text
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(literal)
    return text


def are_positional(labels: Iterable[str]) -> bool:
    """Whether a column's lists have one number per label: all have one length, from 2, and numbers from 0 to 1."""
    lists = [value for text in labels if text.startswith("[") and isinstance(value := _parsed(text), list)]
    is_one_length = bool(lists) and {*map(len, lists)} == {max(2, len(lists[0]))}
    return is_one_length and all(type(n) in (int, float) and 0 <= n <= 1 for each in lists for n in each)


def split_labels(
    text: str, delimiter: str | None = None, known: Iterable[str] = (), are_positional: bool = False
) -> LabelValues | str:
    """Return the labels in a cell, or the cell's text if it is a single label.

    The cell is JSON, or what Python or NumPy print: an object maps labels to numbers; a list of floats, or one in which
    a value repeats, has one number per label, as all lists have with `are_positional`; any other list holds the labels.
    Any other text is split at the delimiter (default: `,`, `;` and `|`), unless it is one of the `known` labels.
    """
    value = _parsed(text)
    if isinstance(value, dict):
        prefix = "probability_" if all(str(name).startswith("probability_") for name in value) else ""
        return {str(name)[len(prefix) :]: _number(number) for name, number in value.items()}
    if isinstance(value, str):
        labels = [] if text in MISSING else text.split(delimiter) if delimiter else _DELIMITERS.split(text)
        if text in known or (len(labels) == 1 and not delimiter):
            return text
        return {canonical(label.strip()): 1.0 for label in labels if label.strip()}
    items = list(value)
    if are_positional or any(isinstance(item, float) for item in items) or len(set(map(str, items))) < len(items):
        return {position: _number(item) for position, item in enumerate(items)}
    return {label_text(item): 1.0 for item in items}


def _number(value: object) -> float:
    with contextlib.suppress(TypeError, ValueError):
        return float(value)  # type: ignore[arg-type]
    return _BOOLEANS.get(str(value).strip().lower(), math.nan)


def describe_unknown(label: str, names: Sequence[str], ids: Mapping[str, int]) -> str:
    """Return an error message for a label that is not a class, with the fix."""
    known = f"not one of {listed(names)}"
    if integers := [int(number) for number in ids if number not in names]:
        known = f"neither one of {listed(names)} nor a number from {min(integers)} to {max(integers)}"
    fix = ""
    if _INTEGER.fullmatch(canonical(label)):
        fix = "; numbers stand for names only with --label-names, the names in the order of the numbers"
    elif _folded(label) in map(_folded, names):
        fix = "; it differs from a class only in case, spaces or punctuation; spell them the same"
    return f"label {_quoted(label)} is {known}, the classes of the training file or of --label-names{fix}"


def ids_by_label(names: Sequence[str], label_ids: Mapping[str, int] | None) -> dict[str, int]:
    """Return the class ids of names and of integers in files: by `label_ids` (see `SingleLabel`), or 0, 1, ..."""
    # transformers' names for classes without a name
    has_no_names = list(names) == [f"LABEL_{index}" for index in range(len(names))]
    is_open = label_ids is None and not any(_INTEGER.fullmatch(name) for name in names)
    if not label_ids and (has_no_names or is_open):
        label_ids = {str(index): index for index in range(len(names))}
    return {**(label_ids or {}), **{name: index for index, name in enumerate(names)}}


def check_decimal_commas(labels: Iterable[str], path: object) -> None:
    """Raise UserError if commas in numbers may separate thousands: each is followed by exactly three digits."""
    with_comma = [label for label in labels if "," in label]
    if with_comma and all(map(_THOUSANDS.fullmatch, with_comma)):
        label = with_comma[0]
        fix = f"write {label.replace(',', '')} or {label.replace(',', '.')}"
        raise UserError(f"{path}: label {label!r} has a decimal comma or one that separates thousands; {fix}")


def is_number(label: str) -> bool:
    return bool(_INTEGER.fullmatch(label) or _FRACTION.fullmatch(label))


def label_text(cell: object) -> str:
    """Return a label as stripped text: empty for JSON's null and NaN, 3 for 3.0, `true` for true."""
    if isinstance(cell, str):
        return cell.strip()
    if type(cell) is int:
        return str(cell)
    if isinstance(cell, list) and len(cell) < 2:
        return label_text(cell[0] if cell else None)
    if cell is None or cell != cell:
        return ""
    return canonical(json.dumps(cell, ensure_ascii=False, default=str))


def canonical(label: str) -> str:
    """Return an integral number as an integer (`3.0` and `+3` -> `3`), any other label unchanged."""
    whole = _WHOLE.fullmatch(label)
    return str(int(whole[1] or label)) if whole and len(whole[1] or label) < 19 else label


def _folded(label: str) -> str:
    return label if is_number(label) else _INSIGNIFICANT.sub("", label).casefold() or label


def label_notes(counts: Mapping[str, int]) -> list[str]:
    """Return warnings about a file's labels, given the number of rows with each."""
    groups: dict[str, list[str]] = {}
    for label in counts:
        groups.setdefault(_folded(canonical(label)), []).append(label)
    alike = [group for group in groups.values() if len(set(map(canonical, group))) > 1]
    warnings = [f"labels that differ only in case, spaces or punctuation: {listed(group)}" for group in alike]
    usable = sum(counts.values())
    if usable > 20 and len(counts) > usable / 2:
        warnings.append(f"{len(counts):,} different labels in {usable:,} rows: is that the label column?")
    return warnings


def resolve_label_names(names: Sequence[str], labels: Iterable[str], path: object) -> tuple[list[str], dict[str, int]]:
    """Return the names of `--label-names`, and class ids by the integers that stand for the classes in files.

    Names may include their integers, `1=World`. Otherwise they are in the order of the integers among the file's
    `labels`, which must start at 0 or 1, or be as many as the names. UserError if the order is ambiguous.
    """
    pairs = [match for name in names if (match := re.fullmatch("(-?[0-9]+)=(.+)", name))]
    if len(pairs) == len(names):
        return [pair[2] for pair in pairs], {pair[1]: index for index, pair in enumerate(pairs)}
    unnamed = {canonical(label) for label in labels} - MISSING - set(names)
    integers = sorted(int(label) for label in unnamed if _INTEGER.fullmatch(label))
    integers = integers[1:] if integers[:2] == [-1, 0] else integers
    count = len(names)
    if any(_INTEGER.fullmatch(name) for name in names):
        return list(names), {}
    if len(integers) != count:  # the file lacks some of them; they count from 0 or from 1
        first = int(bool(integers) and integers[0] != 0 and integers[-1] == count)
        if integers and not first and (integers[0] != 0 or integers[-1] >= count):
            problem = f"{path} has the labels {', '.join(map(str, integers[:10]))}, but --label-names has {count} names"
            raise UserError(f"{problem}; give each name its number: --label-names {integers[0]}={names[0]},...")
        integers = list(range(first, first + count))
    return list(names), {str(integer): index for index, integer in enumerate(integers)}


def _check_one_each(first_lines: dict[str, int], path: object) -> None:
    """Raise UserError if rows have several labels or scores, or if there are more than `MAX_CLASSES` labels."""
    are_decimal_commas = all(map(_DECIMAL_COMMA.fullmatch, first_lines))
    for label, line in first_lines.items():
        parts = [part.strip() for part in _DELIMITERS.split(label)]
        is_list = label[:1] in "[{" and label[-1:] in "]}"
        if are_decimal_commas:
            problem = "a score with a decimal comma or several labels; use --task regression or --task multi-label"
        elif is_list or (len(parts) > 1 and all(part in first_lines or part.isdecimal() for part in parts)):
            fix = "use --task multi-label, or name a column of single labels with --label-column"
            problem = f"several labels, but a row has one label in this task; {fix}"
        elif _FRACTION.fullmatch(label):
            fix = "use --task regression for scores, or name another column with --label-column"
            problem = f"a fraction, but a class is an integer or a word; {fix}"
        else:
            continue
        raise UserError(f"{path}, line {line}: label {_quoted(label)} is {problem}")
    if len(first_lines) > MAX_CLASSES:
        line, fix = list(first_lines.values())[MAX_CLASSES], "name the label column with --label-column"
        raise UserError(f"{path}, line {line}: more than {MAX_CLASSES:,} different labels; {fix}")
