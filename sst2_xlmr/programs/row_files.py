"""Files of rows that programs write for train.py: JSON lines with text, pair, label and weight."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sst2_xlmr.cli import command_line_of, parse_args, with_files
from sst2_xlmr.config import GROUPS, OPTIONS, Config
from sst2_xlmr.data.rows import Row
from sst2_xlmr.programs.options import refuse
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import new_file, writing

# Data options that still apply to these files; the others say where rows are and how to parse them.
_OF_ROWS = ("max_length", "long_texts", "stride", "drop_duplicates", "drop_leaks", "num_workers")
_OWN = ("--resume", "--output-dir", "--config")


def split_words(option: str, text: str) -> list[str]:
    """Split an option's value into words for train.py, quoted as in a shell."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option}: cannot split {text.strip()!r} into words: {error}") from None


def checked_config(words: list[str], folder: Path, *own: str) -> Config:
    """Parse words for train.py; UserError for wrong options, and for those that the program sets itself."""
    taken = sorted({word.split("=")[0] for word in with_files(words)} & {*_OWN, *own})
    cure = "every run has its own; to take options from a file, use @FILE"
    refuse((taken, f"leave out {', '.join(taken)}: {cure}"))
    return parse_args([*words, "--output-dir", str(folder / "unused")])[0]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, whose labels are JSON values, atomically; UserError if the file cannot be written."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for row in rows:
            texts = {"text": row.text} if row.pair is None else {"text": row.text, "pair": row.pair}
            content = {**texts, "label": row.label, "weight": row.weight}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")


def with_values(rows: Iterable[Row], task: Task) -> Iterator[Row]:
    """Yield rows with their labels as JSON values."""
    return (row._replace(label=task.label_value(row.label)) for row in rows)


def words_for(config: Config, task: Task, files: Mapping[str, Path], has_weights: bool = False) -> list[str]:
    """Return the words for train.py to train with a config's options on files of `write_rows`, by split."""
    kept = [name for name in OPTIONS if name not in GROUPS["data"] or name in _OF_ROWS]
    others = {name: str(file) for name, file in files.items() if name not in ("train", "dev")}
    run = Config(
        **{**{name: getattr(config, name) for name in kept}, "output_dir": None},
        train_file=[str(files["train"])],
        dev_file=str(files["dev"]),
        eval_file=[f"{name}={file}" for name, file in others.items() if name in config.eval_splits],
        test_file=[file for name, file in others.items() if name not in config.eval_splits],
        text_column=["text"],
        text_pair_column="pair" if config.text_pair_column is not None else None,
        weight_column="weight" if has_weights or config.weight_column is not None else None,
        task=task.option,
        label_names=None if "label_names" in task.refused else task.label_names,
    )
    return command_line_of(run)
