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
same numbers are in study.json. A run's seconds are `-` (null in study.json), and in no mean, if this script was killed
while it ran.

Beside every run, seed-N.inputs.json has the digests of what it has read. It is compared before the run is skipped or
continued, since train.py takes another path for the same file, and would not notice another file for a finished run.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
from trainer_side import PEER_PROGRAM, write_peer_inputs

from sst2_xlmr.cli import OneLineParser, parse_args, with_files
from sst2_xlmr.data.prepare import find_files
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.report.comparison import Figures, Results, summary, table
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.training.signals import SIGNALS
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input, write_text

TRAIN_PROGRAM = Path(__file__).resolve().parents[2] / "train.py"
TRAINER = "trainer"
digest = functools.cache(digest_of_input)  # the runs of a study share most of their files


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
        try:
            settings[name] = [*rest, *shlex.split(options)]
        except ValueError as error:
            raise UserError(f"--setting {name}: {options.strip()!r} cannot be cut into words: {error}") from None
    for words in settings.values():
        for word in with_files(words):
            if word.split("=")[0] in ("--seed", "--resume", "--output-dir"):
                raise UserError(f"leave out {word}: every run gets its own, and is continued if it is there")
            if word.split("=")[0] == "--config":
                raise UserError("leave out --config, which no run can be continued with; take a file of options, @FILE")
        parse_args([*words, "--output-dir", str(own.output_dir / "unused")])  # a UserError before anything is trained
    if own.peer and not shutil.which(own.peer):
        raise UserError(f"--peer {own.peer} is no program; give an environment's bin/python")
    return Study(own.seeds, own.output_dir, settings, rest, own.peer)


def read_by(words: list[str]) -> dict[str, Path]:
    """Return what a run with these options reads: name -> file."""
    config, _ = parse_args(words)
    encoder = find_encoder(config.encoder)
    model = {"the encoder's weights": encoder.weights_file, "the encoder's tokenizer": encoder.tokenizer_file}
    return {**find_files(config, quiet=False), **model}


def check_inputs(run_folder: Path, files: dict[str, Path], is_new: bool) -> None:
    """Compare the files with those that a run has read, or note them if it is new (or older than these notes).

    Raises:
        UserError: if they differ.
    """
    notes, cure = run_folder.with_suffix(".inputs.json"), "or choose another --output-dir"
    digests = {name: digest(file) for name, file in files.items()}
    former = digests if is_new or not notes.is_file() else json.loads(notes.read_text(encoding="utf-8"))
    for name, file in files.items():
        if name not in former:
            raise UserError(f"{file} ({name}) is none of the files of the run {run_folder}; leave it out, {cure}")
        if former[name] != digests[name]:
            raise UserError(f"{file} ({name}) is not the file of the run {run_folder}; give that one, {cure}")
    for name in former:
        if name not in files:
            raise UserError(f"{name}, a file of the run {run_folder}, is not named now; name it again, {cure}")
    notes.parent.mkdir(parents=True, exist_ok=True)
    write_text(notes, json.dumps(digests, indent=2) + "\n")


def seconds_of(file: Path) -> float | None:
    """Return the seconds that a run has taken; None if the study that started it was killed."""
    return float(file.read_text(encoding="utf-8")) if file.is_file() else None


def run(command: list[str], log: Path, seconds_file: Path, is_new: bool) -> None:
    """Run a command, its output in a file; a signal is passed on.

    Args:
        seconds_file: gets the seconds, with those of before, unless this run `is_new`.

    Raises:
        SystemExit: with the command's exit status if that is not 0; what it said last is printed.
    """
    taken = 0.0 if is_new else seconds_of(seconds_file)
    seconds_file.unlink(missing_ok=True)  # if this process is killed, the command may go on, for nobody knows how long
    start = time.monotonic()
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        # It saves before it ends; alone it would go on. Ctrl-C reaches it twice.
        before = {number: signal.signal(number, lambda sent, _: process.send_signal(sent)) for number in SIGNALS}
        status = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if taken is not None:
        write_text(seconds_file, f"{taken + time.monotonic() - start:.1f}\n")
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
    is_new = not (folder / "config.json").is_file()
    if not is_new:
        options.append("--resume")
        parse_args(options)  # a UserError if the run was started with other options
    check_inputs(folder, read_by(words), is_new)
    if not is_new and (folder / "model").is_dir():
        return False
    command = [sys.executable, str(TRAIN_PROGRAM), *options]
    run(command, folder.with_suffix(".log"), folder.with_suffix(".seconds"), is_new)
    return True


def accuracies(folder: Path) -> Figures:
    """Return a run's last accuracy on every file, its best on dev, which is that of best/, and its seconds."""
    found: dict[str, float] = {}
    for entry in (line for line in read_metrics(folder / "metrics.jsonl") if "split" in line):
        found[entry["split"]] = entry["accuracy"]
        if entry["split"] == "dev":
            found["best dev"] = max(entry["accuracy"], found.get("best dev", 0.0))
    return {**found, "seconds": seconds_of(folder.with_suffix(".seconds"))}


def train_peer(study: Study, inputs: dict[str, Any], seed: int) -> bool:
    """Let the Trainer train; returns False if it has done so before with the same inputs."""
    folder = study.folder / TRAINER
    result, order = folder / f"seed-{seed}.json", {**inputs, "seed": seed}
    is_new = not result.is_file()
    check_inputs(result.with_suffix(""), read_by(study.common), is_new)
    if not is_new:
        former = json.loads(result.read_text(encoding="utf-8"))["order"]
        # The digests have told whether the rows are the same, wherever they are now.
        if {**former, "rows_file": ""} != json.loads(json.dumps({**order, "rows_file": ""})):
            raise UserError(f"{result} was made with other options; remove it, or choose another --output-dir")
        return False
    order_file = folder / f"seed-{seed}.order"
    write_text(order_file, json.dumps(order))
    command = [study.peer, str(PEER_PROGRAM), str(order_file), str(result)]
    run(command, folder / f"seed-{seed}.log", folder / f"seed-{seed}.seconds", is_new)
    return True


def peer_accuracies(folder: Path, seed: int) -> Figures:
    found = json.loads((folder / f"seed-{seed}.json").read_text(encoding="utf-8"))["accuracy"]
    return {**found, "best dev": found["dev"], "seconds": seconds_of(folder / f"seed-{seed}.seconds")}


def main(argv: list[str] | None = None) -> None:
    study = parse(argv)
    inputs = write_peer_inputs(study.common, study.folder / TRAINER) if study.peer else {}
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
            seconds = "took unknown time" if found["seconds"] is None else f"{found['seconds']:.0f} s"
            state = seconds if is_new else "was finished"
            tqdm.write(f"{name}, seed {seed}: {state}, dev {found['dev']:.4f}", file=sys.stdout)
    print("\n".join(table(results)))
    content = {"runs": results, "summary": summary(results)}
    write_text(study.folder / "study.json", json.dumps(content, indent=2) + "\n")
