"""A run's outputs, on rank 0: lines or a progress bar on the console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sst2_xlmr.data.prepare import Prepared
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.report import tensorboard
from sst2_xlmr.report.table import evaluation_table
from sst2_xlmr.task import Task
from sst2_xlmr.training.run_folder import drop_metrics
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.files import disk_errors, writing
from sst2_xlmr.util.memory import used_memory_gb
from sst2_xlmr.util.output import say


class Report:
    """A run's open outputs; only rank 0 has one.

    `log_*` and `sync` raise UserError if a write fails (e.g. the disk is full), so they belong in `on_rank0`.
    `say`, `say_evaluation`, `advance` and `close` never raise: a closed console does not stop a run.
    """

    def __init__(
        self, inputs: Prepared, state: TrainState, folder: Path, total_steps: int, written_again: list[str]
    ) -> None:
        """Open the outputs in a claimed folder, to continue after the state's step; UserError if that fails.

        Metrics that a run has logged later are dropped, and at this step those of the splits in `written_again`.
        """
        config, first_step = inputs.config, state.step
        self._inputs, self._task, self._total_steps = inputs, inputs.task, total_steps
        self._first_step, self._started = first_step, time.monotonic()
        path = folder / "metrics.jsonl"
        purge_step = first_step + 1 if path.exists() else None
        with writing(path):
            drop_metrics(path, first_step, written_again)
            self._metrics = path.open("a", encoding="utf-8")
        path = Path(config.tensorboard_dir or folder / "tensorboard")
        with writing(path):
            self._events = tensorboard.open_events(path, purge_step)
            splits = [split for split in inputs.caches if split != "train"]
            tensorboard.begin_hparams(self._events, config, state.precision, self._task, splits)
            self._events.flush()
        # disable=None: only a terminal gets a bar.
        bar: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.1, "disable": None}
        self._bar = tqdm(total=total_steps, initial=first_step, **bar)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        with suppress(OSError, ValueError), tqdm.external_write_mode(file=sys.stdout):
            say(text)

    def advance(self) -> None:
        with suppress(OSError, ValueError):
            self._bar.update()

    def log_training(self, entry: dict[str, Any]) -> None:
        """Write training metrics, among them step and (fractional) epoch; print the main ones."""
        scalars = {key: value for key, value in entry.items() if key not in ("step", "epoch")}
        self._write(entry, "train", {**scalars, "memory_gb": used_memory_gb()})
        if not self._bar.disable:
            with suppress(OSError, ValueError):
                self._bar.set_postfix_str(f"loss {entry['loss']:.4f}, {entry['samples_per_s']:.0f} samples/s")
            return
        step, elapsed_s = entry["step"], time.monotonic() - self._started
        left = tqdm.format_interval(elapsed_s / max(1, step - self._first_step) * (self._total_steps - step))
        self.say(
            f"step {step:>6}/{self._total_steps}  epoch {entry['epoch']:.2f}  loss {entry['loss']:.4f}  "
            f"lr {entry['lr']:.2e}  {entry['samples_per_s']:.1f} samples/s  {left} left"
        )

    def log_collapse(self, step: int, reason: str) -> None:
        """Write and print that training has collapsed."""
        self._write({"step": step, "collapsed": True}, "train", {"collapsed": 1.0})
        self.say(f"step {step:>6}  collapsed: {reason}")

    def log_evaluation(self, step: int, split: str, evaluation: Evaluation, task: Task | None = None) -> None:
        """Write an evaluation's metrics; with a task, which reads its probabilities, also plots and mistakes."""
        if task:
            inputs = self._inputs
            labels, texts_of = inputs.caches[split].labels, partial(inputs.splits[split].texts_of, inputs.task)
            with self._event_errors():
                tensorboard.draw_evaluation(self._events, step, split, labels, evaluation.probabilities, task, texts_of)
        scalars = {key: evaluation.metrics[key] for key in self._task.scalars}
        self._write({"step": step, "split": split, **evaluation.metrics}, split, scalars)

    def say_evaluation(self, step: int, evaluations: dict[str, dict[str, Any]], is_best: bool) -> None:
        """Print a line on dev, and one with the main metric of all other splits; takes split -> metrics."""
        others, metric = dict(evaluations), self._task.best_metric
        dev = others.pop("dev")
        best = "  (best so far)" if is_best else ""
        self.say(f"step {step:>6}  dev: {self._task.describe(dev)}  {dev['rows']:,} rows{best}")
        if others:
            values = "  ".join(f"{split} {metrics[metric]:.4f}" for split, metrics in others.items())
            mean = f"  mean {mean_of(list(others.values()))[metric]:.4f}" if len(others) > 1 else ""
            self.say(f"step {step:>6}  {metric}: {values}{mean}")

    def log_end(self, evaluations: dict[str, dict[str, Any]]) -> None:
        """Mark the run as finished, and print the last model's metrics on all splits but dev, then those of best/.

        Takes split -> metrics of the last model, and `best/` + split -> metrics of best/.
        """
        best = {split: metrics for split, metrics in evaluations.items() if split.startswith("best/")}
        others = {split: metrics for split, metrics in evaluations.items() if split not in ("dev", *best)}
        with self._event_errors():
            tensorboard.end_hparams(self._events)
            self._events.flush()
        tables = [evaluation_table(self._task, metrics) for metrics in (others, best) if metrics]
        if tables:
            self.say("\n".join(line for table in tables for line in ["", *table]) + "\n")

    def sync(self) -> None:
        """Sync metrics.jsonl to disk."""
        with disk_errors(f"metrics to {self._metrics.name}"):
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close all outputs. Everything has been flushed, or its error has been raised."""
        for output in (self._bar, self._metrics, self._events):
            with suppress(OSError, ValueError):
                output.close()

    def _event_errors(self) -> AbstractContextManager[None]:
        return disk_errors(f"events to {self._events.log_dir}")

    def _write(self, entry: dict[str, Any], group: str, scalars: dict[str, float]) -> None:
        """Write and flush a line of metrics and a group's scalars: a resumed run does not write them again."""
        with disk_errors(f"metrics to {self._metrics.name}"):
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
        with self._event_errors():
            tensorboard.add_scalars(self._events, entry["step"], group, scalars)
            self._events.flush()
