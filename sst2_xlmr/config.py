"""Every option, declared once: type, default, unit, help, and a check that runs before anything is loaded.

`cli.parse_args` fills a `Config`. This module imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from sst2_xlmr.util.errors import UserError

LOCK_NAME = ".lock"  # in a run's folder
MAX_CLASSES = 1000
EVAL_BATCH_TOKENS = 4096
REMOVED_OPTIONS = ("eval_batch_size",)  # a run that was started with one of them continues without it
SHORTEST_PAIR = 6  # <s> a </s></s> b </s>, one token of each text
_NAME = re.compile(r"[\w.-]+")


def one_of(*values: str) -> Callable[[Any], str]:
    return lambda value: "" if value in values else f"is not one of {', '.join(values)}"


def between(low: float, high: float, include_high: bool = True) -> Callable[[Any], str]:
    """Return a check for low <= value <= high (or < high); infinity as `high` means no upper limit."""

    def check(value: float) -> str:
        if math.isfinite(value) and low <= value and (value <= high if include_high else value < high):
            return ""
        if high == math.inf:
            return f"must be {low:g} or more"
        return f"must be from {low:g} to {high:g}" + ("" if include_high else " (excluded)")

    return check


def above(low: float) -> Callable[[Any], str]:
    return lambda value: "" if math.isfinite(value) and value > low else f"must be above {low:g}"


def label_list(text: str) -> list[str]:
    """Parse `negative,positive`."""
    return [name.strip() for name in text.split(",")]


def _check_label_names(names: list[str]) -> str:
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names) or not all(names):
        return f"needs two or more different names (at most {MAX_CLASSES:,}), separated by commas"
    return ""


def _check_class_weights(text: str) -> str:
    if text == "balanced":
        return ""
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) < 2 or not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        return "is neither balanced nor a number of 0 or more for every class, separated by commas, not all 0"
    return ""


def plain_name(path: Path) -> str:
    """Return a file's name without its extensions: `fr` for `data/fr.csv.gz`."""
    name = path.with_suffix("").name if path.suffix.lower() == ".gz" else path.name
    return Path(name).stem


def named_file(text: str) -> tuple[str, Path]:
    """Split `NAME=FILE`; without a name, take the file's, without its extension and `.gz`."""
    name, equals, path = text.partition("=")
    if equals and _NAME.fullmatch(name):
        return name, Path(path)
    return plain_name(Path(text)), Path(text)


def named_files(values: list[str], option: str) -> dict[str, Path]:
    """Return name -> file of an option's values, `[NAME=]FILE`.

    Raises:
        UserError: if two files have the same name.
    """
    files: dict[str, Path] = {}
    for name, file in map(named_file, values):
        if name in files:
            raise UserError(
                f"two files have the name {name}, {files[name]} and {file}; name them with {option} NAME=FILE"
            )
        files[name] = file
    return files


def _check_eval_files(values: list[str]) -> str:
    names = []
    for value in values:
        name, equals, path = value.partition("=")
        if not (equals and path and _NAME.fullmatch(name)):
            return "takes NAME=FILE, the name made of letters, digits and ._-"
        if name in ("train", "dev"):
            return f"takes other names than {name}, which has its own option"
        if name in names:
            return f"has the name {name} twice"
        names.append(name)
    return ""


