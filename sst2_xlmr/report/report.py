"""What a run says: lines or a progress bar on the console, metrics.jsonl, TensorBoard. Only rank 0 says anything."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sst2_xlmr.config import Config, named_file
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.errors import UserError
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.files import disk_errors, write_text
from sst2_xlmr.memory import used_memory_gb
from sst2_xlmr.report.tensorboard import (
    SCALARS,
    begin_hparams,
    cut_events,
    draw_evaluation,
    draw_table,
    end_hparams,
)
from sst2_xlmr.training.run_folder import read_metrics


@dataclass
class Report:
    """Open outputs of a run; on other ranks than 0 all are None, and nothing is said.

    Attributes:
        metrics: `metrics.jsonl`, one JSON object a line.
        tensorboard: event writer.
        bar: tqdm's bar, on a terminal only.
        config: the run's options.
        files: split name -> file, of all that is evaluated on.
        total_steps, started_at_step, started: for the time left (seconds of time.monotonic).
    """

    metrics: TextIO | None
    tensorboard: SummaryWriter | None
    bar: tqdm | None
    config: Config
    files: dict[str, Path]
    total_steps: int
    started_at_step: int
    started: float

    def close(self) -> None:
        """Close what is open."""
        if self.bar is not None:
            self.bar.close()
        if self.metrics is not None and self.tensorboard is not None:
            self.metrics.close()
            self.tensorboard.close()


def silent_report(config: Config) -> Report:
    """Return the report of other ranks than 0."""
    return Report(None, None, None, config, {}, 0, 0, 0.0)


def open_report(
    run_folder: Path,
    tensorboard_dir: Path,
    config: Config,
    files: dict[str, Path],
    first_step: int,
    total_steps: int,
    written_again: list[str],
) -> Report:
    """Open the outputs; those of a resumed run lose what they say of steps after `first_step`.

    Args:
        files: split name -> file, of all that is evaluated on.
        written_again: splits that will be evaluated (once more) at `first_step`.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        path = run_folder / "metrics.jsonl"
        _cut_metrics(path, first_step, written_again)
        cut_events(tensorboard_dir, first_step, written_again)
        metrics = path.open("a", encoding="utf-8")
        tensorboard = SummaryWriter(str(tensorboard_dir))
        begin_hparams(tensorboard, config, list(files))
    except OSError as error:
        raise UserError(f"cannot write metrics to {error.filename or tensorboard_dir}: {error.strerror}") from None
    bar = None
    if sys.stderr.isatty():
        bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)
    return Report(metrics, tensorboard, bar, config, files, total_steps, first_step, time.monotonic())


def splits_during(config: Config) -> list[str]:
    """Return the names of the splits that are evaluated during training; all others are at its end."""
    return ["dev", *(name for name, _ in map(named_file, config.eval_file))]


def _cut_metrics(path: Path, last_step: int, written_again: list[str]) -> None:
    """Remove the lines that a run that goes on after `last_step` will write; see `cut_events`."""
    kept = [
        entry
        for entry in read_metrics(path)
        if entry["step"] <= last_step and not (entry["step"] == last_step and entry.get("split") in written_again)
    ]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def say(report: Report, text: str) -> None:
    """Print a line, above the bar if there is one; training goes on if nobody can read it."""
    if report.metrics is None:
        return
    try:
        if report.bar is not None:
            report.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
    except OSError as error:  # its reader is gone (`head`), or the log's disk full: no reason to end a run of hours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            print(f"warning: cannot write to standard output: {error.strerror}; going on without", file=sys.stderr)


def advance(report: Report) -> None:
    """Move the bar by one step."""
    if report.bar is not None:
        report.bar.update()


def _disk_errors(report: Report) -> AbstractContextManager[None]:
    assert report.metrics is not None
    return disk_errors(f"metrics to {report.metrics.name}")


def _write(report: Report, entry: dict[str, Any], scalars: dict[str, float]) -> None:
    """Write a line of metrics, and scalars by their tags; both are with the system before a checkpoint is written."""
    assert report.metrics is not None and report.tensorboard is not None
    with _disk_errors(report):
        report.metrics.write(json.dumps(entry) + "\n")
        report.metrics.flush()
        for tag, value in scalars.items():
            report.tensorboard.add_scalar(tag, value, entry["step"])
        report.tensorboard.flush()


