"""Measure training and evaluation on this machine, alone or against transformers' Trainer; weights are random.

    python scripts/bench/bench.py --data-dir data/SST-2                          # rates, phases, memory, utilisation
    python scripts/bench/bench.py --data-dir data/SST-2 --peer ../peer/bin/python  # also the ratios to the Trainer
    python scripts/bench/bench.py --only processes --processes 1,2               # one thread a process
    python scripts/bench/bench.py --only rows --rows 10000,1000000               # train.py's time to its first step

Prints JSON; progress goes to standard error. Every figure is the median of the rounds, beside it their least (`min`)
and greatest (`max`). Machines are noisy: within a round everything is measured once, one after the other, and a ratio
is taken in every round. With `--peer` every measurement has a new process; without it one process serves all rounds,
and its later ones meet batch shapes that it has seen.

The Trainer's environment needs a current torch, transformers and accelerate: `python -m venv ../peer`, then
`../peer/bin/pip install "transformers[torch]"`. Both sides train on the same sample of the train split (see
peer.py for how the Trainer is set up) and evaluate the whole dev split. Rows of like length are grouped within
the sample: with fewer than 100 steps there is more padding than in a long run, on both sides. Utilisation is the rate
of the operations that the rows need (`model_flops` in worker.py) over the rate of a plain matrix product in the
same precision.
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
from runs import ROOT, Answer, measure_processes, measure_rates, measure_rows, rounded

from sst2_xlmr import sources
from sst2_xlmr.cli import OneLineParser
from sst2_xlmr.config import Config, check
from sst2_xlmr.data.formats import find_split, no_split
from sst2_xlmr.data.rows import SST2_NAMES, Columns
from sst2_xlmr.data.token_cache import TokenCache, tokenize_file
from sst2_xlmr.distributed import choose_device, choose_precision
from sst2_xlmr.errors import UserError, exit_on_user_error
from sst2_xlmr.model.compact_vocab import used_ids
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, TOKENIZER_NAME, EncoderShape, read_shape

SHAPES = {**BUNDLE_SHAPES, "small": EncoderShape(hidden=384, layers=12, heads=12, ffn=1536)}
PARTS = ("train", "eval", "processes", "rows")
MAX_LENGTH = 128  # tokens; SST-2's longest sentence has fewer


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


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
    wanted = ["train", "eval", *(part for part in PARTS[2:] if getattr(arguments, part))]
    arguments.only = arguments.only or wanted
    for part in PARTS[2:]:
        if part in arguments.only and part not in wanted:
            raise UserError(f"--only {part} needs --{part} N,...")
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


def build_config(arguments: argparse.Namespace, shape: EncoderShape) -> Config:
    """Return train.py's options for what is measured, with everything that the machine decides decided."""
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
    torch.set_num_threads(config.threads or torch.get_num_threads())
    precision = choose_precision(config.precision, device)
    return dataclasses.replace(config, device=device.type, precision=precision, threads=torch.get_num_threads())


