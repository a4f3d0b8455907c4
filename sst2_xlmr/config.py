"""The options of train.py, declared once (all but --config and --resume): type, default, unit, help, and a check.

`cli.parse_args` fills a `Config`. This module imports neither torch nor anything else that is slow.
"""

from __future__ import annotations  # cli.py reads the annotations as text

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sst2_xlmr.util.errors import UserError, refuse

LOCK_NAME = ".lock"  # in a run's folder
MAX_CLASSES = 1000
PRECISIONS = ("auto", "bf16", "fp32", "int8")  # for prediction
ABSTAINED = "?"  # in place of a label whose probability is too low
TEXT_OPTIONS = ("text_column", "text_pair_column", "format", "delimiter", "quoting", "encoding", "header")
COLUMN_OPTIONS = (*TEXT_OPTIONS, "label_column", "label_columns", "drop_unusable")
EVAL_BATCH_TOKENS = 2048
SHORTEST_PAIR = 6  # <s> a </s></s> b </s>, one token of each text
TASK_NAMES = ("auto", "single-label", "multi-label", "regression")
LONG_TEXTS = ("cut", "head-tail", "windows")
COLUMN_KEYS = ("text", "pair", "label", "weight", "format", "delimiter", "quoting", "encoding")
FORMATS = {  # format -> its description in the header; empty for tables, which are described by their delimiter
    "tsv": "",
    "csv": "",
    "jsonl": "JSON Lines",
    "json": "a JSON document",
    "lines": "plain lines",
    "fasttext": "fastText's __label__",
    "folder": "a folder per class",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "xlsx": "the first sheet of a workbook",
}
QUOTES = {"none": "", "double": '"', "single": "'", "backslash": '"'}  # quoting -> quotation mark
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)

# Annotations that say how an option's value is parsed (see `TYPES`); `list[...]` takes several values.
FilePath = str
CommaSeparated = list  # of str, given as one argument; see `parse_label_names`


def one_of(*values: str) -> Callable[[Any], str]:
    return lambda value: "" if value in values else f"must be one of {', '.join(values)}"


def between(low: float, high: float, include_high: bool = True) -> Callable[[Any], str]:
    """Return a check for low <= value <= high (or < high)."""
    wanted = f"must be from {low:g} to {high:g}" + ("" if include_high else " (excluded)")
    return lambda value: "" if low <= value <= high and (include_high or value < high) else wanted


def at_least(low: float) -> Callable[[Any], str]:
    return lambda value: "" if low <= value < math.inf else f"must be {low:g} or more"


def above(low: float, high: float = math.inf) -> Callable[[Any], str]:
    """Return a check for low < value <= high, finite."""
    wanted = f"must be above {low:g}" + (f" and at most {high:,g}" if high < math.inf else "")
    return lambda value: "" if low < value <= high and value < math.inf else wanted


def decode_argument(word: str) -> str:
    """Return a command-line word decoded as UTF-8, even if the locale is ASCII."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


def parse_label_names(text: str) -> list[str]:
    """Return the names in a comma-separated list, in JSON, or in a file of either JSON or one name per line.

    A line `NUMBER<tab>NAME` of a file, and a key and value of a JSON object, become `NUMBER=NAME`.
    """
    text, is_file = decode_argument(text), os.path.isfile(decode_argument(text))  # noqa: PTH113 (many names are too long for a path)
    try:
        if is_file:
            text = Path(text).read_text(encoding="utf-8-sig").strip()
        found = json.loads(text) if text[:1] in ("[", "{") else None
    except (OSError, ValueError) as error:
        raise UserError(f"--label-names: neither names nor JSON: {error}") from None
    if isinstance(found, (list, dict)):
        return [str(name) for name in found] if isinstance(found, list) else [f"{key}={found[key]}" for key in found]
    lines = [line.strip() for line in (text.splitlines() if is_file else text.split(","))]
    return [re.sub("^(-?[0-9]+)\t", r"\1=", line) for line in lines if line or not is_file]


# Annotation -> parser of its values; others stay strings.
TYPES: dict[str, Any] = {"int": int, "float": float, "str": decode_argument, "CommaSeparated": parse_label_names}


def _check_label_names(names: list[str]) -> str:
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names) or not all(names):
        return f"must be two or more different names (at most {MAX_CLASSES:,}), separated by commas"
    return ""


def _check_class_weights(text: str) -> str:
    weights = []
    with contextlib.suppress(ValueError):
        weights = [float(weight) for weight in text.split(",")]
    if text == "balanced" or (len(weights) > 1 and all(0 <= weight < math.inf for weight in weights) and any(weights)):
        return ""
    return "must be balanced, or a number of 0 or more for every class, separated by commas, not all 0"


def _check_threshold(text: str) -> str:
    aim = re.fullmatch(r"f1|(precision|recall)=(0|0?\.[0-9]+|1(\.0*)?)", text)
    return "" if aim else "must be f1, precision=P or recall=R, P and R from 0 to 1"


def _check_encoding(name: str) -> str:
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return "must be a text encoding, such as utf-8, cp1252 or gb18030"
    return ""


def _check_delimiter(text: str) -> str:
    return "must not have quotation marks or line ends" if {*text} & {*"\"'\r\n"} else ""


def plain_name(path: Path) -> str:
    """Return a file's name without its extensions: `fr` for `data/fr.csv.gz`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).stem


