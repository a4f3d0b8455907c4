"""A run's outputs: lines or a progress bar on the console, metrics.jsonl, TensorBoard; on rank 0 only."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sst2_xlmr.config import Config
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.report.event_folder import cut_events, event_folder
from sst2_xlmr.report.mistakes import EvaluatedFile
from sst2_xlmr.report.table import evaluation_table
from sst2_xlmr.report.tensorboard import SCALARS, begin_hparams, draw_accuracy, draw_evaluation, end_hparams
from sst2_xlmr.training.run_folder import read_metrics
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import disk_errors, write_text
from sst2_xlmr.util.memory import used_memory_gb


class Report:
    """The open outputs of a run; see `open_report`.

    Its methods raise UserError if metrics cannot be written (a full disk, say). A closed console does not stop a run.
    """

    def __init__(
        self,
        metrics: TextIO,
        events: SummaryWriter,
        config: Config,
        files: dict[str, Path],
        first_step: int,
        total_steps: int,
    ) -> None:
        self._metrics, self._events = metrics, events
        self._config, self._files = config, files
        self._first_step, self._total_steps, self._started = first_step, total_steps, time.monotonic()
        # disable=None: a bar on a terminal only.
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1, disable=None
        )

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print(text, flush=True)
        except OSError as error:  # the reader (`head`) has ended, or the log's disk is full: the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with suppress(OSError):
                print(
                    f"warning: cannot write to standard output: {error.strerror}; continuing without it",
                    file=sys.stderr,
                )

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def log_training(self, entry: dict[str, Any]) -> None:
        """Write a line of training metrics, and show the main ones.

        Args:
            entry: step, epoch (with fraction), and metrics. All become scalars; loss, lr and samples_per_s are shown.
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

    def log_collapse(self, step: int, says: str) -> None:
        """Write that the run has stopped learning, and say so."""
        self._write({"step": step, "collapsed": True}, {"train/collapsed": 1.0})
        self.say(f"step {step:>6}  collapsed: {says}")

    def log_restarts(self, restarts: list[dict[str, Any]]) -> None:
        """Write, before the first step, how often the run has begun again, unless that stands there already."""
        entry = {"step": 0, "restarts": len(restarts), "collapsed": restarts}
        if restarts and entry not in read_metrics(Path(self._metrics.name)):
            self._write(entry, {"train/restarts": float(len(restarts))})

    def log_evaluation(self, step: int, split: str, evaluation: Evaluation, cache: TokenCache, draws: bool) -> None:
        """Write a line of evaluation metrics.

        Args:
            cache: of the evaluated file.
            draws: whether to draw pictures, too, for which the evaluation must have kept probabilities.
        """
        if draws:
            file = EvaluatedFile(split, self._files[split], cache, self._config)
            with self._disk_errors():
                draw_evaluation(self._events, step, file, evaluation)
        scalars = {f"{split}/{key}": evaluation.metrics[key] for key in SCALARS}
        self._write({"step": step, "split": split, **evaluation.metrics}, scalars)

    def say_evaluation(self, step: int, evaluations: dict[str, Evaluation], is_best: bool) -> None:
        """Print a line on dev, and one with the accuracy on all other files."""
        dev = evaluations["dev"].metrics
        others = {split: evaluation.metrics for split, evaluation in evaluations.items() if split != "dev"}
        self.say(
            f"step {step:>6}  dev: accuracy {dev['accuracy']:.4f}  macro F1 {dev['macro_f1']:.4f}  "
            f"loss {dev['loss']:.4f}  {dev['rows']:,} rows{'  (best so far)' if is_best else ''}"
        )
        if others:
            accuracies = "  ".join(f"{split} {metrics['accuracy']:.4f}" for split, metrics in others.items())
            mean = f"  mean {mean_of(list(others.values()))['accuracy']:.4f}" if len(others) > 1 else ""
            self.say(f"step {step:>6}  accuracy: {accuracies}{mean}")

    def log_checkpoint(self, step: int, size: int, waited_s: float) -> None:
        """Say how many bytes a checkpoint has, and how long training waited for it."""
        self.say(f"step {step:>6}  checkpoint: {size / 1e6:,.0f} MB, training waited {waited_s:.1f} s")

    def log_end(self, step: int) -> None:
        """Mark the run as finished; if other files than dev were evaluated, make a table of their last metrics."""
        last = {entry["split"]: entry for entry in read_metrics(Path(self._metrics.name)) if "split" in entry}
        others = {split: last[split] for split in self._files if split != "dev" and split in last}
        with self._disk_errors():
            if others:
                draw_accuracy(self._events, step, others)
            end_hparams(self._events)
            self._events.flush()
        if others:
            self.say("\n".join(["", *evaluation_table(others), ""]))

    def sync(self) -> None:
        """Sync metrics to disk, so that no checkpoint is ahead of them."""
        with self._disk_errors():
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close all outputs."""
        self._bar.close()
        self._metrics.close()
        self._events.close()

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(f"metrics to {self._metrics.name}")

    def _write(self, entry: dict[str, Any], scalars: dict[str, float]) -> None:
        """Write a line of metrics, and scalars by their tags; both are flushed at once.

        A resumed run does not write again what came before its checkpoint, so a kill must not lose any of it.
        """
        with self._disk_errors():
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
            for tag, value in scalars.items():
                self._events.add_scalar(tag, value, entry["step"])
            self._events.flush()


class SilentReport:
    """The report of all ranks but 0: the methods of `Report`, doing nothing."""

    def say(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def log_training(self, entry: dict[str, Any]) -> None: ...

    def log_collapse(self, step: int, says: str) -> None: ...

    def log_restarts(self, restarts: list[dict[str, Any]]) -> None: ...

    def log_evaluation(self, step: int, split: str, evaluation: Evaluation, cache: TokenCache, draws: bool) -> None: ...

    def say_evaluation(self, step: int, evaluations: dict[str, Evaluation], is_best: bool) -> None: ...

    def log_checkpoint(self, step: int, size: int, waited_s: float) -> None: ...

    def log_end(self, step: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def open_report(
    config: Config, files: dict[str, Path], first_step: int, total_steps: int, written_again: list[str]
) -> Report:
    """Open the outputs; a resumed run's lose all entries after `first_step`.

    Args:
        config: with `output_dir`; this folder, and that of the events, must be claimed.
        files: split name -> file, for all splits to evaluate on.
        written_again: splits that will be evaluated (once more) at `first_step`.

    Raises:
        UserError: if they cannot be written.
    """
    assert config.output_dir is not None
    path, events_to = Path(config.output_dir, "metrics.jsonl"), event_folder(config)
    try:
        _cut_metrics(path, first_step, written_again)
        cut_events(events_to, first_step, written_again)
        metrics = path.open("a", encoding="utf-8")
        events = SummaryWriter(str(events_to))
        begin_hparams(events, config, list(files))
    except OSError as error:
        raise UserError(f"cannot write metrics to {error.filename or events_to}: {error.strerror}") from None
    return Report(metrics, events, config, files, first_step, total_steps)


def _cut_metrics(path: Path, last_step: int, written_again: list[str]) -> None:
    """Remove the lines that a run resumed after `last_step` will write again; see `cut_events`."""
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
