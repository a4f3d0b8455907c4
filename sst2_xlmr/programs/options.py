"""The options of all programs but train, and their checks. Imports neither torch nor numpy, which take seconds."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sst2_xlmr.cli import OneLineParser, add_options, positive, train_parser, with_files
from sst2_xlmr.config import ABSTAINED, COLUMN_OPTIONS, EVAL_BATCH_TOKENS, PRECISIONS, TEXT_OPTIONS, check_values
from sst2_xlmr.data.formats import KINDS, or_list
from sst2_xlmr.util.downloads import BUNDLE_URLS, cache_dir
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import scratch_folder, write_errors

EXPORT_FORMATS = ("hf", "onnx", "onnx-int8", "onnx-hf", "onnx-hf-int8", "torchscript")
TABLE_OPTIONS = [name for name in COLUMN_OPTIONS if name != "format"]  # here --format is the export's
FETCHED = ("sst2", *BUNDLE_URLS)
Add = Callable[..., Any]  # a parser's `add_argument`
ROWS_FILE = f"{or_list(KINDS)} file, optionally with .gz"


def check_output(option: str, path: Path, overwrite: bool | None = None, makes_parents: bool = False) -> None:
    """Raise UserError if an output file or folder already exists, or cannot be written.

    An existing file or link may be replaced if `overwrite`, which is None for programs without --overwrite.
    """
    if os.path.lexists(path) and (not overwrite or not path.is_file()):
        fix = ", or replace it with --overwrite" if overwrite is False and path.is_file() else ""
        raise UserError(f"{option} {path} already exists; choose another name{fix}")
    with write_errors(path):
        path = path.absolute()
        if makes_parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path):
            pass


def number_to(highest: float, what: str) -> Callable[[str], float]:
    """Return a parser, for argparse's `type`, of a number from 0 to `highest`; errors call it a `what`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 <= float(text) <= highest:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from 0 to {highest:g}")

    return parse


probability, share, weight = number_to(1, "probability"), number_to(0.9, "share"), number_to(1000, "weight")


def add_model_options(add: Add) -> None:
    what = "a trained model's folder, or owner/name[@revision] on the Hub; repeat it to average several models"
    add("--model", required=True, action="append", dest="models", type=Path, metavar="DIR|NAME", help=what)
    what = f"tokens per forward pass (a longer row: alone) [{EVAL_BATCH_TOKENS}]"
    add("--batch-tokens", type=positive, default=EVAL_BATCH_TOKENS, metavar="TOKENS", help=what)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 if native, else fp32; int8: needs VNNI")


def add_bounds(add: Add) -> None:
    """Add the bounds for comparing two precisions."""
    percent = number_to(100, "percentage")
    add("--most-changed", type=percent, default=1.0, metavar="PERCENT", help="fail if more predictions change [1]")
    add("--most-lost", type=percent, default=0.3, metavar="POINTS", help="fail if the main metric loses more [0.3]")


def predict(parser: OneLineParser, add: Add) -> None:
    """Classify texts: prints a label and a probability for each, in order."""
    add_model_options(add)
    add("--input", type=Path, metavar="FILE", help=f"texts: a {ROWS_FILE}")
    add_options(parser, *TEXT_OPTIONS)
    add("--output", type=Path, metavar="FILE", help=f"write to a {ROWS_FILE} instead of standard output")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--resume", action="store_true", help="continue a killed run with the same --input and --output")
    add("--abstain-below", type=probability, default=0.0, metavar="P", help=f"predict {ABSTAINED} below probability P")
    add("--all-probabilities", action="store_true", help="add a column for the probability of every label")
    add("--glue-submission", type=Path, metavar="DIR", help="write DIR/SST-2.tsv for the GLUE server")
    add("sentences", nargs="*", metavar="SENTENCE", help="default: the lines of standard input")


def evaluate(parser: OneLineParser, add: Add) -> None:
    """Evaluate a trained model on labelled files, compare precisions, calibrate."""
    add_model_options(add)
    rows = f"labelled rows: a {ROWS_FILE}; may be repeated"
    add("--calibrate", type=Path, metavar="FILE", help="fit a temperature on these rows, and write --output")
    add("--output", type=Path, metavar="DIR", help="the new folder of the calibrated model")
    add("--file", default=[], nargs="+", action="extend", metavar="[NAME=]FILE", help=rows)
    add_options(parser, *COLUMN_OPTIONS, "columns", "label_names")
    add("--against", choices=("bf16", "fp32"), help="also compute in this precision, and compare")
    add_bounds(add)
    add("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    add("--overwrite", action="store_true", help="replace an existing --json file")
    add("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard scalars and plots to this folder")


def export(parser: OneLineParser, add: Add) -> None:
    """Write a trained model as a Hugging Face folder, ONNX or TorchScript, and check it."""
    add("--model", required=True, type=Path, metavar="DIR|NAME", help="model folder, or owner/name on the Hub")
    add("--format", required=True, dest="export_format", choices=EXPORT_FORMATS, help="what to write")
    add("--output", required=True, type=Path, metavar="PATH", help="the new folder (hf, onnx-hf) or file")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights; hf only [fp32]")
    add("--from-ids", action="store_true", help="onnx: take token ids instead of texts")
    add("--keep-vocabulary-of", nargs="+", default=[], metavar="FILE", help="keep only these texts' embedding rows")
    add("--check-file", nargs="+", default=[], metavar="[NAME=]FILE", help="rows or lines of text to compare on")
    add_options(parser, *TABLE_OPTIONS)
    add_bounds(add)


def split(parser: OneLineParser, add: Add) -> None:
    """Split a file of rows into train, dev and test."""
    add("--train-file", required=True, type=Path, metavar="FILE", help="labelled rows")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="new folder for the files")
    add("--test-share", type=share, default=0.0, metavar="P", help="share of each class's rows for the test set [0]")
    add("--dev-share", type=share, default=0.0, metavar="P", help="share of each class's rows for dev [0]")
    add("--rows", type=positive, metavar="N", help="instead of --test-share: number of rows in the test set")
    add("--keep-parts-apart", action="store_true", help="with --rows: no test text is part of a training text")
    add("--train-rows", type=positive, metavar="N", help="train on N random rows of the remaining ones [all]")
    add("--seed", type=int, default=0, metavar="N", help="random seed [0]")
    add_options(parser, *TEXT_OPTIONS, "label_column")


