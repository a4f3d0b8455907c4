"""Measure training and evaluation on this machine, alone or against transformers' Trainer; weights are random.

    python scripts/bench/bench.py --data-dir data/SST-2                          # rates, phases, memory, utilisation
    python scripts/bench/bench.py --data-dir data/SST-2 --peer ../peer/bin/python  # also the ratios to the Trainer
    python scripts/bench/bench.py --only eval,int8 --peer ../peer/bin/python     # prediction in 8 bits, too
    python scripts/bench/bench.py --only processes --processes 1,2               # one thread a process
    python scripts/bench/bench.py --only rows --rows 10000,1000000               # train.py's time to its first step

Prints JSON; progress goes to standard error. Every figure is the median of the rounds, with their minimum (`min`) and
maximum (`max`). Machines are noisy: a round measures everything once, one after the other, and ratios are taken round
by round. With `--peer` every measurement has a new process; without it one process serves all rounds, and its later
ones meet batch shapes that it has seen.

The Trainer's environment needs a current torch, transformers and accelerate: `python -m venv ../peer`, then
`../peer/bin/pip install "transformers[torch]"`; peer.py says how the Trainer is set up.

Both sides evaluate the whole dev split. In training each side orders the whole train split in its own way, and the
steps are batches of that order, spread evenly over their lengths (sampling.py). So both train on rows of the same mean
length, `tokens_per_row`, which is that of the split (`settings`), and each pads as much as in real training:
`computed_tokens_per_row` counts padding too.

Utilisation is the rate of the operations that the rows need (`model_flops` in worker.py) over the rate of a plain
matrix product in the same precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
from figures import Answer, rounded
from many_rows import measure_rows
from runs import ROOT, measure_processes, measure_rates
from spec import Setup, find_files, read_tokens, write_spec

from sst2_xlmr.cli import OneLineParser, positive
from sst2_xlmr.config import Config, check
from sst2_xlmr.data.rows import SST2_NAMES
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, TOKENIZER_NAME, EncoderShape, read_shape
from sst2_xlmr.util.distributed import choose_device
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.precision import choose_precision

SHAPES = {**BUNDLE_SHAPES, "small": EncoderShape(hidden=384, layers=12, heads=12, ffn=1536)}
MEASURED, WITH_COUNTS = ("train", "eval", "int8"), ("processes", "rows")
PARTS = (*MEASURED, *WITH_COUNTS)
MAX_LENGTH = 128  # tokens; SST-2's longest sentence has fewer


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def parts(text: str) -> list[str]:
    if wrong := set(text.split(",")) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{min(wrong)!r} is not one of {', '.join(PARTS)}")
    return text.split(",")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description="Measure training and evaluation; prints JSON.", allow_abbrev=False)
    add = parser.add_argument
    add("--shape", default="xlmr.base", metavar="NAME|DIR", help=f"{', '.join(SHAPES)}, or a folder with config.json")
    add("--data-dir", default=str(ROOT / "sample_data"), metavar="DIR", help="folder with train and dev [sample_data]")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model [the --shape folder's, or models/small's]")
    add("--batch-size", type=int, default=16, metavar="ROWS", help="rows per optimizer step [16]")
    add(
        "--eval-batch-size",
        type=int,
        default=64,
        metavar="ROWS",
        help="rows per forward pass of the peer's evaluation [64]",
    )
    add("--precision", default="auto", metavar="NAME", help="auto, bf16 or fp32 [auto]")
    add("--steps", type=positive, default=30, metavar="N", help="timed optimizer steps per round [30]")
    add("--warmup-steps", type=positive, default=3, metavar="N", help="steps before, not timed [3]")
    add("--rounds", type=positive, default=3, metavar="N", help="how often everything is measured [3]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda [auto]")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads [0: the cores at hand]")
    add("--full-vocabulary", action="store_true", help="train the whole embedding table, not only the rows in use")
    add("--no-compile", action="store_true", help="measure what runs where nothing can be compiled")
    add(
        "--peer",
        default="",
        metavar="PYTHON",
        help="Python of an environment with transformers, to compare with its Trainer",
    )
    add("--processes", type=positives, default=[], metavar="N,...", help="measure with so many processes")
    add("--processes-batch-size", type=positive, default=32, metavar="ROWS", help="global batch of --processes [32]")
    add("--rows", type=positives, default=[], metavar="N,...", help="measure train.py's start on files of so many rows")
    add("--only", type=parts, metavar="PART,...", help=f"of {', '.join(PARTS)} [train and eval, and what is asked for]")
    add("--out", type=Path, metavar="FILE", help="write the JSON there too")
    arguments = parser.parse_args(argv)
    wanted = ["train", "eval", *(part for part in WITH_COUNTS if getattr(arguments, part))]
    arguments.only = arguments.only or wanted
    for part in WITH_COUNTS:
        if part in arguments.only and part not in wanted:
            raise UserError(f"--only {part} needs --{part} N,...")
    if "int8" in arguments.only and "eval" not in arguments.only:
        raise UserError("--only int8 needs eval, which it is compared with")
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise UserError(f"--out {arguments.out}: its folder does not exist")
    return arguments


def find_shape(arguments: argparse.Namespace) -> tuple[EncoderShape, Path]:
    """Return the encoder's sizes, and the tokenizer's file."""
    tokenizer_file = ROOT / "models" / "small" / TOKENIZER_NAME
    if arguments.shape in SHAPES:
        shape = SHAPES[arguments.shape]
    else:
        folder = Path(arguments.shape)
        if not folder.is_dir():
            raise UserError(f"--shape {folder}: neither one of {', '.join(SHAPES)} nor a folder that is there")
        shape = read_shape(folder)
        if (folder / TOKENIZER_NAME).is_file():
            tokenizer_file = folder / TOKENIZER_NAME
    tokenizer_file = arguments.tokenizer or tokenizer_file
    if not tokenizer_file.is_file():
        raise UserError(
            f"no SentencePiece model {tokenizer_file}: name one with --tokenizer FILE,"
            " or make models/small with scripts/fetch_small_encoder.py"
        )
    return shape, tokenizer_file


def build_setup(arguments: argparse.Namespace) -> Setup:
    """Return what is measured, with everything decided that depends on the machine."""
    shape, tokenizer_file = find_shape(arguments)
    config = Config(
        data_dir=arguments.data_dir,
        label_names=SST2_NAMES,
        max_length=min(MAX_LENGTH, shape.positions - 2),
        full_vocabulary=arguments.full_vocabulary,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        compile=not arguments.no_compile,
        threads=arguments.threads,
    )
    check(config)
    device = choose_device(config.device, 0, max(arguments.processes, default=1))
    if "int8" in arguments.only and device.type != "cpu":
        raise UserError("--only int8 measures a CPU; add --device cpu")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    precision = choose_precision(config.precision, device)
    config = dataclasses.replace(config, device=device.type, precision=precision, threads=torch.get_num_threads())
    return Setup(config, shape, tokenizer_file, arguments.steps, arguments.warmup_steps, arguments.eval_batch_size)


def describe(arguments: argparse.Namespace, setup: Setup, spec: Path) -> Answer:
    """Return on what machine, with what versions and settings the figures were obtained."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.is_file() else []
    with np.load(spec.with_name("rows.npz")) as arrays:
        table_rows = len(arrays["kept_ids"])
        tokens_per_row = {
            split: rounded(arrays[f"{split}_offsets"][-1] / len(arrays[f"{split}_labels"]))
            for split in ("train", "dev")
        }
    config = setup.config
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": config.threads,
        "preloaded": os.environ.get("LD_PRELOAD"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "shape": {"name": arguments.shape, **dataclasses.asdict(setup.shape)},
        "table_rows": table_rows,
        "tokens_per_row": tokens_per_row,  # of the whole splits
        **{
            name: getattr(config, name)
            for name in ("precision", "device", "batch_size", "eval_batch_tokens", "max_length")
        },
        **{name: getattr(arguments, name) for name in ("eval_batch_size", "steps", "warmup_steps", "rounds")},
    }


