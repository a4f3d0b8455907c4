"""Train with several seeds, one run after another, and print mean and standard deviation of the accuracy.

    python scripts/seeds.py --seeds 1,2,3 --output-dir runs/small @scripts/recipes/small_encoder_sst2.args

All other options go to train.py; the run of seed N is the folder seed-N in --output-dir. A run that fails ends the
script with its exit status. The same command again skips finished runs and continues the others.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from sst2_xlmr.cli import OneLineParser, parse_args
from sst2_xlmr.errors import UserError, exit_on_user_error
from sst2_xlmr.training.signals import SIGNALS

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def seed_list(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len({int(seed) for seed in seeds}) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different seeds such as 1,2,3")
    return [int(seed) for seed in seeds]


def parse(argv: list[str] | None) -> tuple[list[int], Path, list[str]]:
    """Return seeds, folder, and the words that go to train.py."""
    parser = OneLineParser(
        description="Train with several seeds; all other options go to train.py.", allow_abbrev=False
    )
    parser.add_argument("--seeds", required=True, type=seed_list, metavar="N,...", help="one run for each")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="gets a folder seed-N for each")
    own, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.split("=")[0] in ("--seed", "--resume"):
            raise UserError(f"leave out {word}: every run gets its own seed, and is continued if it is there")
    return own.seeds, own.output_dir, rest


def run(options: list[str], folder: Path, seed: int) -> int:
    """Train in `folder`, or continue there; returns the exit status, which is 0 if the run was finished before."""
    options = [*options, "--seed", str(seed), "--output-dir", str(folder)]
    if (folder / "config.json").is_file():
        options.append("--resume")
        parse_args(options)  # a UserError if the run was started with other options
        if (folder / "model").is_dir():
            print(f"seed {seed}: {folder} is finished", flush=True)
            return 0
    print(f"seed {seed}: {folder}", flush=True)
    with subprocess.Popen([sys.executable, str(TRAIN), *options]) as process:
        # Passes signals on and waits for training to save; otherwise it would go on alone. Ctrl-C reaches it twice.
        before = {number: signal.signal(number, lambda sent, _: process.send_signal(sent)) for number in SIGNALS}
        status = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def final_accuracies(folder: Path) -> dict[str, float]:
    """Return a run's last accuracy on every file, and its best on dev, which is that of best/."""
    accuracies: dict[str, float] = {}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    for entry in (line for line in lines if "split" in line):
        accuracies[entry["split"]] = entry["accuracy"]
        if entry["split"] == "dev":
            accuracies["best dev"] = max(entry["accuracy"], accuracies.get("best dev", 0.0))
    return accuracies


def table(results: dict[int, dict[str, float]]) -> str:
    """Return one line per seed, then mean and sample standard deviation (n - 1)."""
    columns = list(next(iter(results.values())))
    rows = {str(seed): [accuracies[column] for column in columns] for seed, accuracies in results.items()}
    per_column = list(zip(*rows.values()))
    rows["mean"] = [statistics.mean(values) for values in per_column]
    if len(results) > 1:
        rows["deviation"] = [statistics.stdev(values) for values in per_column]
    header = f"{'seed':<12}" + "".join(f"{column:>12}" for column in columns)
    lines = [f"{name:<12}" + "".join(f"{value:>12.4f}" for value in values) for name, values in rows.items()]
    return "\n".join([header, *lines])


def main(argv: list[str] | None = None) -> None:
    seeds, output_dir, options = parse(argv)
    folders = {seed: output_dir / f"seed-{seed}" for seed in seeds}
    for seed, folder in folders.items():
        status = run(options, folder, seed)
        if status:
            sys.exit(status)
    print(table({seed: final_accuracies(folder) for seed, folder in folders.items()}))


if __name__ == "__main__":
    exit_on_user_error(main)