def named_file(text: str) -> tuple[str, Path]:
    """Split `NAME=FILE`; without a name, take the file's, without its extension and `.gz`."""
    named = _NAMED.fullmatch(text)
    return (named[1], Path(named[2])) if named else (plain_name(Path(text)), Path(text))


def named_files(values: list[str], option: str) -> dict[str, Path]:
    """Return name -> file for an option's values, `[NAME=]FILE`; UserError if two have the same name."""
    files: dict[str, Path] = {}
    for name, file in map(named_file, values):
        if name in files:
            raise UserError(f"two files have the name {name}, {files[name]} and {file}; use {option} NAME=FILE")
        files[name] = file
    return files


def _check_eval_files(values: list[str]) -> str:
    for value in values:
        name = named_file(value)[0]
        if not _NAMED.fullmatch(value):
            return "must be NAME=FILE, the name made of letters, digits and ._-"
        if name in ("train", "dev", "test", "mean"):
            return f"must have another name than {name}, which has a meaning of its own"
    named_files(values, "--eval-file")
    return ""


def _check_columns(values: list[str]) -> str:
    part = f"({'|'.join(COLUMN_KEYS)})=[^,=]+"
    if not all(re.fullmatch(rf"[^:]+:{part}(,{part})*", value) for value in values):
        return f"must be SPLIT:KEY=VALUE,..., with the keys {', '.join(COLUMN_KEYS)}"
    if any(not value.startswith("train:") and re.search("[:,]weight=", value) for value in values):
        return "must not have a weight but for train: only training rows are weighted"
    for pair in (pair for value in values for pair in value.partition(":")[2].split(",")):
        key, _, text = pair.partition("=")
        if key in OPTIONS and (problem := OPTIONS[key].metadata["check"](text)):
            return f"{key}={text} {problem}"
    return ""


def option(
    default: Any,
    help: str,  # "METAVAR: sentence"; a switch has the sentence alone
    check: Callable[[Any], str] = lambda value: "",  # returns the problem with a value, or an empty string
    is_changeable: bool = False,  # whether `--resume` accepts another value: it is about the machine or the output
) -> Any:
    """Declare one option; its annotation gives its type and whether it takes several values."""
    metadata = {"help": help, "check": check, "changeable": is_changeable}
    value: Any = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**value, metadata=metadata)


changeable = functools.partial(option, is_changeable=True)
optional = functools.partial(option, None)


