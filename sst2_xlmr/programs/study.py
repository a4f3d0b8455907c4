"""Compare settings over several seeds: mean and deviation of the metrics, time, and intervals of the differences.

    sst2-xlmr study --seeds 1,2,3 --output-dir runs/study --encoder models/small --batch-size 32 --lr 5e-5 --epochs 1 \\
        --setting plain "" --setting longer "--epochs 3 --lr 7e-5"

    sst2-xlmr study --folds 5 --output-dir runs/folds --encoder models/small --train-file rows.csv

All other options go to train.py, for every setting, followed by the setting's own. The run of setting NAME and seed N
is the folder NAME/seed-N in --output-dir; without --setting, the only setting is `ours`.

With --folds, the rows of one file are split into K folds, stratified by class, with equal texts in the same fold; each
fold is predicted by a model that was trained on the others. NAME/out-of-fold.jsonl has every row with its prediction,
NAME/label-errors.jsonl the rows whose labels are most likely wrong.

Finished runs are skipped and stopped runs continue, so the same command with more seeds or settings adds them; if the
input files have changed since (see seed-N.inputs.json), that is an error. If this program is killed during a run, the
run's time is unknown (`-`, null in study.json) and left out of the mean.
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
from sst2_xlmr.programs.cross_validation import Folds
from sst2_xlmr.programs.linear_probe import linear_probe
from sst2_xlmr.programs.options import refuse
from sst2_xlmr.programs.row_files import checked_config, split_words
from sst2_xlmr.report.comparison import Figures, Results, summary, table
from sst2_xlmr.task import main_metric
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.training.signals import SIGNALS
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import digest_of_input, write_text

TRAIN_COMMAND = [sys.executable, "-m", "sst2_xlmr.train"]
Runs = Mapping[str, Callable[[int], tuple[bool, Figures]]]
digest = functools.cache(digest_of_input)  # most runs of a study read the same files


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return `seeds`, `output_dir`, `common` (train.py's words), and by name `settings` (all words) and `configs`."""
    study, common = options.parse_known("study", argv)
    study.common, study.settings, study.configs = common, {}, {}
    if bool(study.seeds) == bool(study.folds) or study.folds == 1 or study.folds < 0:
        raise UserError("give either --seeds N,... or --folds K, which is 2 or more")
    for name, text in study.setting or [("ours", "")]:
        is_name = name.isidentifier() or name.replace("-", "").isalnum()
        refuse(
            (not is_name, f"--setting {name!r}: use letters, digits and hyphens for the name, which is a folder's"),
            (name in study.settings, f"--setting {name}: that name is taken; choose another"),
        )
        study.settings[name] = [*common, *split_words(f"--setting {name}", text)]
        own = () if study.folds else ("--seed",)
        study.configs[name] = checked_config(study.settings[name], study.output_dir, *own)
    return study


def check_inputs(words: list[str], run_folder: Path, is_new: bool) -> None:
    """Record the digests of a new run's input files; for an earlier run, raise UserError if one has changed."""
    config, _ = parse_args(words)
    encoder = find_encoder(config.encoder)
    weights = encoder.weights_files
    files = {"the encoder's weights" + f" {file.name}" * (len(weights) > 1): file for file in weights}
    files["the encoder's tokenizer"] = encoder.tokenizer_file
    for name, paths in find_files(config, quiet=False)[0].items():
        files |= {name if len(paths) == 1 else f"{name} {number}": path for number, path in enumerate(paths, 1)}
    digests = {name: digest(file) for name, file in files.items()}
    record = run_folder.with_suffix(".inputs.json")
    former = digests if is_new or not record.is_file() else json.loads(record.read_text(encoding="utf-8"))
    for name in {**former, **digests}:
        if former.get(name) != digests.get(name):
            cure = "give the same files, or choose another --output-dir"
            raise UserError(f"{files.get(name, 'nothing')} ({name}) is not the file of the run {run_folder}; {cure}")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(digests, indent=2) + "\n")


def seconds_of(run_folder: Path) -> float | None:
    """Return the seconds a run has taken; None if the study was killed during it."""
    file = run_folder.with_suffix(".seconds")
    return float(file.read_text(encoding="utf-8")) if file.is_file() else None


def run(command: list[str], run_folder: Path, is_new: bool) -> None:
    """Run a command, with its output in seed-N.log and its total seconds in seed-N.seconds; forwards signals to it.

    If it fails, this program prints the last lines of its output, and exits with its status.
    """
    log, former_s = run_folder.with_suffix(".log"), 0.0 if is_new else seconds_of(run_folder)
    # If this process is killed, the command may keep running for an unknown time.
    run_folder.with_suffix(".seconds").unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        # On a signal, it saves and exits; Ctrl-C reaches it twice.
        handlers = {number: signal.signal(number, lambda sent, _: process.send_signal(sent)) for number in SIGNALS}
        status = process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if former_s is not None:
        write_text(run_folder.with_suffix(".seconds"), f"{former_s + time.monotonic() - start:.1f}\n")
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print("\n".join([f"{log}:", *lines[-3:]]), file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)


def train(words: list[str], setting_folder: Path, seed: int) -> tuple[bool, Figures]:
    """Train, or continue a stopped run; returns whether the run was unfinished, and its figures."""
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
    # Metrics of best/ are left out: if the last model is the best, there are none.
    values = [(line["split"], main_metric(line)) for line in lines if line.get("split", "best/")[:5] != "best/"]
    figures: Figures = {**dict(values), "best dev": max(value for split, value in values if split == "dev")}
    return not was_finished, {**figures, "seconds": seconds_of(folder)}


def compare(seeds: list[int], folder: Path, runs: Runs, unit: str = "seed", by_setting: bool = False) -> None:
    """Run every setting with every seed, write study.json and print a table; `runs`: setting -> `train` for a seed.

    Runs go seed by seed, so that all settings meet the same state of the machine, unless `by_setting`.
    """
    results: dict[str, Results] = {name: {} for name in runs}
    order = [(seed, name) for seed in seeds for name in runs]
    if by_setting:
        order = [(seed, name) for name in runs for seed in seeds]
    with tqdm(order, unit="run", disable=None, dynamic_ncols=True) as bar:
        for seed, name in bar:
            bar.set_postfix_str(f"{name}, {unit} {seed}")
            was_unfinished, figures = runs[name](seed)
            results[name][seed] = figures
            seconds = "unknown time" if figures["seconds"] is None else f"{figures['seconds']:.0f} s"
            state = seconds if was_unfinished else "was finished"
            tqdm.write(f"{name}, {unit} {seed}: {state}, dev {figures['dev']:.4f}", file=sys.stdout)
    write_text(folder / "study.json", json.dumps({"runs": results, "summary": summary(results)}, indent=2) + "\n")
    print("\n".join(table(results, unit)))


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
    by_fold = {name: setting.train_fold for name, setting in folds.items()}
    compare(list(range(1, study.folds + 1)), study.output_dir, by_fold, "fold")
    for setting in folds.values():
        print("\n".join(["", *setting.write()]))