def log_training(report: Report, entry: dict[str, Any]) -> None:
    """Write a line of training metrics.

    Args:
        entry: step, epoch (with fraction), loss, lr, grad_norm, samples_per_s, tokens_per_s.
    """
    if report.metrics is None:
        return
    scalars = {f"train/{key}": value for key, value in entry.items() if key not in ("step", "epoch")}
    _write(report, entry, {**scalars, "train/memory_gb": used_memory_gb()})
    if report.bar is not None:
        report.bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['samples_per_s']:.0f} samples/s")
        return
    done = entry["step"] - report.started_at_step
    left_s = (time.monotonic() - report.started) / max(1, done) * (report.total_steps - entry["step"])
    say(
        report,
        f"step {entry['step']:>6}/{report.total_steps}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  "
        f"lr {entry['lr']:.2e}  {entry['samples_per_s']:.1f} samples/s  {_clock(left_s)} left",
    )


def log_evaluation(report: Report, step: int, split: str, found: Evaluation, cache: TokenCache) -> None:
    """Write a line of evaluation metrics, and pictures if there are probabilities to draw them from.

    Args:
        cache: of the evaluated file.
    """
    if report.metrics is None or report.tensorboard is None:
        return
    if found.probabilities is not None:
        with _disk_errors(report):
            draw_evaluation(report.tensorboard, step, split, found, cache, report.files[split], report.config)
    scalars = {f"{split}/{key}": found.metrics[key] for key in SCALARS}
    _write(report, {"step": step, "split": split, **found.metrics}, scalars)


def say_evaluation(report: Report, step: int, found: dict[str, dict[str, Any]], is_best: bool) -> None:
    """Print a line on dev, and one with the accuracy on all other files.

    Args:
        found: metrics by split.
    """
    dev, others = found["dev"], {split: metrics for split, metrics in found.items() if split != "dev"}
    say(
        report,
        f"step {step:>6}  dev: accuracy {dev['accuracy']:.4f}  macro F1 {dev['macro_f1']:.4f}  "
        f"loss {dev['loss']:.4f}  {dev['rows']:,} rows{'  (best so far)' if is_best else ''}",
    )
    if others:
        accuracies = "  ".join(f"{split} {metrics['accuracy']:.4f}" for split, metrics in others.items())
        mean = f"  mean {mean_of(list(others.values()))['accuracy']:.4f}" if len(others) > 1 else ""
        say(report, f"step {step:>6}  accuracy: {accuracies}{mean}")


def evaluation_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a file each, and the mean of several.

    Args:
        found: metrics by the files' names.
    """
    width = max(len(name) for name in [*found, "file"])
    lines = [f"{'file':<{width}}  accuracy  95 % interval  macro F1     ECE      rows"]
    for name, metrics in found.items():
        interval = f"{metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f}"
        lines.append(
            f"{name:<{width}}    {metrics['accuracy']:.4f}  {interval:>13}    {metrics['macro_f1']:.4f}"
            f"  {metrics['ece']:.4f}  {metrics['rows']:>8,}"
        )
    if len(found) > 1:
        mean = mean_of(list(found.values()))
        lines.append(
            f"{'mean':<{width}}    {mean['accuracy']:.4f}  {'':>13}    {mean['macro_f1']:.4f}  {mean['ece']:.4f}"
        )
    return lines


def log_end(report: Report, step: int) -> None:
    """Mark the run as finished; if other files than dev were evaluated, make a table of their last metrics."""
    if report.metrics is None or report.tensorboard is None:
        return
    last = {entry["split"]: entry for entry in read_metrics(Path(report.metrics.name)) if "split" in entry}
    others = {split: last[split] for split in report.files if split != "dev" and split in last}
    with _disk_errors(report):
        if others:
            draw_table(report.tensorboard, step, others)
        end_hparams(report.tensorboard)
        report.tensorboard.flush()
    if others:
        say(report, "\n".join(["", *evaluation_table(others), ""]))


def log_save(report: Report, step: int, saved: tuple[int, float] | None) -> None:
    """Say what a checkpoint took.

    Args:
        saved: bytes written, and the seconds that training waited for it.
    """
    if saved is not None:
        say(report, f"step {step:>6}  checkpoint: {saved[0] / 1e6:,.0f} MB, training waited {saved[1]:.1f} s")


def sync_report(report: Report) -> None:
    """Bring metrics to the disk, so that no checkpoint is ahead of them."""
    if report.metrics is not None:
        with _disk_errors(report):
            os.fsync(report.metrics.fileno())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
