"""A run's header; its outputs, on rank 0: lines or a progress bar on the console, metrics.jsonl, TensorBoard."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sst2_xlmr.data.prepare import Inputs
from sst2_xlmr.evaluation.evaluate import Evaluation
from sst2_xlmr.evaluation.metrics import mean_of
from sst2_xlmr.labels import listed
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.report import tensorboard
from sst2_xlmr.report.inputs import data_report, describe_rows, input_lines
from sst2_xlmr.report.tables import evaluation_table
from sst2_xlmr.task import Task
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.training.run_folder import drop_metrics
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import versions
from sst2_xlmr.util.device import used_memory_gb
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import say
from sst2_xlmr.util.files import write_errors


def header_lines(
    inputs: Inputs, state: TrainState, steps: int, optimizer: AdamW, fallback_reason: str, world: World, new_head: bool
) -> list[str]:
    """Return the lines on inputs, model, schedule and hardware; `fallback_reason` is `training_backend`'s."""
    config, processes = inputs.config, world.world_size
    head = f"{'new' if new_head else 'its own'} head for {listed(inputs.task.label_names)}"
    at_most = f" (at most {config.micro_batch_size} a pass)" if config.micro_batch_size else ""
    epochs = "" if config.max_steps else f"{config.epochs:g} epoch{'s' if config.epochs != 1 else ''}, "
    batches = f"{state.batches_per_epoch:,} an epoch, of {config.batch_size} rows{at_most}"
    evaluation = f"every {state.eval_every:,}" if state.eval_every else "after each epoch"
    backend = f"plain PyTorch: slower ({fallback_reason})" if fallback_reason else "CPU engine"
    threads = torch.get_num_threads()
    device = f"CPU with {threads} thread{'s' if threads > 1 else ''}"
    if world.device.type == "cuda":
        device, backend = torch.cuda.get_device_name(world.device), "plain PyTorch"  # engines are for the CPU
    device += f", {processes} process{'es' * (processes > 1)}{' that share memory' * optimizer.shares_memory}"
    names = {"bf16": "bf16 autocast" if fallback_reason else "bf16 with fp32 master weights"}
    names["tf32"] = "fp32 with tf32 products"
    option = "" if config.precision == state.precision else f"precision {config.precision} -> "
    shape, sizes = inputs.encoder.shape, {name: weight.shape for name, weight in optimizer.weights().items()}
    kept_rows = sizes[EMBEDDING][0]
    whole = sum(map(math.prod, sizes.values())) + (shape.vocab_size - kept_rows) * shape.hidden
    trained = sum(moment.numel() for moment in optimizer.moments().values()) / 2
    of_all = f" of {inputs.encoder.cut_from}" if inputs.encoder.cut_from else ""
    few = f" ({kept_rows:,} of {shape.vocab_size:,} embedding rows occur)" if kept_rows < shape.vocab_size else ""
    size = f"{shape.layers}{of_all} layers, {shape.hidden} wide, {whole / 1e6:,.1f} M parameters"
    return [
        f"stack      {versions.versions()}",
        f"encoder    {config.encoder}: {size}, {trained / 1e6:,.1f} M trained{few}; {head}",
        f"rows       {describe_rows(inputs)}",
        *input_lines(inputs),
        *data_report(inputs),
        f"batches    {batches}; {epochs}{steps:,} steps, evaluation {evaluation}",
        f"device     {device}; {option}{names.get(state.precision, state.precision)}; {backend}",
    ]


class Report:
    """A run's open outputs; only rank 0 has one.

    `log_*` and `sync` raise UserError if a write fails (e.g. the disk is full), so they belong in `on_rank0`.
    `say`, `say_*`, `advance` and `close` never raise: a closed console does not stop a run.
    """

    def __init__(self, inputs: Inputs, state: TrainState, folder: Path, total_steps: int, rewritten: list[str]) -> None:
        """Open the outputs in a claimed folder, to continue after the state's step; UserError if that fails.

        Metrics that a run has logged later are dropped, and at this step those of the splits in `rewritten`.
        """
        config, first_step = inputs.config, state.step
        self._inputs, self._task, self._total_steps = inputs, inputs.task, total_steps
        self._first_step, self._started = first_step, time.monotonic()
        path = folder / "metrics.jsonl"
        purge_step = first_step + 1 if path.exists() else None
        with write_errors(path):
            drop_metrics(path, first_step, rewritten)
            self._metrics = path.open("a", encoding="utf-8")
        path = Path(config.tensorboard_dir or folder / "tensorboard")
        with write_errors(path):
            self._events = tensorboard.open_events(path, purge_step)
            splits = [split for split in inputs.caches if split != "train"]
            tensorboard.write_hparams(self._events, config, state.precision, self._task, splits)
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
            rows, labels = self._inputs.splits[split], self._inputs.caches[split].labels
            with write_errors(f"events to {self._events.log_dir}", is_resumable=True):
                tensorboard.draw_evaluation(self._events, step, split, rows, labels, evaluation, task)
        scalars = {key: evaluation.metrics[key] for key in self._task.tensorboard_metrics}
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

    def say_end(self, evaluations: dict[str, dict[str, Any]]) -> None:
        """Print the last model's metrics on all splits but dev, then those of best/, which are named `best/SPLIT`."""
        best = {split: metrics for split, metrics in evaluations.items() if split.startswith("best/")}
        others = {split: metrics for split, metrics in evaluations.items() if split not in ("dev", *best)}
        tables = [evaluation_table(self._task, metrics) for metrics in (others, best) if metrics]
        if tables:
            self.say("\n".join(line for table in tables for line in ["", *table]) + "\n")

    def sync(self) -> None:
        """Sync metrics.jsonl to disk."""
        with write_errors(f"metrics to {self._metrics.name}", is_resumable=True):
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close all outputs. Everything has been flushed, or its error has been raised."""
        for output in (self._bar, self._metrics, self._events):
            with suppress(OSError, ValueError):
                output.close()

    def _write(self, entry: dict[str, Any], group: str, scalars: dict[str, float]) -> None:
        """Write and flush a line of metrics and a group's scalars: a resumed run does not write them again."""
        with write_errors(f"metrics to {self._metrics.name}", is_resumable=True):
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
        with write_errors(f"events to {self._events.log_dir}", is_resumable=True):
            tensorboard.add_scalars(self._events, entry["step"], group, scalars)
