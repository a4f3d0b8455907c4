"""A training run, and the operations that the loop, in train.py, calls."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from sst2_xlmr.backend import prediction_model, training_backend
from sst2_xlmr.data.batches import BatchLoader
from sst2_xlmr.data.prepare import Inputs
from sst2_xlmr.evaluation.calibration import calibrate
from sst2_xlmr.evaluation.evaluate import Evaluation, evaluate, evaluation_of
from sst2_xlmr.export.folder import export_run
from sst2_xlmr.model.classifier import build_classifier, load_classifier, pretrained_table
from sst2_xlmr.model.vocabulary import EMBEDDING, used_vocabulary
from sst2_xlmr.report.console import Report
from sst2_xlmr.task import LOWER_IS_BETTER, Task, at_temperature
from sst2_xlmr.training.checkpoint import CheckpointContents, save_checkpoint, seed_rank
from sst2_xlmr.training.guard import NOT_FINITE_FIX, check_progress, collapse_reason
from sst2_xlmr.training.meter import TrainMeter
from sst2_xlmr.training.optimizer import group_of
from sst2_xlmr.training.schedule import Schedule
from sst2_xlmr.training.signals import StopRequest
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.device import memory_errors
from sst2_xlmr.util.distributed import World, broadcast, on_rank0
from sst2_xlmr.util.errors import Collapsed, UserError, raise_on_all
from sst2_xlmr.util.files import BackgroundWriter


class Run:
    """A training run: its model, data, optimizer, schedule, state and report."""

    lock: IO[str] | None = None
    report: Report | None = None  # on rank 0, once it is open
    saved_step = -1
    initial_probabilities: np.ndarray | None = None  # on dev, before training; computed once a collapse is suspected

    def __init__(self, inputs: Inputs, folder: Path, state: TrainState, world: World) -> None:
        """Build the loader, the model with its pretrained weights, and the optimizer."""
        self.inputs, self.folder, self.state, self.world = inputs, folder, state, world
        self.config = config = inputs.config
        caches, shape = inputs.caches, inputs.encoder.shape
        labels, weights = caches["train"].labels, caches["train"].weights
        task = inputs.task.for_training(config, labels, weights, world.device)
        self.task = replace(task, thresholds=tuple(state.thresholds))
        self.vocabulary = used_vocabulary((cache.distinct_ids for cache in caches.values()), shape.vocab_size)
        dropout = 0.0 if config.freeze_encoder else config.dropout
        classifier, self.head_is_new = build_classifier(
            inputs.encoder, self.task, dropout, config.head_dropout, config.seed, self.vocabulary
        )
        classifier.encoder.requires_grad_(not config.freeze_encoder)
        if not config.freeze_encoder:
            lr_scale, decay = group_of(EMBEDDING, classifier.encoder.tokens.weight, shape.layers, config)
            self.vocabulary.scaled_weight_decay = lr_scale * decay
        self.loader = BatchLoader(caches["train"], config, world)
        self.schedule = Schedule(config, state.batches_per_epoch, state.eval_every)
        seed_rank(config.seed, world.rank)
        classifier.to(world.device)
        backend = training_backend(classifier, config, state.precision, world)
        # ddp_model trains, in DistributedDataParallel if there are several processes; model evaluates.
        self.model, self.ddp_model, self.optimizer, self.fallback_reason = backend
        self.meter, self.stop_request = TrainMeter(world), StopRequest(world)
        self.background_writer = BackgroundWriter()
        self.checkpoint_contents: CheckpointContents = state, self.meter, self.optimizer, self.vocabulary
        self.baseline_loss = self.task.baseline_loss(labels, weights)
        self.metrics: dict[str, dict[str, Any]] = {}  # by split: those of its last evaluation
        self.eval_splits, metric = config.eval_splits, self.task.best_metric
        # best/ has the best `best_metric` on `best_split` (a split, or "mean" of all).
        self.best_split, self.best_metric = "dev", config.best_by or metric
        if config.best_by in (*self.eval_splits, "mean"):
            self.best_split, self.best_metric = config.best_by, metric
        self.test_splits = [split for split in inputs.caches if split not in ("train", *self.eval_splits)]
        half = max(1, (config.micro_batch_size or math.ceil(config.batch_size / world.world_size)) // 2)
        self.memory_fix = f"rerun with --micro-batch-size {half} or less"

    def write_report(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Call a method of rank 0's `Report`; if it raises UserError, every rank does."""
        on_rank0(self.world, lambda: write(self.report, *arguments) if self.report else None)

    def say(self, text: str) -> None:
        if self.report:
            self.report.say(text)

    def is_nonfinite(self, grad_norm: torch.Tensor) -> bool:
        """Whether the gradient is not finite; on a GPU, asking waits for the step, so only with --skip-nonfinite."""
        is_asked = self.world.device.type == "cpu" or self.config.skip_nonfinite > 0
        return is_asked and not grad_norm.isfinite()

    def check_skipped(self) -> None:
        """Say that this batch is skipped; UserError if it is one more in a row than --skip-nonfinite allows."""
        state, skipped = self.state, self.state.skipped_in_row + 1
        if skipped > self.config.skip_nonfinite:
            rows = next(self.loader.global_batches(state.epoch, state.batch))
            if (source_rows := self.inputs.splits["train"].source_rows) is not None:
                rows = source_rows[rows]
            places = ", ".join(self.inputs.place_of("train", int(row)) for row in rows[:50])
            last = f" (the last of {skipped} in a row)" if skipped > 1 else ""
            where = f"step {state.step + 1}{last}, training rows of this batch: {places}"
            raise_on_all(f"the gradient is not finite at {where}: {NOT_FINITE_FIX}")
        self.say(f"step {state.step + 1:>6}  gradient is not finite: batch skipped")

    def advance(self, skipped: bool) -> None:
        """Move on to the next global batch, and the progress bar with it."""
        self.state.advance(skipped)
        if self.report:
            self.report.advance()

    def log(self) -> None:
        """Write a line of training metrics, unless all batches were skipped."""
        if rows := self.meter.totals["rows"]:
            entry = self.meter.flush(self.state, self.schedule.lr(self.state.step - 1))
            self.write_report(Report.log_training, entry)
            check_progress(self.state, entry["loss"], rows, self.baseline_loss, self.schedule.warmup_steps)

    def evaluate_if_due(self) -> None:
        """Evaluate, and check for a collapse, if that is due at this step; raises Collapsed if there is one."""
        if self.state.evaluation_due:
            self.evaluate()
        if self.state.collapse_check_due:
            self.check_collapse()

    def evaluate_split(self, split: str, model: nn.Module | None = None, task: Task | None = None) -> Evaluation:
        """Evaluate the run's model or another one on a file; raises Interrupted if a signal arrives meanwhile."""
        tokens, cache = self.config.eval_batch_tokens, self.inputs.caches[split]
        with memory_errors(f"rerun with --eval-batch-tokens {max(1, tokens // 2)} or less"):
            return evaluate(model or self.model, task or self.task, cache, tokens, self.world, self.stop_request.vote)

    def evaluate(self) -> None:
        """Evaluate during training, and keep the model if it is the best."""
        state, may_be_last = self.state, self.schedule.may_be_last(self.state)
        evaluations = {split: self.evaluate_split(split) for split in self.eval_splits}
        self.fit_thresholds(evaluations)
        score, loss = self.score_of(evaluations), evaluations["dev"].metrics["loss"]
        is_best = state.is_best(score, loss)
        temperature = self.fit_temperature(evaluations["dev"]) if is_best or may_be_last else 1.0
        self.log_evaluations(evaluations, temperature, plot=may_be_last)
        metrics = {split: self.metrics[split] for split in self.eval_splits}
        self.write_report(Report.say_evaluation, state.step, metrics, is_best)
        if is_best:
            try:
                self.export("best")
            except UserError:
                self.save()  # with the evaluation still due
                raise
        state.count_evaluation(score, loss)
        state.collapse_check_due |= self.schedule.has_stopped_improving(state)

    def fit_thresholds(self, evaluations: dict[str, Evaluation]) -> None:
        """Fit the labels' thresholds on dev, if the task has any, and recompute the metrics with them, in place."""
        caches, probabilities = self.inputs.caches, evaluations["dev"].probabilities
        thresholds = self.task.fit_thresholds(probabilities, caches["dev"].labels, self.config.threshold_for)
        self.state.thresholds = broadcast(self.world, thresholds)
        self.task = replace(self.task, thresholds=tuple(self.state.thresholds))
        for split in evaluations if self.task.thresholds else ():
            evaluations[split] = evaluation_of(self.task, evaluations[split].logits, caches[split].labels)

    def fit_temperature(self, dev: Evaluation) -> float:
        """Return the temperature for a model that is written, fitted on dev if --calibrate is given."""
        if self.config.calibrate:
            fitted = calibrate(self.task, dev.probabilities, self.inputs.caches["dev"].labels)
            self.state.temperature, self.state.ece_before, self.state.ece_after = broadcast(self.world, fitted)
        return self.state.temperature

    def score_of(self, evaluations: dict[str, Evaluation]) -> float:
        """Return the score by which the best evaluation is chosen; higher is better."""
        splits = evaluations if self.best_split == "mean" else [self.best_split]
        score = float(np.mean([evaluations[split].metrics[self.best_metric] for split in splits]))
        return -score if self.best_metric in LOWER_IS_BETTER else score

    def log_evaluations(self, evaluations: dict[str, Evaluation], temperature: float, plot: bool) -> None:
        """Report evaluations, by split, of the model with its logits divided by a temperature."""
        task = at_temperature(self.task, temperature)
        for split, evaluation in evaluations.items():
            if temperature != 1:
                labels = self.inputs.caches[split].labels
                evaluation = evaluation_of(task, evaluation.logits / temperature, labels)
            self.metrics[split] = evaluation.metrics
            self.write_report(Report.log_evaluation, self.state.step, split, evaluation, task if plot else None)

    def evaluate_best(self) -> dict[str, dict[str, Any]]:
        """Evaluate best/ on the test files; returns `best/NAME` -> metrics."""
        on_rank0(self.world, self.background_writer.wait)
        model, _, task = load_classifier(self.folder / "best", self.world.device, self.state.precision == "bf16")
        metrics: dict[str, dict[str, Any]] = {}
        for split in self.test_splits:
            evaluation = self.evaluate_split(split, prediction_model(model), task)
            metrics[f"best/{split}"] = evaluation.metrics
            self.write_report(Report.log_evaluation, self.state.step, f"best/{split}", evaluation)
        return metrics

    def check_collapse(self) -> None:
        """Raise Collapsed if dev's predictions, compared with those before training, show a collapse."""
        state, probabilities = self.state, self.evaluate_split("dev").probabilities
        if self.initial_probabilities is None:
            try:
                initial_model, _ = build_classifier(self.inputs.encoder, self.task, seed=self.config.seed)
            except UserError:  # e.g. the encoder's folder has been removed
                self.save()  # with the check still due
                raise
            self.initial_probabilities = self.evaluate_split("dev", initial_model.to(self.world.device)).probabilities
        state.collapse_check_due, state.checked_step = False, state.step
        labels, initial = self.inputs.caches["dev"].labels, self.initial_probabilities
        reason = collapse_reason(self.task, probabilities, initial, labels, state.has_learned)
        if reason := broadcast(self.world, reason):
            raise Collapsed(reason)

    def export(self, name: str) -> None:
        """Write the current model, with the whole vocabulary, to this folder of the run."""
        weights, task, writer = dict(self.optimizer.weights()), self.task, self.background_writer
        weights[EMBEDDING] = self.vocabulary.expand(pretrained_table(self.inputs.encoder), weights[EMBEDDING])
        if self.config.calibrate:
            task = at_temperature(task, self.state.temperature)
        folder = self.folder / name
        on_rank0(self.world, lambda: export_run(folder, weights, self.inputs, task, self.state, self.metrics, writer))

    def save(self) -> None:
        """Write a checkpoint. Sync metrics.jsonl first, so that a resumed run finds every earlier line."""
        self.write_report(Report.sync)
        folder = self.folder / "checkpoints"
        saved = save_checkpoint(folder, self.checkpoint_contents, self.config, self.world, self.background_writer)
        self.saved_step = self.state.step
        if saved:
            size, waited_s = saved
            self.say(f"step {self.saved_step:>6}  checkpoint: {size / 1e6:,.0f} MB, training waited {waited_s:.1f} s")

    def ensure_checkpoint(self) -> None:
        """Save this step unless that has been done, and wait until everything is on disk."""
        if self.saved_step != self.state.step:
            self.save()
        on_rank0(self.world, self.background_writer.wait)