def option(
    default: Any,
    group: str,
    help: str,
    kind: Callable[[str], Any] = str,
    metavar: str | None = None,
    check: Callable[[Any], str] | None = None,
    changeable: bool = False,
    many: bool = False,
) -> Any:
    """Declare one option: a field with metadata, hence one parameter per property.

    Args:
        default: its value if it is not given; None for none.
        group: the heading under which `--help` lists it.
        help: one sentence, with the unit.
        kind: turns the command line's text into a value; `bool` gives `--x` and `--no-x`.
        metavar: what `--help` shows for the value.
        check: returns what is wrong with a value, or an empty string.
        changeable: whether `--resume` accepts another value, because it does not affect the result.
        many: whether it takes several values.
    """
    metadata = {k: v for k, v in locals().items() if k != "default"}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """All that defines a run. Field `some_name` is option `--some-name` and key `some_name` of `config.json`."""

    data_dir: str | None = option(
        None,
        "data",
        "folder with train and dev (and test) as .tsv, .csv or .jsonl, perhaps with .gz; SST-2 is downloaded if no"
        " file is named",
        metavar="DIR",
        changeable=True,
    )
    train_file: str | None = option(
        None, "data", "training rows; overrides --data-dir", metavar="FILE", changeable=True
    )
    dev_file: str | None = option(
        None, "data", "rows to evaluate on during training; overrides --data-dir", metavar="FILE", changeable=True
    )
    test_file: list[str] = option(
        [],
        "data",
        "labelled rows to evaluate on at the end, one or more files",
        metavar="FILE",
        many=True,
        changeable=True,
    )
    eval_file: list[str] = option(
        [],
        "data",
        "more labelled rows to evaluate on during training, under a name (a language, say); may be repeated",
        metavar="NAME=FILE",
        check=_check_eval_files,
        many=True,
        changeable=True,
    )
    text_column: str | None = option(
        None,
        "data",
        "column with the text, by name or by number from 1 (default: sentence, or else text)",
        metavar="NAME|N",
    )
    text_pair_column: str | None = option(
        None, "data", "column with a second text, where a row is a pair of them", metavar="NAME|N"
    )
    label_column: str = option("label", "data", "column with the label, by name or by number from 1", metavar="NAME|N")
    header: bool = option(
        True,
        "data",
        "the first line of a .tsv or .csv file names its columns; without it, give them by number",
        kind=bool,
    )
    label_names: list[str] | None = option(
        None,
        "data",
        "names of the classes 0, 1, ..., separated by commas (default: the labels in the training file)",
        kind=label_list,
        metavar="A,B,...",
        check=_check_label_names,
    )
    max_length: int = option(
        256,
        "data",
        "longest input in tokens, <s> and </s> included; longer texts are cut",
        kind=int,
        metavar="TOKENS",
        check=between(3, 100_000),
    )
    drop_duplicates: bool = option(
        False,
        "data",
        "train on the first row only of those with the same text and label, and on no text that has different labels",
        kind=bool,
    )
    drop_leaks: bool = option(
        False, "data", "do not train on rows whose text is in a file to evaluate on, too", kind=bool
    )
    num_workers: int = option(
        0,
        "data",
        "loader processes per training process",
        kind=int,
        metavar="N",
        check=between(0, 256),
        changeable=True,
    )

    encoder: str = option(
        "xlmr.base",
        "model",
        "xlmr.base, xlmr.large (downloaded once), or a folder in Hugging Face layout",
        metavar="NAME|DIR",
        changeable=True,
    )
    layers: int = option(
        0,
        "model",
        "train only the encoder's lowest N layers, and leave the others out: faster and smaller (0: all)",
        kind=int,
        metavar="N",
        check=between(0, math.inf),
    )
    dropout: float = option(
        0.1,
        "model",
        "dropout in the encoder, on hidden states and attention weights",
        kind=float,
        metavar="P",
        check=between(0, 1, False),
    )
    head_dropout: float = option(
        0.1, "model", "dropout in the classification head", kind=float, metavar="P", check=between(0, 1, False)
    )
    full_vocabulary: bool = option(
        False,
        "model",
        "train all embedding rows, not only those that the run's files use; same result, slower",
        kind=bool,
    )
    freeze_encoder: bool = option(False, "model", "train the classification head only", kind=bool)

    epochs: float = option(
        3.0,
        "training",
        "passes over the training rows; 2.5, say, ends half-way through the third",
        kind=float,
        metavar="N",
        check=lambda v: "" if 0 < v <= 1_000_000 else "must be above 0 and at most 1,000,000",
    )
    max_steps: int = option(
        0,
        "training",
        "stop after N optimizer steps instead (0: --epochs decides); the schedule ends there too",
        kind=int,
        metavar="N",
        check=between(0, math.inf),
    )
    batch_size: int = option(
        32,
        "training",
        "rows per optimizer step, over all processes together",
        kind=int,
        metavar="ROWS",
        check=between(1, math.inf),
    )
    micro_batch_size: int = option(
        0,
        "training",
        "rows per forward pass on one process, to save memory (0: all of its rows at once)",
        kind=int,
        metavar="ROWS",
        check=between(0, math.inf),
    )
    lr: float = option(2e-5, "training", "peak learning rate", kind=float, metavar="RATE", check=above(0))
    weight_decay: float = option(
        0.01,
        "training",
        "AdamW weight decay; biases and LayerNorm are exempt",
        kind=float,
        metavar="RATE",
        check=between(0, math.inf),
    )
    layerwise_lr_decay: float = option(
        1.0,
        "training",
        "factor applied to the rate once per layer away from the head",
        kind=float,
        metavar="F",
        check=lambda v: "" if 0 < v <= 1 else "must be above 0 and at most 1",
    )
    schedule: str = option(
        "linear",
        "training",
        "rate after warm-up: linear (to 0), cosine (to 0) or constant",
        metavar="NAME",
        check=one_of("linear", "cosine", "constant"),
    )
    warmup_ratio: float = option(
        0.06,
        "training",
        "fraction of all steps over which the rate rises from 0",
        kind=float,
        metavar="SHARE",
        check=between(0, 1),
    )
    max_grad_norm: float = option(
        1.0,
        "training",
        "clip the gradient's global norm to this (0: never)",
        kind=float,
        metavar="NORM",
        check=between(0, math.inf),
    )
    label_smoothing: float = option(
        0.0,
        "training",
        "probability mass spread evenly over all classes",
        kind=float,
        metavar="P",
        check=between(0, 1, False),
    )
    skip_nonfinite: int = option(
        0,
        "training",
        "pass over up to N batches in a row whose gradient is not finite, instead of stopping (0: stop)",
        kind=int,
        metavar="N",
        check=between(0, math.inf),
        changeable=True,
    )
    class_weights: str | None = option(
        None,
        "training",
        "factor on the loss of every class's rows: numbers, or balanced, so that all classes weigh the same",
        metavar="balanced|W0,W1,...",
        check=_check_class_weights,
    )
    restart_on_collapse: int = option(
        0,
        "training",
        "begin again, at most N times, with half the rate and another seed, once the model answers every text alike",
        kind=int,
        metavar="N",
        check=between(0, 100),
        changeable=True,
    )
    calibrate: bool = option(
        False,
        "training",
        "calibrate the probabilities of the written model: divide its logits by a temperature fitted on dev",
        kind=bool,
    )
    seed: int = option(
        0,
        "training",
        "seed of the row order, the new head and dropout",
        kind=int,
        metavar="N",
        check=between(0, 2**31 - 1),
    )

    device: str = option(
        "auto",
        "machine",
        "auto (CUDA where there is one), cpu or cuda",
        metavar="NAME",
        check=one_of("auto", "cpu", "cuda"),
        changeable=True,
    )
    precision: str = option(
        "auto",
        "machine",
        "bf16 (fp32 master weights), fp32, tf32 (CUDA: fp32 with faster, rounded products), or auto (bf16 where the"
        " device computes it natively, else fp32)",
        metavar="NAME",
        check=one_of("auto", "bf16", "fp32", "tf32"),
    )
    deterministic: bool = option(
        False,
        "machine",
        "on CUDA, take only kernels that give the same bits at every repetition; a CPU always does",
        kind=bool,
    )
    compile: bool = option(
        True,
        "machine",
        "compile what is not a matrix product: with GCC on a CPU, the optimizer's pass with Triton on CUDA",
        kind=bool,
    )
    threads: int = option(
        0,
        "machine",
        "CPU threads per process (0: the cores at hand, shared among this node's processes)",
        kind=int,
        metavar="N",
        check=between(0, 1024),
        changeable=True,
    )
    timeout_minutes: float = option(
        10.0,
        "machine",
        "minutes without an answer after which another process counts as lost",
        kind=float,
        metavar="MIN",
        check=above(0),
        changeable=True,
    )

    output_dir: str | None = option(
        None, "output", "the run's folder (default: runs/ and the start time)", metavar="DIR", changeable=True
    )
    eval_every: int | None = option(
        None,
        "output",
        "evaluate on dev after every N steps of an epoch and at its end (0: only then; default: about eight times an"
        " epoch, in at most 3 % of the time)",
        kind=int,
        metavar="N",
        check=between(0, math.inf),
    )
    eval_batch_tokens: int = option(
        EVAL_BATCH_TOKENS,
        "output",
        "tokens per forward pass in evaluation, on one process; a longer row is computed alone",
        kind=int,
        metavar="TOKENS",
        check=between(1, math.inf),
    )
    early_stopping_patience: int = option(
        0,
        "output",
        "stop after N evaluations in a row without a better dev accuracy (0: never)",
        kind=int,
        metavar="N",
        check=between(0, math.inf),
    )
    save_every: int = option(
        0,
        "output",
        "write a checkpoint every N steps in addition to the end of every epoch (0: only then)",
        kind=int,
        metavar="N",
        check=between(0, math.inf),
        changeable=True,
    )
    keep_checkpoints: int = option(
        2,
        "output",
        "how many of the newest checkpoints to keep, at least 2",
        kind=int,
        metavar="N",
        check=between(2, math.inf),
        changeable=True,
    )
    log_every: int = option(
        50,
        "output",
        "write a line of training metrics every N steps: means since the last line",
        kind=int,
        metavar="N",
        check=between(1, math.inf),
        changeable=True,
    )
    tensorboard_dir: str | None = option(
        None, "output", "TensorBoard events (default: tensorboard/ in the run's folder)", metavar="DIR", changeable=True
    )

    @property
    def classes(self) -> list[str]:
        """Names of the classes 0, 1, ...; without --label-names they are known when the training file has been read."""
        if self.label_names is None:
            raise ValueError("the training file has not been read")
        return self.label_names