@dataclasses.dataclass
class Config:
    """A run's options. Field `some_name` is option `--some-name` and key `some_name` of `config.json`."""

    data_dir: FilePath | None = changeable(None, "DIR: folder with train, dev and test files (default: SST-2)")
    train_file: list[FilePath] = changeable([], "FILE: training rows, one or more files; overrides --data-dir")
    dev_file: FilePath | None = changeable(None, "FILE: rows to evaluate on during training; overrides --data-dir")
    dev_share: float | None = optional("P: share of each class set aside as dev (no dev file: 0.1)", above(0, 0.9))
    test_file: list[FilePath] = changeable([], "FILE: labelled rows to evaluate on at the end, one or more files")
    eval_file: list[FilePath] = changeable([], "NAME=FILE: more labelled rows to evaluate on", _check_eval_files)
    text_column: list[str] | None = optional("NAME|N: one or more columns with the text (default: sentence or text)")
    text_pair_column: str | None = optional("NAME|N: column with the second text, if rows are pairs of texts")
    label_column: str = option("label", "NAME|N: column with the label, by name or number from 1")
    label_columns: list[str] | None = optional("NAME|N: one column per label, instead of --label-column")
    label_delimiter: str | None = optional("TEXT: text between several labels in a cell (default: , ; or |)")
    weight_column: str | None = optional("NAME|N: column with a training row's weight in the loss (0: left out)")
    task: str = option("auto", "NAME: auto (by the labels), single-label, multi-label, regression", one_of(*TASK_NAMES))
    columns: list[str] = option([], "SPLIT:KEY=VALUE,...: options of one split: dev:label=gold", _check_columns)
    format: str | None = optional(f"NAME: file format: {', '.join(FORMATS)} (default: detected)", one_of(*FORMATS))
    delimiter: str | None = optional("NAME: tab, comma, semicolon, bar or other (default: detected)", _check_delimiter)
    quoting: str | None = optional("NAME: none, double, single or backslash (default: detected)", one_of(*QUOTES))
    encoding: str | None = optional("NAME: e.g. cp1252 (default: UTF-8, or UTF-16 by its mark)", _check_encoding)
    header: bool | None = optional("whether a table's first line has the column names (default: detected)")
    label_names: CommaSeparated | None = optional("A,B,...|1=A,...|FILE: names of numbered classes", _check_label_names)
    drop_unusable: bool = option(False, "leave out broken rows and rows without text or label, instead of stopping")
    check: FilePath | None = changeable(None, "FILE: only read and tokenize; show how, and write it to FILE as JSON")
    max_length: int = option(256, "TOKENS: maximum input length in tokens, including <s> and </s>", between(3, 100_000))
    long_texts: str = option("cut", "NAME: texts beyond --max-length: cut, head-tail, windows", one_of(*LONG_TEXTS))
    stride: int = option(0, "TOKENS: from one window's start to the next (0: 3/4 of a window)", at_least(0))
    drop_duplicates: bool = option(False, "keep the first of identical rows; drop texts with conflicting labels")
    drop_leaks: bool = option(False, "drop training rows whose text is also in an evaluation file")

    encoder: FilePath = changeable("xlmr.base", "NAME|DIR: xlmr.base, xlmr.large, owner/name on the Hub, or a folder")
    layers: int = option(0, "N: use only the encoder's lowest N layers; faster, smaller (0: all)", at_least(0))
    dropout: float = option(0.1, "P: dropout in the encoder (hidden states, attention weights)", between(0, 1, False))
    head_dropout: float = option(0.1, "P: dropout in the classification head", between(0, 1, False))
    freeze_encoder: bool = option(False, "train only the classification head")

    epochs: float = option(3.0, "N: passes over the training rows; may be a fraction, such as 2.5", above(0, 1e6))
    max_steps: int = option(0, "N: end training and schedule after N optimizer steps (0: after --epochs)", at_least(0))
    batch_size: int = option(32, "ROWS: rows per optimizer step, summed over all processes", at_least(1))
    micro_batch_size: int = option(0, "ROWS: rows (or windows) per forward pass of a process (0: all)", at_least(0))
    lr: float = option(2e-5, "RATE: peak learning rate", above(0))
    weight_decay: float = option(0.01, "RATE: AdamW weight decay; biases and LayerNorm are exempt", at_least(0))
    layerwise_lr_decay: float = option(1.0, "F: learning rate factor per layer away from the head", above(0, 1))
    schedule: str = option("linear", "NAME: linear or cosine decay, constant", one_of("linear", "cosine", "constant"))
    warmup_ratio: float = option(0.06, "SHARE: share of all steps over which the learning rate rises", between(0, 1))
    max_grad_norm: float = option(1.0, "NORM: clip the gradient's global norm to this (0: never)", at_least(0))
    label_smoothing: float = option(0.0, "P: probability mass spread evenly over all classes", between(0, 1, False))
    skip_nonfinite: int = changeable(0, "N: skip up to N non-finite gradients in a row (0: stop)", at_least(0))
    class_weights: str | None = optional("balanced|W0,W1,...: loss weight of each class", _check_class_weights)
    threshold_for: str | None = optional("f1|precision=P|recall=R: the thresholds' aim (default: f1)", _check_threshold)
    calibrate: bool = option(False, "divide the written model's logits by a temperature fitted on dev")
    seed: int = option(0, "N: seed for row order, new head and dropout", between(0, 2**31 - 1))

    device: str = changeable("auto", "NAME: auto (CUDA if available), cpu or cuda", one_of("auto", "cpu", "cuda"))
    precision: str = option(
        "auto", "NAME: auto (bf16 where native, else fp32), bf16, fp32 or tf32", one_of("auto", "bf16", "fp32", "tf32")
    )
    deterministic: bool = option(False, "use only deterministic CUDA kernels (no effect on a CPU)")
    compile: bool = changeable(True, "on a CPU with GCC, use the compiled engine instead of plain PyTorch")
    threads: int = changeable(0, "N: CPU threads per process (0: its share of the available cores)", between(0, 1024))
    timeout_minutes: float = changeable(10.0, "MIN: silence until a process is considered lost", above(0))

    output_dir: FilePath | None = changeable(None, "DIR: the run's folder (default: runs/ and the start time)")
    eval_every: int | None = optional("N: evaluate every N steps of an epoch, and after it (0: only then)", at_least(0))
    eval_batch_tokens: int = option(EVAL_BATCH_TOKENS, "TOKENS: tokens per forward pass in evaluation", at_least(1))
    best_by: str | None = optional("METRIC|NAME|mean: selects best/: a metric on dev, an --eval-file, or the mean")
    early_stopping_patience: int = option(0, "N: stop after N evaluations without a better one (0: never)", at_least(0))
    save_every: int = changeable(0, "N: checkpoint every N steps and after each epoch (0: only then)", at_least(0))
    keep_checkpoints: int = changeable(2, "N: how many of the newest checkpoints to keep", at_least(2))
    log_every: int = changeable(50, "N: log training metrics every N steps, averaged since the last log", at_least(1))
    tensorboard_dir: FilePath | None = changeable(None, "DIR: TensorBoard events (default: OUTPUT_DIR/tensorboard)")

    @property
    def eval_splits(self) -> list[str]:
        """The splits to evaluate on during training, dev first."""
        return ["dev", *(name for name, _ in map(named_file, self.eval_file))]


