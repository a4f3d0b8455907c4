"""Runs of train.py that other programs start: on files that they write, continued if stopped, compared at the end."""

import functools
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from sst2_xlmr.cli import command_line_of, parse_args, with_files
from sst2_xlmr.config import GROUPS, OPTIONS, Config
from sst2_xlmr.data.rows import Row
from sst2_xlmr.data.splits import find_files
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.report.tables import Figures, Results, settings_table, summary
from sst2_xlmr.task import Task, main_metric
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util.errors import SIGNALS, UserError
from sst2_xlmr.util.files import digest_of_input, new_file, write_errors, write_text

TRAIN_COMMAND = [sys.executable, "-m", "sst2_xlmr.train"]
Trained = tuple[bool, Figures]  # whether the run was unfinished, and its figures
Runs = Mapping[str, Callable[[int], Trained]]  # setting -> a function that trains one seed
digest = functools.cache(digest_of_input)  # most runs of a study read the same files

# Data options that still apply to these files; the others say where rows are and how to parse them.
_OF_ROWS = ("max_length", "long_texts", "stride", "drop_duplicates", "drop_leaks")


def split_words(option: str, text: str) -> list[str]:
    """Split an option's value into words for train.py, quoted as in a shell."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option}: cannot split {text.strip()!r} into words: {error}") from None


def checked_config(words: list[str], folder: Path, *own: str) -> Config:
    """Parse words for train.py; UserError for wrong options, and for those that the program sets itself."""
    flags = {word.split("=")[0] for word in with_files(words)}
    if taken := sorted(flags & {"--resume", "--output-dir", "--config", *own}):
        raise UserError(f"leave out {', '.join(taken)}: every run has its own; to take options from a file, use @FILE")
    return parse_args([*words, "--output-dir", str(folder / "unused")])[0]


def write_rows(path: Path, task: Task, rows: Iterable[Row]) -> None:
    """Write rows atomically; UserError if that fails."""
    with write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for row in rows:
            texts = dict(zip(("text", "pair"), row.texts))
            content = {**texts, "label": task.label_to_json(row.label), "weight": row.weight}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")


def train_arguments(config: Config, task: Task, files: Mapping[str, Path], has_weights: bool = False) -> list[str]:
    """Return train.py's command line: the config's options, with these files (of `write_rows`) as its data."""
    kept = [name for name in OPTIONS if name not in GROUPS["data"] or name in _OF_ROWS]
    others = {name: str(file) for name, file in files.items() if name not in ("train", "dev")}
    run = Config(
        **{**{name: getattr(config, name) for name in kept}, "output_dir": None},
        train_file=[str(files["train"])],
        dev_file=str(files["dev"]),
        eval_file=[f"{name}={file}" for name, file in others.items() if name in config.eval_splits],
        test_file=[file for name, file in others.items() if name not in config.eval_splits],
        text_column=["text"],
        text_pair_column="pair" if config.text_pair_column is not None else None,
        weight_column="weight" if has_weights or config.weight_column is not None else None,
        task=task.option,
        label_names=None if "label_names" in task.unsupported_options else task.label_names,
    )
    return command_line_of(run)


def check_inputs(words: list[str], run_folder: Path, is_new: bool) -> None:
    """Record the digests of a new run's input files; for an earlier run, raise UserError if one has changed."""
    config, _ = parse_args(words)
    encoder = find_encoder(config.encoder)
    weights = encoder.weights_files
    files = {"the encoder's weights" + f" {file.name}" * (len(weights) > 1): file for file in weights}
    files["the encoder's tokenizer"] = encoder.tokenizer_file
    for name, paths in find_files(config)[0].items():
        files |= {name if len(paths) == 1 else f"{name} {number}": path for number, path in enumerate(paths, 1)}
    digests = {name: digest(file) for name, file in files.items()}
    record = run_folder.with_suffix(".inputs.json")
    previous = digests if is_new or not record.is_file() else json.loads(record.read_text(encoding="utf-8"))
    for name in {**previous, **digests}:
        if previous.get(name) != digests.get(name):
            fix = "give the same files, or choose another --output-dir"
            raise UserError(f"{files.get(name, 'nothing')} ({name}) is not the file of the run {run_folder}; {fix}")
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
    log, previous_s = run_folder.with_suffix(".log"), 0.0 if is_new else seconds_of(run_folder)
    # If this process is killed, the command may keep running, so its time is unknown: `-`, or null in study.json.
    run_folder.with_suffix(".seconds").unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        # On a signal, it saves and exits; Ctrl-C reaches it twice.
        handlers = {number: signal.signal(number, lambda sent, _: process.send_signal(sent)) for number in SIGNALS}
        status = process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if previous_s is not None:
        write_text(run_folder.with_suffix(".seconds"), f"{previous_s + time.monotonic() - start:.1f}\n")
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        print("\n".join([f"{log}:", *lines[-3:]]), file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)


def train(words: list[str], setting_folder: Path, seed: int) -> Trained:
    """Train, or continue a stopped run."""
    folder = setting_folder / f"seed-{seed}"
    options = [*words, "--seed", str(seed), "--output-dir", str(folder)]
    is_new = not (folder / "config.json").is_file()
    if not is_new:
        options.append("--resume")
        parse_args(options)  # a UserError if the run was started with other options
    check_inputs(words, folder, is_new)
    is_unfinished = is_new or not (folder / "model").is_dir()
    if is_unfinished:
        run([*TRAIN_COMMAND, *options], folder, is_new)
    evaluations = [line for line in read_metrics(folder / "metrics.jsonl") if "split" in line]
    # Metrics of best/ are left out: if the last model is the best, there are none.
    values = [(line["split"], main_metric(line)) for line in evaluations if not line["split"].startswith("best/")]
    best = max(value for split, value in values if split == "dev")
    return is_unfinished, {**dict(values), "best dev": best, "seconds": seconds_of(folder)}


def run_and_compare(seeds: list[int], folder: Path, runs: Runs, unit: str = "seed", by_setting: bool = False) -> None:
    """Run every setting with every seed, write study.json and print a table.

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
    print("\n".join(settings_table(results, unit)))
