"""What a run says: lines or a progress bar on the console, metrics.jsonl, TensorBoard. Only rank 0 says anything."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sst2_xlmr.config import Config, named_file
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.errors import UserError
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.files import disk_errors, write_text
from sst2_xlmr.memory import used_memory_gb
from sst2_xlmr.report.table import evaluation_table
from sst2_xlmr.report.tensorboard import (
    SCALARS,
    begin_hparams,
    cut_events,
    draw_evaluation,
    draw_table,
    end_hparams,
    event_folder,
)
from sst2_xlmr.training.progress import Progress
from sst2_xlmr.training.run_folder import METRICS_NAME, read_metrics


class Report:
    """What rank 0 says and writes of a run; other ranks have a `SilentReport`.

    Args:
        run_folder: gets `metrics.jsonl`, one JSON object a line.
        tensorboard: event writer.
        files: split name -> file, of all that is evaluated on.
        first_step, total_steps: of this process, which may go on with a run; and of the run.
    """

    def __init__(
        self,
        run_folder: Path,
        tensorboard: SummaryWriter,
        config: Config,
        files: dict[str, Path],
        first_step: int,
        total_steps: int,
    ) -> None:
        self._metrics = (run_folder / METRICS_NAME).open("a", encoding="utf-8")
        self._tensorboard, self._config, self._files = tensorboard, config, files
        self._first_step, self._total_steps, self._started = first_step, total_steps, time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not sys.stderr.isatty(),
        )

    def close(self) -> None:
        """Close what is open."""
        self._bar.close()
        self._metrics.close()
        self._tensorboard.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one; training goes on if nobody can read it."""
        try:
            if self._bar.disable:
                print(text, flush=True)
            else:
                self._bar.write(text, file=sys.stdout)
        except OSError as error:  # its reader is gone (`head`), or the log's disk full: no reason to end a run of hours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with suppress(OSError):
                print(f"warning: cannot write to standard output: {error.strerror}; going on without", file=sys.stderr)

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def log_training(self, entry: dict[str, float]) -> None:
        """Write a line of training metrics, and say it.

        Args:
            entry: what `Window.close` returns; all of it but step and epoch is a scalar for TensorBoard.
        """
        scalars = {f"train/{key}": value for key, value in entry.items() if key not in ("step", "epoch")}
        self._write(entry, {**scalars, "train/memory_gb": used_memory_gb()})
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['samples_per_s']:.0f} samples/s")
            return
        done = entry["step"] - self._first_step
        left_s = (time.monotonic() - self._started) / max(1, done) * (self._total_steps - entry["step"])
        self.say(
            f"step {entry['step']:>6}/{self._total_steps}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  "
            f"lr {entry['lr']:.2e}  {entry['samples_per_s']:.1f} samples/s  {_clock(left_s)} left"
        )

    def log_evaluation(self, step: int, split: str, evaluation: Evaluation, cache: TokenCache) -> None:
        """Write a line of evaluation metrics, and pictures if the evaluation has kept probabilities.

        Args:
            cache: of the evaluated file.
        """
        if evaluation.probabilities is not None:
            with self._disk_errors():
                draw_evaluation(self._tensorboard, step, split, evaluation, cache, self._files[split], self._config)
        scalars = {f"{split}/{key}": evaluation.metrics[key] for key in SCALARS}
        self._write({"step": step, "split": split, **evaluation.metrics}, scalars)

    def say_evaluation(self, step: int, metrics: dict[str, dict[str, Any]], is_best: bool) -> None:
        """Print a line on dev, and one with the accuracy on all other files.

        Args:
            metrics: by split.
        """
        dev, others = metrics["dev"], {split: values for split, values in metrics.items() if split != "dev"}
        self.say(
            f"step {step:>6}  dev: accuracy {dev['accuracy']:.4f}  macro F1 {dev['macro_f1']:.4f}  "
            f"loss {dev['loss']:.4f}  {dev['rows']:,} rows{'  (best so far)' if is_best else ''}"
        )
        if others:
            accuracies = "  ".join(f"{split} {values['accuracy']:.4f}" for split, values in others.items())
            mean = f"  mean {mean_of(list(others.values()))['accuracy']:.4f}" if len(others) > 1 else ""
            self.say(f"step {step:>6}  accuracy: {accuracies}{mean}")

    def log_end(self, step: int) -> None:
        """Mark the run as finished; if other files than dev were evaluated, make a table of their last metrics."""
        last = {entry["split"]: entry for entry in read_metrics(Path(self._metrics.name)) if "split" in entry}
        others = {split: last[split] for split in self._files if split != "dev" and split in last}
        with self._disk_errors():
            if others:
                draw_table(self._tensorboard, step, others)
            end_hparams(self._tensorboard)
            self._tensorboard.flush()
        if others:
            self.say("\n".join(["", *evaluation_table(others), ""]))

    def log_checkpoint(self, step: int, saved: tuple[int, float] | None) -> None:
        """Say what a checkpoint took.

        Args:
            saved: on rank 0, bytes written, and the seconds that training waited for it.
        """
        if saved is not None:
            self.say(f"step {step:>6}  checkpoint: {saved[0] / 1e6:,.0f} MB, training waited {saved[1]:.1f} s")

    def sync(self) -> None:
        """Bring metrics to the disk, so that no checkpoint is ahead of them."""
        with self._disk_errors():
            os.fsync(self._metrics.fileno())

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(f"metrics to {self._metrics.name}")

    def _write(self, entry: dict[str, Any], scalars: dict[str, float]) -> None:
        """Write a line of metrics, and scalars by their tags; both are with the system before a checkpoint is."""
        with self._disk_errors():
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
            for tag, value in scalars.items():
                self._tensorboard.add_scalar(tag, value, entry["step"])
            self._tensorboard.flush()


class SilentReport:
    """The report of ranks other than 0: the same methods as `Report`, which do nothing."""

    def nothing(self, *_: Any) -> None:
        """Do nothing."""

    say = advance = log_training = log_evaluation = say_evaluation = nothing
    log_end = log_checkpoint = sync = close = nothing


def open_report(
    run_folder: Path, config: Config, files: dict[str, Path], progress: Progress, total_steps: int
) -> Report:
    """Open the outputs; those of a resumed run lose what it will write again.

    Args:
        files: split name -> file, of all that the run reads.

    Raises:
        UserError: if they cannot be written.
    """
    during = splits_during(config)
    evaluated = {split: file for split, file in files.items() if split != "train"}
    written_again = [split for split in evaluated if split not in during or progress.evaluation_due]
    tensorboard_dir = event_folder(run_folder, config)
    try:
        _cut_metrics(run_folder / METRICS_NAME, progress.step, written_again)
        cut_events(tensorboard_dir, progress.step, written_again)
        tensorboard = SummaryWriter(str(tensorboard_dir))
        begin_hparams(tensorboard, config, list(evaluated))
        return Report(run_folder, tensorboard, config, evaluated, progress.step, total_steps)
    except OSError as error:
        raise UserError(f"cannot write metrics to {error.filename or tensorboard_dir}: {error.strerror}") from None


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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
