"""Compare settings over several seeds: mean and deviation of the accuracy, time, and intervals of the differences.

    sst2-xlmr study --seeds 1,2,3 --output-dir runs/study --encoder models/small --batch-size 32 --lr 5e-5 --epochs 1 \\
        --setting plain "" --setting longer "--epochs 3 --lr 7e-5"

    sst2-xlmr study --folds 5 --output-dir runs/folds --encoder models/small --train-file rows.csv

All other options go to train.py, for every setting; those of a setting come after them. The run of setting NAME and
seed N is the folder NAME/seed-N in --output-dir; without --setting there is one, `ours`.

With --folds the rows of one file are split into K parts, stratified by class and with equal texts together; each is
answered by a model that was trained on the others. NAME/out-of-fold.jsonl has every row with its answer,
NAME/label-errors.jsonl the rows whose labels are most likely wrong.

Finished runs are skipped and stopped ones continue, so the same command with more seeds or settings adds them; it is an
error if the input files have changed since (see seed-N.inputs.json). If this program is killed while a run goes on, its
seconds are `-` (null in study.json), and in no mean.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Callable

from tqdm import tqdm

from sst2_xlmr.cli import parse_args
from sst2_xlmr.data.splits import find_files
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.programs import options
from sst2_xlmr.programs.checks import refuse
from sst2_xlmr.programs.cross_validation import Folds
from sst2_xlmr.programs.linear_probe import linear_probe
from sst2_xlmr.programs.row_files import checked_config, split_words
from sst2_xlmr.report.comparison import Figures, Results, summary, table
from sst2_xlmr.task import main_metric
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.training.signals import SIGNALS
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input, write_text

TRAIN_COMMAND = [sys.executable, "-m", "sst2_xlmr.train"]
Runs = Mapping[str, Callable[[int], tuple[bool, Figures]]]
digest = functools.cache(digest_of_input)  # the runs of a study share most of their files


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return `seeds`, `output_dir`, `common` (words for train.py), and by name `settings` (all words) and `configs`."""
    study, rest = options.parse_known("study", argv)
    study.common, study.settings, study.configs = rest, {}, {}
    if bool(study.seeds) == bool(study.folds) or study.folds == 1 or study.folds < 0:
        raise UserError("give either --seeds N,... or --folds K, which is 2 or more")
    for name, text in study.setting or [("ours", "")]:
        is_name = name.isidentifier() or name.replace("-", "").isalnum()
        refuse(
            (not is_name, f"--setting {name!r}: take letters, digits and hyphens for the name, which is a folder's"),
            (name in study.settings, f"--setting {name}: that name is taken; choose another"),
        )
        study.settings[name] = [*rest, *split_words(f"--setting {name}", text)]
        own = () if study.folds else ("--seed",)
        study.configs[name] = checked_config(study.settings[name], study.output_dir, *own)
    return study


def check_inputs(words: list[str], run_folder: Path, is_new: bool) -> None:
    """Compare the files of these options with those that a run has read; of a new run they are noted."""
    config, _ = parse_args(words)
    encoder = find_encoder(config.encoder)
    parts = encoder.weights_files
    files = {"the encoder's weights" + f" {part.name}" * (len(parts) > 1): part for part in parts}
    files["the encoder's tokenizer"] = encoder.tokenizer_file
    for name, paths in find_files(config, quiet=False)[0].items():
        files |= {name if len(paths) == 1 else f"{name} {number}": path for number, path in enumerate(paths, 1)}
    digests = {name: digest(file) for name, file in files.items()}
    notes = run_folder.with_suffix(".inputs.json")
    former = digests if is_new or not notes.is_file() else json.loads(notes.read_text(encoding="utf-8"))
    for name in {**former, **digests}:
        if former.get(name) != digests.get(name):
            cure = "give the same files, or choose another --output-dir"
            raise UserError(f"{files.get(name, 'nothing')} ({name}) is not the file of the run {run_folder}; {cure}")
    notes.parent.mkdir(parents=True, exist_ok=True)
    write_text(notes, json.dumps(digests, indent=2) + "\n")


