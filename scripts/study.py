"""Compare settings over several seeds: mean and deviation of the accuracy, time, and intervals of the differences.

    python scripts/study.py --seeds 1,2,3 --output-dir runs/study --encoder models/small --batch-size 32 --lr 5e-5 \\
        --epochs 1 --setting plain "" --setting longer "--epochs 3 --lr 7e-5" --peer ../peer/bin/python

All other options go to train.py, for every setting; those of a setting come after them. The run of setting NAME and
seed N is the folder NAME/seed-N in --output-dir; without --setting there is one, `ours`. --peer also trains
transformers' Trainer, with rows grouped by length, on the same rows, with the options for all settings and the same
seeds; its results stand under `trainer`.

What is finished is skipped, and what was stopped continues, so the same command with more seeds or settings adds them.
The table has the accuracy after the last step on dev and on every test file, the best on dev, and the seconds of the
whole command. Differences are to the Trainer, or else to the first setting, seed by seed, with a 95 % interval. The
same numbers are in study.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from sst2_xlmr.cli import OneLineParser, parse_args
from sst2_xlmr.config import Config, flag
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.distributed import choose_device
from sst2_xlmr.errors import UserError, exit_on_user_error
from sst2_xlmr.files import write_text
from sst2_xlmr.numerics import choose_precision
from sst2_xlmr.training.schedule import Schedule
from sst2_xlmr.training.signals import SIGNALS

SCRIPTS = Path(__file__).resolve().parent
TRAIN_PROGRAM = SCRIPTS.parent / "train.py"
PEER_PROGRAM = SCRIPTS / "bench" / "peer_training.py"
TRAINER = "trainer"
TRAINER_LACKS = (
    "max_steps",
    "schedule",
    "layerwise_lr_decay",
    "label_smoothing",
    "class_weights",
    "freeze_encoder",
    "early_stopping_patience",
)
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more, the last makes intervals a little
# too wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Results = dict[int, dict[str, float]]  # by seed, then column


class Study(NamedTuple):
    """What is asked for.

    Attributes:
        settings: name -> words for train.py, those of all settings included.
        common: words for all settings.
        peer: Python that has transformers; empty for none.
    """

    seeds: list[int]
    folder: Path
    settings: dict[str, list[str]]
    common: list[str]
    peer: str


def seed_list(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len({int(seed) for seed in seeds}) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different seeds such as 1,2,3")
    return [int(seed) for seed in seeds]


def parse(argv: list[str] | None) -> Study:
    parser = OneLineParser(description="Compare settings over several seeds.", allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", required=True, type=seed_list, metavar="N,...", help="one run for each")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="gets a folder for each setting")
    add("--setting", nargs=2, action="append", default=[], metavar=("NAME", "OPTIONS"), help="may be repeated")
    add("--peer", default="", metavar="PYTHON", help="also train the Trainer, with an environment's bin/python")
    words = sys.argv[1:] if argv is None else list(argv)
    for place, word in enumerate(words[:-2]):
        if word == "--setting":
            # Or argparse would take the setting's "--freeze-encoder" for an option of this script.
            words[place + 2] = f" {words[place + 2]}"
    own, rest = parser.parse_known_args(words)
    settings: dict[str, list[str]] = {}
    for name, options in own.setting or [("ours", "")]:
        if not name.isidentifier() and not name.replace("-", "").isalnum():
            raise UserError(f"--setting {name!r}: take letters, digits and hyphens for the name, which is a folder's")
        if name in (*settings, TRAINER):
            raise UserError(f"--setting {name}: that name is taken; choose another")
        settings[name] = [*rest, *shlex.split(options)]
    for words in settings.values():
        for word in words:
            if word.split("=")[0] in ("--seed", "--resume", "--output-dir"):
                raise UserError(f"leave out {word}: every run gets its own, and is continued if it is there")
            if word.split("=")[0] == "--config":
                raise UserError("leave out --config, which no run can be continued with; take a file of options, @FILE")
        parse_args([*words, "--output-dir", str(own.output_dir / "unused")])  # a UserError before anything is trained
    if own.peer and not shutil.which(own.peer):
        raise UserError(f"--peer {own.peer} is no program; give an environment's bin/python")
    return Study(own.seeds, own.output_dir, settings, rest, own.peer)


def add_seconds(file: Path, seconds: float) -> None:
    """Add to the seconds that a run has taken, which may have been stopped and continued."""
    before = float(file.read_text(encoding="utf-8")) if file.is_file() else 0.0
    write_text(file, f"{before + seconds:.1f}\n")


def run(command: list[str], log: Path, seconds_file: Path) -> None:
    """Run a command, its output in a file; a signal is passed on.

    Raises:
        SystemExit: with the command's exit status if that is not 0; what it said last is printed.
    """
    start = time.monotonic()
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        # It saves before it ends; alone it would go on. Ctrl-C reaches it twice.
        before = {number: signal.signal(number, lambda sent, _: process.send_signal(sent)) for number in SIGNALS}
        status = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    add_seconds(seconds_file, time.monotonic() - start)
    if status:
        end_with(status, log)


def end_with(status: int, log: Path) -> NoReturn:
    """End with the exit status of a command that failed, and print what it said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print("\n".join([f"{log}:", *lines[-3:]]), file=sys.stderr)
    sys.exit(status if status > 0 else 128 - status)


