"""Measure the seconds from the command to the first evaluation on dev at or above a target, here and by the Trainer.

    python scripts/bench/time_to_accuracy.py --target 0.87 --seeds 1,2,3 --eval-every 25 --output-dir runs/soon \\
        --peer ../peer/bin/python --encoder models/small --batch-size 32 --lr 5e-5 --epochs 1 \\
        --setting faster "--lr 1e-4"

Options are those of study_with_trainer.py; without --peer only settings are compared. The Trainer evaluates at the same
steps. Seed by seed, one command runs after the other, and ends as soon as it has reached the target. Prints JSON: the
seconds of every run, null for one that did not reach the target; their medians; and the median of their ratios to the
Trainer's, or else to those of the first setting, with minimum and maximum.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import spread
from study_with_trainer import PEER_PROGRAM, TRAINER, peer_python, write_peer_inputs

from sst2_xlmr.cli import OneLineParser, parse_args
from sst2_xlmr.programs import study
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.files import write_text


def best_of(evaluations: Path) -> float:
    """Return the best accuracy on dev in a file of metrics, which another process may be writing; 0 without any."""
    accuracies = (entry["accuracy"] for entry in read_metrics(evaluations) if entry.get("split") == "dev")
    return max(accuracies, default=0.0)


def seconds_to(target: float, command: list[str], evaluations: Path) -> float | None:
    """Run a command until its metrics reach the target; returns None if it has ended before.

    Raises:
        SystemExit: with the command's exit status if that is not 0; what it said last is printed.
    """
    log, start, has_ended = evaluations.parent.with_suffix(".log"), time.monotonic(), False
    evaluations.parent.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            while not has_ended:
                has_ended = process.poll() is not None  # asked first: what it wrote before its end counts
                if best_of(evaluations) >= target:
                    return time.monotonic() - start
                time.sleep(0.02)
        finally:
            process.terminate()
    if process.returncode:
        study.end_with(process.returncode, log)
    return None


def summary(seconds: dict[str, dict[int, float | None]]) -> dict[str, Any]:
    """Return the medians of those that reached the target, and ratios to the first, seed by seed."""
    reference = next(iter(seconds))
    found: dict[str, Any] = {"median_seconds": {}, "reached": {}, "ratio": {}}
    for name, by_seed in seconds.items():
        reached = {seed: value for seed, value in by_seed.items() if value is not None}
        found["median_seconds"][name] = statistics.median(reached.values()) if reached else None
        found["reached"][name] = f"{len(reached)} of {len(by_seed)}"
        quotients = [value / other for seed, value in reached.items() if (other := seconds[reference][seed])]
        if name != reference:
            found["ratio"][f"{name} / {reference}"] = spread(quotients) if quotients else None
    return found


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Time to an accuracy on dev; see also study --help.", allow_abbrev=False)
    parser.add_argument("--target", required=True, type=float, metavar="A", help="accuracy on dev, 0 to 1")
    parser.add_argument("--peer", type=peer_python, metavar="PYTHON", help="Python with transformers")
    own, rest = parser.parse_known_args(argv)
    asked = study.parse(rest, reserved=(TRAINER,))
    if not 0 < own.target <= 1:
        raise UserError(f"--target {own.target:g} is not above 0 and at most 1")
    if asked.output_dir.exists():
        raise UserError(
            f"--output-dir {asked.output_dir} already exists; a time starts from nothing: name a new folder"
        )
    names, inputs = list(asked.settings), {}
    if own.peer:
        config, _ = parse_args([*asked.common, "--output-dir", str(asked.output_dir)])
        if config.eval_every is None:
            raise UserError("--peer needs --eval-every N, so that both sides evaluate at the same steps")
        names = [TRAINER, *names]
        inputs = write_peer_inputs(asked.common, asked.output_dir / TRAINER)
        inputs["eval_every"] = config.eval_every
    seconds: dict[str, dict[int, float | None]] = {name: {} for name in names}
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the command ends too
    for seed in asked.seeds:
        for name in names:
            folder = asked.output_dir / name / f"seed-{seed}"
            if name == TRAINER:
                folder.mkdir(parents=True)
                order = {**inputs, "seed": seed, "evaluations_file": str(folder / "metrics.jsonl")}
                write_text(folder / "order.json", json.dumps(order))
                command = [own.peer, str(PEER_PROGRAM), str(folder / "order.json"), str(folder / "result.json")]
            else:
                options = [*asked.settings[name], "--seed", str(seed), "--output-dir", str(folder)]
                command = [*study.TRAIN_COMMAND, *options]
            found = seconds[name][seed] = seconds_to(own.target, command, folder / "metrics.jsonl")
            best = best_of(folder / "metrics.jsonl")
            says = f"best {best:.4f}, not reached" if found is None else f"{found:.1f} s"
            print(f"seed {seed}: {name}: {says}", file=sys.stderr, flush=True)
    text = json.dumps({"target": own.target, "seconds": seconds, **summary(seconds)}, indent=2)
    write_text(asked.output_dir / "time_to_accuracy.json", text + "\n")
    print(text)


if __name__ == "__main__":
    exit_on_user_error(main)