def seed_list(text: str) -> list[int]:
    seeds = [int(seed) for seed in text.split(",") if seed.isdecimal()]
    if len(set(seeds)) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different seeds such as 1,2,3")
    return seeds


def study(parser: OneLineParser, add: Add) -> None:
    """Compare settings over several seeds."""
    add("--seeds", type=seed_list, metavar="N,...", help="seeds; one run for each")
    add("--folds", type=int, default=0, metavar="K", help="instead of --seeds: K-fold cross-validation")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="folder that gets one folder per setting")
    add("--setting", nargs=2, action="append", default=[], metavar=("NAME", "OPTIONS"), help="a setting to compare")


def distill(parser: OneLineParser, add: Add) -> None:
    """Train on labelled rows and on teachers' predictions for unlabelled texts."""
    add("--teacher", nargs="+", action="extend", default=[], metavar="DIR", help="trained models [the labelled runs]")
    add("--unlabelled", nargs="+", action="extend", required=True, type=Path, metavar="FILE", help="unlabelled texts")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="folder that gets one folder per round")
    add("--seeds", type=seed_list, default=[1], metavar="N,...", help="seeds; one run for each [1]")
    add("--rounds", type=positive, default=1, metavar="N", help="rounds; the students of each teach the next [1]")
    add("--labelled", default="", metavar="OPTIONS", help="options only for the runs on labelled rows")
    add("--temperature", type=number_to(10, "temperature"), metavar="T", help="divide the teachers' logits by T [1]")
    add("--align-classes", action="store_true", help="give soft labels the class shares of the labelled rows")
    add("--unlabelled-weight", type=weight, default=1.0, metavar="W", help="weight of an unlabelled row's loss [1]")
    add("--teacher-precision", choices=PRECISIONS, default="auto", help="precision of the teachers [auto]")


def fetch(parser: OneLineParser, add: Add) -> None:
    """Fetch data and encoders ahead of time."""
    ours = ", ".join(FETCHED)
    add("names", nargs="*", metavar="NAME", help=f"{ours}, or OWNER/NAME[@REVISION] on the Hub [sst2 xlmr.base]")
    add("--cache-dir", metavar="DIR", type=Path, help=f"cache for {ours} [{cache_dir()}]")


def serve(parser: OneLineParser, add: Add) -> None:
    """Serve a trained model over HTTP."""
    add_model_options(add)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all [127.0.0.1]")
    add("--port", type=int, default=8000, help="port to listen on [8000]")
    add("--workers", type=positive, default=1, metavar="N", help="worker processes, which share the cores [1]")
    add("--abstain-below", type=probability, default=0.0, metavar="P", help=f"predict {ABSTAINED} below probability P")


PROGRAMS: dict[str, Callable[[OneLineParser, Add], None]] = {
    each.__name__: each for each in (predict, evaluate, export, split, study, distill, fetch, serve)
}
FOR_TRAIN = {"--setting": 2, "--labelled": 1}  # flag -> which of its words (from 1) holds options for train.py


def parse(program: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse a program's command line; the words of study and distill that train.py is to parse are `for_train`."""
    parser = OneLineParser(description=PROGRAMS[program].__doc__)
    PROGRAMS[program](parser, parser.add_argument)
    words: list[Any] = sys.argv[1:] if argv is None else list(argv)
    if program not in ("study", "distill"):
        arguments = parser.parse_args(words)
        names = (*COLUMN_OPTIONS, "columns", "label_names")
        check_values({name: value for name, value in vars(arguments).items() if name in names})
        return arguments
    for place, word in enumerate(words):
        if (at := place + FOR_TRAIN.get(word, 0)) > place and at < len(words):
            words[at] = f" {words[at]}"  # otherwise argparse would parse its "--freeze-encoder" as this program's
    arguments, for_train = parser.parse_known_args(words)
    arguments.for_train = for_train
    return arguments


def refuse_wrong_flags(program: str, words: list[str]) -> None:
    """Print --help, or raise UserError for a wrong flag, before anything slow is imported."""
    if program != "train":
        parse(program, words)
    elif all(Path(word[1:]).is_file() for word in words if word.startswith("@")):  # a pipe can be read only once
        train_parser().parse_args(with_files(words))