def measure(arguments: argparse.Namespace, folder: Path) -> Answer:
    """Measure what the command line asks for; the folder is for files of the measured processes."""
    setup = build_setup(arguments)
    files = find_files(arguments.data_dir)
    spec = write_spec(folder / "rates", read_tokens(files, setup), setup)
    result: Answer = {"settings": describe(arguments, setup, spec)}
    if tasks := [part for part in MEASURED if part in arguments.only]:
        result.update(measure_rates(tasks, arguments.peer, arguments.rounds, setup.config, spec))
    if "processes" in arguments.only:
        one_thread = dataclasses.replace(setup.config, batch_size=arguments.processes_batch_size, threads=1)
        setup_of_processes = setup._replace(config=one_thread)
        caches = read_tokens(files, setup_of_processes)
        spec_of_processes = write_spec(folder / "processes", caches, setup_of_processes)
        result["processes"] = measure_processes(arguments.processes, arguments.rounds, spec_of_processes)
    if "rows" in arguments.only:
        result["rows"] = measure_rows(arguments.rows, files, setup.config, spec)
    return result


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="sst2-xlmr-bench-") as temporary:
        result = measure(arguments, Path(temporary))
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        try:
            arguments.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write --out {arguments.out}: {error.strerror}") from None


if __name__ == "__main__":
    exit_on_user_error(main)
