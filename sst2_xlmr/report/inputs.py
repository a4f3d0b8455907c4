"""What a run's files hold, and how they were read: lines for the header, and JSON."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from sst2_xlmr.config import FORMATS
from sst2_xlmr.data.containers import shortened
from sst2_xlmr.data.formats import Layout
from sst2_xlmr.data.prepare import Inputs
from sst2_xlmr.data.rows import PHRASES, ReadOptions, guessed_columns
from sst2_xlmr.data.sniff import DELIMITERS
from sst2_xlmr.data.token_cache import find_duplicates
from sst2_xlmr.labels import listed

_DELIMITERS = {character: f"{name}s" for name, character in DELIMITERS.items()}
_QUOTING = {"none": "no quotes", "double": "quoted", "single": "quoted by '", "backslash": 'quoted, \\" inside'}
_PLAIN = {("tsv", "\t", "none", True), ("csv", ",", "double", True), ("jsonl", "", "", False)}


def description(path: Path, layout: Layout, options: ReadOptions, rows: int | None = None) -> str:
    """Describe how a file was read; empty for the usual case: the format its name says, UTF-8, with a header."""
    is_named_so = path.name.lower().removesuffix(".gz").endswith(f".{layout.format}")
    is_plain = is_named_so and (layout.format, layout.delimiter, layout.quoting, layout.header) in _PLAIN
    if is_plain and (layout.encoding, layout.newline, len(options.texts)) == ("utf-8", "\n", 1 if options.text else 0):
        return ""
    words = [FORMATS[layout.format] or _DELIMITERS.get(layout.delimiter, repr(layout.delimiter))]
    if layout.quoting:
        words += [_QUOTING[layout.quoting], "header" if layout.header else "no header"]
    words += [layout.encoding] if layout.encoding != "utf-8" else []
    words += ["CR line ends"] if layout.newline == "\r" else []
    words += [f"text is {' + space + '.join(options.texts)}"] if len(options.texts) > 1 else []
    guess = guessed_columns(path, layout, options)
    words += [f"text in column {guess.text}"] if guess.text != options.text else []
    words += [f"label in column {guess.label}"] if guess.label != options.label else []
    words += [f"{rows:,} rows"] if rows is not None else []
    return f"{path.name}: {', '.join(words)}"


def left_out_of(dropped: dict[str, int]) -> str:
    """Return a note with the number of rows left out, by kind; empty if there are none."""
    return f"left out: {', '.join(f'{count:,} {PHRASES[kind]}' for kind, count in dropped.items())}" if dropped else ""


def input_lines(inputs: Inputs) -> list[str]:
    """Return the header's lines: files with an unusual layout, rows per class, and notes on every split."""
    lines = []
    for name, split in inputs.splits.items():
        for path, file in zip(split.files, split.inspections):
            if text := description(path, file.layout, split.read_options, file.rows):
                lines.append(f"read as    {text}")
        if len(split.files) > 1 and name in inputs.caches and (name == "train" or split.source_rows is None):
            cache = inputs.all_training_rows if name == "train" else inputs.caches[name]
            counts = zip(split.files, np.bincount(cache.files, minlength=len(split.files)))
            lines.append(f"files      {name}: {', '.join(f'{path.name} {count:,}' for path, count in counts)}")
    for name in ("train", "dev"):
        lines.append(f"classes    {name}: {inputs.task.describe_labels(inputs.caches[name].labels)}")
    notes = [f"note       {name}: {note}" for name in inputs.splits for note in split_notes(inputs, name)]
    return list(dict.fromkeys([*lines, *notes]))  # without repetitions: train and dev may have the same files


def split_notes(inputs: Inputs, name: str) -> list[str]:
    split, absent = inputs.splits[name], [label for label, rows in class_counts(inputs, name).items() if not rows]
    notes = [*split.notes, left_out_of(split.dropped), f"no row of class {listed(absent)}" if absent else ""]
    return list(filter(None, notes))


def class_counts(inputs: Inputs, name: str) -> dict[str, int]:
    """Return class -> number of rows."""
    return inputs.task.counts(inputs.caches[name].labels) if name in inputs.caches else {}