def sample_rows(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return so many row numbers in random order, spread evenly over the lengths, so that few rows stand for all.

    A sample larger than the file has rows more than once.
    """
    random = np.random.RandomState(seed)
    order = random.permutation(len(lengths))
    by_length = order[np.argsort(lengths[order], kind="stable")]
    return random.permutation(by_length[((np.arange(count) + 0.5) * len(lengths) / count).astype(np.int64)])


def subset(cache: TokenCache, rows: np.ndarray) -> dict[str, np.ndarray]:
    ids = [cache.ids[cache.offsets[row] : cache.offsets[row + 1]] for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return {"ids": np.concatenate(ids), "offsets": offsets, "labels": cache.labels[rows]}


def find_files(data_dir: str) -> dict[str, Path]:
    files = {}
    for split in ("train", "dev"):
        file = find_split(Path(data_dir), split)
        if file is None:
            raise no_split(Path(data_dir), split)
        files[split] = file
    return files


def write_spec(
    folder: Path,
    files: dict[str, Path],
    arguments: argparse.Namespace,
    config: Config,
    shape: EncoderShape,
    tokenizer_file: Path,
) -> Path:
    """Write what the measured processes need: options, and rows as ids, of the train split a fixed sample."""
    cache_dir = sources.cache_dir() / "tokens"
    caches = {
        split: tokenize_file(file, tokenizer_file, Columns(), SST2_NAMES, config.max_length, cache_dir)
        for split, file in files.items()
    }
    largest_id = max(int(cache.ids.max()) for cache in caches.values())
    if largest_id >= shape.vocab_size:
        raise UserError(f"{tokenizer_file} gives ids up to {largest_id}, but the shape has {shape.vocab_size} rows")
    kept_ids = np.arange(shape.vocab_size)
    if not config.full_vocabulary:
        kept_ids = used_ids((cache.ids for cache in caches.values()), shape.vocab_size)
    lengths = caches["train"].lengths()
    samples = {
        split: sample_rows(lengths, steps * config.batch_size, config.seed)
        for split, steps in (("warmup", arguments.warmup_steps), ("train", arguments.steps))
    }
    arrays = {"kept_ids": kept_ids}
    for split, cache, rows in (
        ("warmup", caches["train"], samples["warmup"]),
        ("train", caches["train"], samples["train"]),
        ("dev", caches["dev"], np.arange(len(caches["dev"]))),
    ):
        arrays.update({f"{split}_{part}": array for part, array in subset(cache, rows).items()})
    folder.mkdir()
    np.savez(folder / "rows.npz", **arrays)
    spec = {
        "config": dataclasses.asdict(config),
        "shape": dataclasses.asdict(shape),
        "rows_file": str(folder / "rows.npz"),
        "steps": arguments.steps,
        "warmup_steps": arguments.warmup_steps,
        "eval_batch_size": arguments.eval_batch_size,
        "encoder_folder": str(folder / "encoder"),
        "tokenizer_file": str(tokenizer_file.absolute()),
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"


def describe(arguments: argparse.Namespace, config: Config, shape: EncoderShape, spec: Path) -> Answer:
    """Say on what machine, with what versions and settings the figures were obtained."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.is_file() else []
    with np.load(spec.with_name("rows.npz")) as arrays:
        table_rows = len(arrays["kept_ids"])
        tokens = {
            task: len(arrays[f"{split}_ids"]) / len(arrays[f"{split}_labels"])
            for task, split in (("train", "train"), ("eval", "dev"))
        }
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": config.threads,
        "preloaded": os.environ.get("LD_PRELOAD"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "shape": {"name": arguments.shape, **dataclasses.asdict(shape)},
        "table_rows": table_rows,
        "tokens_per_row": {task: rounded(mean) for task, mean in tokens.items()},
        **{
            name: getattr(config, name)
            for name in ("precision", "device", "batch_size", "eval_batch_tokens", "max_length")
        },
        **{name: getattr(arguments, name) for name in ("eval_batch_size", "steps", "warmup_steps", "rounds")},
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parse_args(argv)
    shape, tokenizer_file = find_shape(arguments)
    config = build_config(arguments, shape)
    with tempfile.TemporaryDirectory(prefix="sst2-xlmr-bench-") as temporary:
        folder = Path(temporary)
        files = find_files(arguments.data_dir)
        spec = write_spec(folder / "rates", files, arguments, config, shape, tokenizer_file)
        result: Answer = {"settings": describe(arguments, config, shape, spec)}
        if tasks := [part for part in ("train", "eval") if part in arguments.only]:
            result.update(measure_rates(tasks, arguments.peer, arguments.rounds, config, spec))
        if "processes" in arguments.only:
            shared = dataclasses.replace(config, batch_size=arguments.processes_batch_size, threads=1)
            shared_spec = write_spec(folder / "processes", files, arguments, shared, shape, tokenizer_file)
            result["processes"] = measure_processes(arguments.processes, arguments.rounds, shared_spec)
        if "rows" in arguments.only:
            result["rows"] = measure_rows(arguments.rows, files, config, spec)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        try:
            arguments.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write --out {arguments.out}: {error.strerror}") from None


if __name__ == "__main__":
    exit_on_user_error(main)