def train(words: list[str], folder: Path, seed: int) -> bool:
    """Train in `folder`, or continue there; returns False if the run was finished before."""
    options = [*words, "--seed", str(seed), "--output-dir", str(folder)]
    if (folder / "config.json").is_file():
        options.append("--resume")
        parse_args(options)  # a UserError if the run was started with other options
        if (folder / "model").is_dir():
            return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN_PROGRAM), *options]
    run(command, folder.with_suffix(".log"), folder.with_suffix(".seconds"))
    return True


def accuracies(folder: Path) -> dict[str, float]:
    """Return a run's last accuracy on every file, its best on dev, which is that of best/, and its seconds."""
    found: dict[str, float] = {}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    for entry in (line for line in lines if "split" in line):
        found[entry["split"]] = entry["accuracy"]
        if entry["split"] == "dev":
            found["best dev"] = max(entry["accuracy"], found.get("best dev", 0.0))
    return {**found, "seconds": float(folder.with_suffix(".seconds").read_text(encoding="utf-8"))}


def write_peer_inputs(study: Study) -> dict[str, Any]:
    """Write the rows of all files, as ids, for the Trainer; returns what it is to do, but for the seed."""
    config, _ = parse_args([*study.common, "--output-dir", str(study.folder / "unused")])
    inputs = prepare(config, quiet=True)
    config = inputs.config
    if not Path(config.encoder).is_dir():
        raise UserError(f"--peer needs an encoder in a folder that transformers opens, not {config.encoder}")
    defaults = Config()
    for name in TRAINER_LACKS:
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(f"--peer: the Trainer knows no {flag(name)}; put it into a --setting")
    arrays: dict[str, np.ndarray] = {}
    for split, cache in inputs.caches.items():
        if split == "train" and inputs.train_rows is not None:
            cache = cache.subset(inputs.train_rows)
        arrays.update({f"{split}_ids": cache.ids, f"{split}_offsets": cache.offsets, f"{split}_labels": cache.labels})
    folder = study.folder / TRAINER
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "rows.npz", **arrays)
    device = choose_device(config.device)
    batches = -(-len(inputs.train_labels) // config.batch_size)
    names = ("batch_size", "epochs", "lr", "warmup_ratio", "weight_decay", "max_grad_norm", "dropout", "head_dropout")
    return {
        **{name: getattr(config, name) for name in names},
        "encoder": config.encoder,
        "rows_file": str(folder / "rows.npz"),
        "splits": [split for split in inputs.caches if split != "train"],
        "labels": len(config.classes),
        "batches": batches,
        "max_steps": Schedule(config, batches).total_steps,
        "precision": choose_precision(config.precision, device),
        "device": device.type,
        "threads": config.threads,
    }


def train_peer(study: Study, inputs: dict[str, Any], seed: int) -> bool:
    """Let the Trainer train; returns False if it has done so before with the same inputs."""
    folder = study.folder / TRAINER
    result, order = folder / f"seed-{seed}.json", {**inputs, "seed": seed}
    if result.is_file():
        former = json.loads(result.read_text(encoding="utf-8"))["order"]
        if former != json.loads(json.dumps(order)):
            raise UserError(f"{result} was made with other options; remove it, or choose another --output-dir")
        return False
    order_file = folder / f"seed-{seed}.order"
    write_text(order_file, json.dumps(order))
    command = [study.peer, str(PEER_PROGRAM), str(order_file), str(result)]
    run(command, folder / f"seed-{seed}.log", folder / f"seed-{seed}.seconds")
    return True


def peer_accuracies(folder: Path, seed: int) -> dict[str, float]:
    found = json.loads((folder / f"seed-{seed}.json").read_text(encoding="utf-8"))["accuracy"]
    seconds = float((folder / f"seed-{seed}.seconds").read_text(encoding="utf-8"))
    return {**found, "best dev": found["dev"], "seconds": seconds}


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean of paired differences, and half the width of its 95 % interval (Student's t)."""
    count = len(differences)
    quantile = _T95[min(count - 2, len(_T95) - 1)]
    return statistics.mean(differences), quantile * statistics.stdev(differences) / count**0.5


def shared_columns(results: dict[str, Results]) -> list[str]:
    """Return the columns that all runs have; settings may evaluate on different files."""
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    return [column for column in runs[0] if all(column in run for run in runs)]


def summary(results: dict[str, Results]) -> dict[str, Any]:
    """Return mean and deviation (n - 1) of every column per setting, and the differences to the first setting."""
    reference, columns = next(iter(results)), shared_columns(results)
    found: dict[str, Any] = {}
    for name, by_seed in results.items():
        values = {column: [by_seed[seed][column] for seed in by_seed] for column in columns}
        found[name] = {"mean": {column: statistics.mean(values[column]) for column in columns}}
        if len(by_seed) > 1:
            found[name]["deviation"] = {column: statistics.stdev(values[column]) for column in columns}
            if name != reference:
                found[name]["difference"] = {}
                for column in columns:
                    pairs = [by_seed[seed][column] - results[reference][seed][column] for seed in by_seed]
                    mean, half = interval(pairs)
                    found[name]["difference"][column] = {"mean": mean, "half_width": half}
    return found


def table(results: dict[str, Results]) -> list[str]:
    """Return the results in lines: every run, then means and deviations, then differences in points."""
    reference, columns = next(iter(results)), shared_columns(results)
    width = max(12, *(len(name) + 2 for name in results))

    def line(name: str, seed: object, values: dict[str, float]) -> str:
        cells = [f"{values[c]:>12.0f}" if c == "seconds" else f"{values[c]:>12.4f}" for c in columns]
        return f"{name:<{width}}{seed!s:<10}" + "".join(cells)

    lines = [f"{'setting':<{width}}{'seed':<10}" + "".join(f"{column[-11:]:>12}" for column in columns)]
    lines += [line(name, seed, by_seed[seed]) for name, by_seed in results.items() for seed in by_seed]
    found = summary(results)
    for name, figures in found.items():
        lines += [line(name, which, figures[which]) for which in ("mean", "deviation") if which in figures]
    for name, figures in found.items():
        for column, difference in figures.get("difference", {}).items():
            if column != "seconds":
                points, half = difference["mean"] * 100, difference["half_width"] * 100
                lines.append(f"{name} - {reference}, {column}: {points:+.2f} points, 95 % interval +-{half:.2f}")
    return lines


def main(argv: list[str] | None = None) -> None:
    study = parse(argv)
    inputs = write_peer_inputs(study) if study.peer else {}
    results: dict[str, Results] = {name: {} for name in ([TRAINER] if study.peer else []) + list(study.settings)}
    # Seed by seed, so that every setting meets the same state of the machine.
    jobs = [(seed, name) for seed in study.seeds for name in results]
    with tqdm(jobs, unit="run", disable=None, dynamic_ncols=True) as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            if name == TRAINER:
                is_new = train_peer(study, inputs, seed)
                results[name][seed] = peer_accuracies(study.folder / TRAINER, seed)
            else:
                folder = study.folder / name / f"seed-{seed}"
                is_new = train(study.settings[name], folder, seed)
                results[name][seed] = accuracies(folder)
            found = results[name][seed]
            state = f"{found['seconds']:.0f} s" if is_new else "was finished"
            tqdm.write(f"{name}, seed {seed}: {state}, dev {found['dev']:.4f}", file=sys.stdout)
    print("\n".join(table(results)))
    content = {"runs": results, "summary": summary(results)}
    write_text(study.folder / "study.json", json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