def seconds_of(run_folder: Path) -> float | None:
    """Return the seconds that a run has taken; None if the study that started it was killed."""
    file = run_folder.with_suffix(".seconds")
    return float(file.read_text(encoding="utf-8")) if file.is_file() else None


def run(command: list[str], run_folder: Path, is_new: bool) -> None:
    """Run a command, its output in seed-N.log, its seconds (added to former ones) in seed-N.seconds; passes signals.

    If it fails, this program ends with its exit status, and prints what it said last.
    """
    log, taken = run_folder.with_suffix(".log"), 0.0 if is_new else seconds_of(run_folder)
    # If this process is killed, the command may go on, for nobody knows how long.
    run_folder.with_suffix(".seconds").unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        # It saves before it ends; alone it would go on. Ctrl-C reaches it twice.
        before = {number: signal.signal(number, lambda sent, _: process.send_signal(sent)) for number in SIGNALS}
        status = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if taken is not None:
        write_text(run_folder.with_suffix(".seconds"), f"{taken + time.monotonic() - start:.1f}\n")
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print("\n".join([f"{log}:", *lines[-3:]]), file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)


def train(words: list[str], setting_folder: Path, seed: int) -> tuple[bool, Figures]:
    """Train, or continue a run that was stopped; returns whether it was not finished before, and its figures."""
    folder = setting_folder / f"seed-{seed}"
    options = [*words, "--seed", str(seed), "--output-dir", str(folder)]
    is_new = not (folder / "config.json").is_file()
    if not is_new:
        options.append("--resume")
        parse_args(options)  # a UserError if the run was started with other options
    check_inputs(words, folder, is_new)
    was_finished = not is_new and (folder / "model").is_dir()
    if not was_finished:
        run([*TRAIN_COMMAND, *options], folder, is_new)
    lines = read_metrics(folder / "metrics.jsonl")
    # Figures of best/ are only there where that is not the last model.
    found = [(line["split"], main_metric(line)) for line in lines if line.get("split", "best/")[:5] != "best/"]
    figures: Figures = {**dict(found), "best dev": max(value for split, value in found if split == "dev")}
    return not was_finished, {**figures, "seconds": seconds_of(folder)}


def compare(seeds: list[int], folder: Path, runs: Runs, what: str = "seed", by_setting: bool = False) -> None:
    """Make all runs, and write study.json; `runs` has for each setting what makes its run with a seed, as `train` does.

    They are made seed by seed, so that every setting meets the same state of the machine, unless `by_setting`.
    """
    results: dict[str, Results] = {name: {} for name in runs}
    order = [(seed, name) for seed in seeds for name in runs]
    if by_setting:
        order = [(seed, name) for name in runs for seed in seeds]
    with tqdm(order, unit="run", disable=None, dynamic_ncols=True) as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, {what} {seed}")
            is_new, found = runs[name](seed)
            results[name][seed] = found
            seconds = "unknown time" if found["seconds"] is None else f"{found['seconds']:.0f} s"
            state = seconds if is_new else "was finished"
            tqdm.write(f"{name}, {what} {seed}: {state}, dev {found['dev']:.4f}", file=sys.stdout)
    write_text(folder / "study.json", json.dumps({"runs": results, "summary": summary(results)}, indent=2) + "\n")
    print("\n".join(table(results, what)))


def main(argv: list[str] | None = None) -> None:
    study = parse(argv)
    folders = {name: study.output_dir / name for name in study.settings}
    if not study.folds:
        runs = {name: functools.partial(train, words, folders[name]) for name, words in study.settings.items()}
        compare(study.seeds, study.output_dir, runs)
        probe = linear_probe(next(iter(study.configs.values())))
        print(f"linear probe on the frozen encoder: dev {probe:.4f}")
        return
    folds = {name: Folds(config, folders[name], study.folds, train) for name, config in study.configs.items()}
    by_fold = {name: each.train_fold for name, each in folds.items()}
    compare(list(range(1, study.folds + 1)), study.output_dir, by_fold, "fold")
    for each in folds.values():
        print("\n".join(["", *each.write()]))