OPTIONS = {field.name: field for field in dataclasses.fields(Config)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """Write an option's value as the command line takes it."""
    return ",".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def check(config: Config) -> None:
    """Check whatever the options and the file system alone can tell.

    Raises:
        UserError: naming the option, its value and the cure.
    """
    for name, field in OPTIONS.items():
        value = getattr(config, name)
        if value == "":
            raise UserError(f"{flag(name)} is empty; give a value, or leave it out")
        problem = field.metadata["check"](value) if field.metadata["check"] and value is not None else ""
        if problem:
            raise UserError(f"{flag(name)} {problem}, not {shown(value)!s}")
    try:
        if config.data_dir is not None and not Path(config.data_dir).is_dir():
            raise UserError(f"--data-dir {config.data_dir} is not a folder")
        files = [("train_file", config.train_file), ("dev_file", config.dev_file)]
        files += [("test_file", file) for file in config.test_file]
        files += [("eval_file", str(named_file(value)[1])) for value in config.eval_file]
        for name, file in files:
            if file and not Path(file).is_file():
                raise UserError(f"{flag(name)} {file} is not a file")
    except OSError as error:
        raise UserError(f"cannot look at {error.filename}: {error.strerror}") from None
    if config.label_names and config.class_weights not in (None, "balanced"):
        weights = str(config.class_weights).count(",") + 1
        if weights != len(config.label_names):
            raise UserError(f"--class-weights has {weights} numbers, but there are {len(config.label_names)} classes")
    if config.text_pair_column is not None and config.max_length < SHORTEST_PAIR:
        raise UserError(
            f"--max-length must be {SHORTEST_PAIR} or more with --text-pair-column, not {config.max_length}"
        )
    if config.train_file and not config.dev_file and not config.data_dir:
        raise UserError("--train-file without --dev-file: name a file to evaluate on, or a --data-dir that has one")
    if config.dev_file and not config.train_file and not config.data_dir:
        raise UserError("--dev-file without --train-file: name a file to train on, or a --data-dir that has one")