def data_report(inputs: Inputs) -> list[str]:
    """Return a line each for duplicates, conflicting labels and leaks, if the training rows have any."""
    config, train = inputs.config, inputs.all_training_rows
    keys = inputs.task.label_keys(train.labels)
    duplicates, conflicts = find_duplicates(train.text_digests, keys)
    drop_duplicates = "dropped" if config.drop_duplicates else "--drop-duplicates drops them"
    drop_leaks = "dropped" if config.drop_leaks else "--drop-leaks drops them"
    lines = []

    def add(kind: str, count: int, has: str, fix: str, *examples: tuple[str, int]) -> None:
        rows = f"{count:,} training rows have" if count > 1 else "1 training row has"
        places = " and ".join(inputs.place_of(*example) for example in examples)
        lines.append(f"{kind:<10} {rows} {has}, e.g. {places}; {fix}")

    if count := len(duplicates):
        add("duplicates", count, "the text and label of an earlier one", drop_duplicates, ("train", duplicates[0]))
    if count := len(conflicts):
        first = conflicts[0]
        other = np.flatnonzero((train.text_digests == train.text_digests[first]) & (keys != keys[first]))[0]
        add("conflicts", count, "a text with conflicting labels", drop_duplicates, ("train", first), ("train", other))
    for split, rows in inputs.leaks.items():
        leaked = np.flatnonzero(inputs.caches[split].text_digests == train.text_digests[rows[0]])[0]
        add("leaks", len(rows), f"a text of {split}", drop_leaks, ("train", rows[0]), (split, leaked))
    return lines


def describe_rows(inputs: Inputs) -> str:
    """Return the rows of every file, and how many of them are trained on or truncated."""
    counts = {split: f"{len(cache):,}" for split, cache in inputs.caches.items()}
    if len(inputs.caches["train"]) < len(inputs.all_training_rows):
        counts["train"] += f" of {len(inputs.all_training_rows):,}"
    rows = ", ".join(f"{split} {count}" for split, count in counts.items())
    length, kind = inputs.config.max_length, inputs.config.long_texts
    if kind == "windows":
        windowed = sum(int((cache.lengths > length).sum()) for cache in inputs.caches.values())
        return f"{rows}; {windowed:,} in windows of {length} tokens"
    truncated = sum(int(cache.is_cut.sum()) for cache in inputs.caches.values())
    kept = " (their beginning and end)" if kind == "head-tail" else ""
    return rows + (f"; {truncated:,} cut to {length} tokens{kept}" if truncated else "")


def examples_of(inputs: Inputs, name: str, count: int = 3) -> list[list[str | None]]:
    """Return the first rows of a split, as the model sees them: text, second text or None, label or None."""
    task, rows = inputs.task, inputs.splits[name].rows(inputs.task if name in inputs.caches else None)
    chosen = [row for _, row in itertools.islice(rows, count)]
    return [[row.text, row.pair, None if row.label is None else task.format_label(row.label)] for row in chosen]


def as_json(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Describe every split for `--check FILE`."""
    result = {}
    for name, split in inputs.splits.items():
        cache, layout = inputs.caches.get(name), split.inspections[0].layout
        rows = sum(file.rows for file in split.inspections) if cache is None else len(cache)
        result[name] = {
            "path": str(split.files[0]) if len(split.files) == 1 else list(map(str, split.files)),
            "format": layout.format,
            "delimiter": layout.delimiter or None,
            "quoting": layout.quoting or None,
            "encoding": layout.encoding,
            "header": layout.header if layout.delimiter or layout.format == "xlsx" else None,
            "rows": rows,
            "dropped": split.dropped,
            "classes": class_counts(inputs, name),
            "examples": examples_of(inputs, name),
            "truncated": int(cache.is_cut.sum()) if cache else 0,
            "warnings": split_notes(inputs, name),
        }
    return result


def example_lines(inputs: Inputs) -> list[str]:
    """Return three rows of each split with their labels, as the model sees them."""
    lines = []
    for name in inputs.splits:
        for text, pair, label in examples_of(inputs, name):
            texts = shortened(text, 100) if pair is None else f"{shortened(text, 100)} / {shortened(pair, 100)}"
            lines.append(f"{name:<10} {label if label is not None else '(no label)'}: {texts}")
    return lines