OPTIONS = {field.name: field for field in dataclasses.fields(Config)}
# Heading of `--help` -> its options; `_FIRST` has the first option of each.
_FIRST = {"data_dir": "data", "encoder": "model", "epochs": "training", "device": "machine", "output_dir": "output"}
GROUPS: dict[str, list[str]] = {}
_heading = ""
for _name in OPTIONS:
    _heading = _FIRST.get(_name, _heading)
    GROUPS.setdefault(_heading, []).append(_name)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """Return an option's value as it is written on the command line."""
    if isinstance(value, list) and any("," in item for item in value):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return ",".join(value) if isinstance(value, list) else str(value)


def check_values(options: Mapping[str, Any]) -> None:
    """Check the values of options, by their names in `OPTIONS`; a UserError names option, value and fix."""
    for name, value in options.items():
        field = OPTIONS[name]
        if value == "":
            raise UserError(f"{flag(name)} is empty; give a value, or leave it out")
        try:
            shown(value).encode("utf-8")  # config.json is UTF-8
            if "File" in str(field.type):
                os.fsencode(shown(value))
        except UnicodeEncodeError:
            fix = "set a locale with UTF-8, such as LC_ALL=C.UTF-8, or rename it"
            raise UserError(f"{flag(name)} {shown(value)!a} is not UTF-8, or not in this locale; {fix}") from None
        if value is not None and (problem := field.metadata["check"](value)):
            raise UserError(f"{flag(name)} {problem}; got {shown(value)}")


def check(config: Config) -> None:
    """Check values and paths before anything is loaded."""
    check_values(vars(config))
    files = {"--train-file": config.train_file, "--dev-file": [config.dev_file] if config.dev_file else []}
    files |= {"--test-file": config.test_file, "--eval-file": [str(named_file(each)[1]) for each in config.eval_file]}
    try:
        if config.data_dir is not None and not Path(config.data_dir).is_dir():
            raise UserError(f"--data-dir {config.data_dir} is not a directory")
        for name, paths in files.items():
            refuse(*((not Path(file).exists(), f"{name} {file} does not exist") for file in paths))
    except OSError as error:
        raise UserError(f"cannot access {error.filename}: {error.strerror}") from None
    has_pairs, length, long_texts = config.text_pair_column is not None, config.max_length, config.long_texts
    has_train_file = config.train_file or config.data_dir
    refuse(
        (has_pairs and length < SHORTEST_PAIR, f"--max-length must be {SHORTEST_PAIR} or more with --text-pair-column"),
        (has_pairs and long_texts != "cut", f"--long-texts {long_texts} is for single texts, not --text-pair-column"),
        (config.stride and long_texts != "windows", "--stride needs --long-texts windows"),
        (config.stride > length - 2, "--stride must be at most --max-length minus 2"),
        (config.dev_file and not has_train_file, "--dev-file needs --train-file, or a training file in --data-dir"),
        (config.dev_file and config.dev_share is not None, "--dev-file and --dev-share both define dev; leave one out"),
        (len(config.label_columns or ()) == 1, "--label-columns takes two or more; for one column, use --label-column"),
    )
