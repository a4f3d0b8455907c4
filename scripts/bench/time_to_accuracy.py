"""Measure the seconds from the command to the first evaluation on dev at or above a target, here and by the Trainer.

    python scripts/bench/time_to_accuracy.py --target 0.87 --seeds 1,2,3 --eval-every 25 --output-dir runs/soon \\
        --peer ../peer/bin/python --encoder models/small --batch-size 32 --lr 5e-5 --epochs 1 \\
        --setting faster "--lr 1e-4"

Options are those of study.py. With --peer, transformers' Trainer learns the same rows, grouped by length, with the
options for all settings, and evaluates at the same steps. Seed by seed, one command runs after the other, and ends as
soon as it has reached the target, so the machine's other load meets all alike.

Prints JSON: the seconds of every run, null for one that did not reach the target; their medians; and the median of
their ratios to the Trainer's, or else to those of the first setting, with minimum and maximum. Progress goes to
standard error.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from figures import say, spread
from runs import ROOT
from trainer_side import PEER_PROGRAM, write_peer_inputs

sys.path.insert(0, str(ROOT / "scripts"))
from sst2_xlmr.cli import OneLineParser, parse_args
from sst2_xlmr.programs.study import TRAIN_PROGRAM, TRAINER, Study, end_with, parse
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.files import write_text

_POLL_S = 0.02


def accuracy_to_reach(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def best_of(evaluations: Path) -> float:
    """Return the best accuracy on dev in a file of metrics, which another process may be writing; 0 without any."""
    lines = evaluations.read_bytes().split(b"\n")[:-1] if evaluations.is_file() else []
    entries = [entry for entry in map(json.loads, lines) if entry.get("split") == "dev"]
    return max((entry["accuracy"] for entry in entries), default=0.0)


def seconds_to(target: float, command: list[str], evaluations: Path) -> float | None:
    """Run a command until its metrics reach the target; returns None if it has ended before.

    Raises:
        SystemExit: with the command's exit status if that is not 0; what it said last is printed.
    """
    log, start = evaluations.parent.with_suffix(".log"), time.monotonic()
    evaluations.parent.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            has_ended = False
            while not has_ended:
                has_ended = process.poll() is not None  # asked first: what it wrote before its end counts
                if best_of(evaluations) >= target:
                    return time.monotonic() - start
                time.sleep(_POLL_S)
        finally:
            process.terminate()
    if process.returncode:
        end_with(process.returncode, log)
    return None


def peer_command(study: Study, inputs: dict[str, Any], folder: Path, seed: int) -> list[str]:
    """Write what the Trainer is to do, and return the command; evaluations go to metrics.jsonl in the folder."""
    folder.mkdir(parents=True)
    evaluations = str(folder / "metrics.jsonl")
    write_text(folder / "order.json", json.dumps({**inputs, "seed": seed, "evaluations_file": evaluations}))
    return [study.peer, str(PEER_PROGRAM), str(folder / "order.json"), str(folder / "result.json")]


def summary(seconds: dict[str, dict[int, float | None]]) -> dict[str, Any]:
    """Return the medians of those that reached the target, and ratios to the first, seed by seed."""
    reference, *others = seconds
    reached = {name: [value for value in by_seed.values() if value is not None] for name, by_seed in seconds.items()}
    ratios = {}
    for name in others:
        pairs = [(value, seconds[reference][seed]) for seed, value in seconds[name].items()]
        quotients = [value / other for value, other in pairs if value is not None and other is not None]
        ratios[f"{name} / {reference}"] = spread(quotients) if quotients else None
    return {
        "median_seconds": {name: statistics.median(values) if values else None for name, values in reached.items()},
        "reached": {name: f"{len(values)} of {len(seconds[name])}" for name, values in reached.items()},
        "ratio": ratios,
    }


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        description="Measure the time to an accuracy on dev. All other options are those of study.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", required=True, type=accuracy_to_reach, metavar="A", help="accuracy on dev, 0 to 1")
    own, rest = parser.parse_known_args(argv)
    study = parse(rest)
    if study.folder.exists():
        raise UserError(f"--output-dir {study.folder} is there; a time is measured from nothing, so name a new folder")
    inputs: dict[str, Any] = {}
    if study.peer:
        config, _ = parse_args([*study.common, "--output-dir", str(study.folder)])
        if config.eval_every is None:
            raise UserError("--peer needs --eval-every N, so that both sides evaluate at the same steps")
        inputs = {**write_peer_inputs(study.common, study.folder / TRAINER), "eval_every": config.eval_every}
    names = ([TRAINER] if study.peer else []) + list(study.settings)
    seconds: dict[str, dict[int, float | None]] = {name: {} for name in names}
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the command ends too
    for seed in study.seeds:
        for name in names:
            folder = study.folder / name / f"seed-{seed}"
            if name == TRAINER:
                command = peer_command(study, inputs, folder, seed)
            else:
                options = [*study.settings[name], "--seed", str(seed), "--output-dir", str(folder)]
                command = [sys.executable, str(TRAIN_PROGRAM), *options]
            found = seconds_to(own.target, command, folder / "metrics.jsonl")
            seconds[name][seed] = found
            best = best_of(folder / "metrics.jsonl")
            say(f"seed {seed}: {name}: " + (f"best {best:.4f}, not reached" if found is None else f"{found:.1f} s"))
    result = {"target": own.target, "seconds": seconds, **summary(seconds)}
    text = json.dumps(result, indent=2)
    write_text(study.folder / "time_to_accuracy.json", text + "\n")
    print(text)


if __name__ == "__main__":
    exit_on_user_error(main)
