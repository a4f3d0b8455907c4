"""Fine-tune XLM-R for text classification.

    python train.py --device cpu                       # laptop or workstation
    torchrun --nproc_per_node=2 train.py               # one machine, several GPUs (or CPU processes)
    sbatch scripts/train.sbatch                        # SLURM cluster, one or many nodes

Data flow: files -> rows -> ids -> global batches -> model -> loss -> step -> checkpoint -> model folder.
"""

from __future__ import annotations

import sst2_xlmr  # noqa: F401 (says in one line if Python or torch cannot work, before anything below fails)

# isort: split
import contextlib
import dataclasses
import math
import shlex
import signal
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np
import torch

from sst2_xlmr.backend import accelerate
from sst2_xlmr.cli import parse_args
from sst2_xlmr.config import Config, named_file
from sst2_xlmr.data.batches import BatchLoader, GlobalBatchSampler
from sst2_xlmr.data.prepare import Prepared, prepare
from sst2_xlmr.evaluation.calibration import Calibration, calibrate
from sst2_xlmr.evaluation.evaluate import Evaluation, Interrupted, evaluate
from sst2_xlmr.export.folder import export_run
from sst2_xlmr.model.classifier import Classifier, Dropouts, build_classifier, dropouts_of
from sst2_xlmr.model.vocabulary import TABLE_NAME, expand_table, renumbering, used_ids
from sst2_xlmr.model.weights import pretrained_table
from sst2_xlmr.report.console import Report, SilentReport, open_report
from sst2_xlmr.report.event_folder import claim_event_folder
from sst2_xlmr.report.header import HeaderFigures, header_lines
from sst2_xlmr.training.checkpoint import (
    RunState,
    find_checkpoint,
    load_checkpoint,
    remove_former_attempts,
    save_checkpoint,
    seed_rank,
)
from sst2_xlmr.training.ddp import Computation, connect
from sst2_xlmr.training.guard import beats_constant, is_suspicious, why_collapsed
from sst2_xlmr.training.loss import Loss, loss_of_constant_answer, make_loss
from sst2_xlmr.training.optimizer import AdamW, Groups
from sst2_xlmr.training.run_folder import claim, clean_up, read_restarts, write_config, write_restarts
from sst2_xlmr.training.schedule import Schedule, evaluation_interval
from sst2_xlmr.training.signals import StopRequest
from sst2_xlmr.training.state import Progress, Window
from sst2_xlmr.training.step import forward_backward
from sst2_xlmr.util import distributed
from sst2_xlmr.util.distributed import World, shared_error
from sst2_xlmr.util.errors import Stopped, UserError, exit_on_user_error
from sst2_xlmr.util.files import Finisher, digest_of
from sst2_xlmr.util.memory import keep_freed_memory, memory_errors
from sst2_xlmr.util.precision import choose_precision, set_up_numerics

SEEDS_APART = 100_003  # between the seeds of two attempts, so that they are not those of neighbouring runs


@dataclass
class Run:
    """The parts of a run. Its state has three owners, progress, window and optimizer, all in `state`.

    Attributes:
        inputs: options with everything decided, encoder, files, and their ids.
        loader: this rank's part of the global batches.
        head_is_new: whether the classification head begins untrained.
        constant_loss: training loss of the best answer that is the same for every text, nats a row.
        computation: how the classifier is computed, the plain way or by an engine.
        model: what is trained: that computation, under DDP where DDP averages gradients.
    """

    world: World
    inputs: Prepared
    classifier: Classifier
    head_is_new: bool
    loss: Loss
    constant_loss: float
    loader: BatchLoader
    schedule: Schedule
    state: RunState
    computation: Computation
    model: torch.nn.Module

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))


@dataclass
class Outputs:
    """Where a run's results go, and what stops it."""

    report: Report | SilentReport
    finisher: Finisher
    stop: StopRequest


def load_inputs(config: Config, world: World) -> Prepared:
    """Files -> rows -> ids. What a node would decide by its hardware or clock, rank 0 decides for all."""
    precision = distributed.from_main(world, choose_precision(config.precision, world.device))
    output_dir = distributed.from_main(world, config.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    config = dataclasses.replace(config, precision=precision, output_dir=output_dir)
    set_up_numerics(precision, config.deterministic, world.device)
    inputs = distributed.once_per_node(world, lambda: prepare(config, quiet=world.local_rank != 0))
    digests = distributed.gather_objects(world, {split: cache.digest for split, cache in inputs.caches.items()})
    if differing := [split for split in inputs.caches if len({digest.get(split) for digest in digests}) > 1]:
        raise shared_error(f"the nodes have different files for {differing[0]}; give all of them the same")
    if inputs.config.eval_every is None:
        lengths, evaluated = inputs.train_lengths, (inputs.caches[split] for split in splits_during(config))
        batches = -(-len(lengths) // config.batch_size)
        every = evaluation_interval(batches, int(lengths.sum()), sum(len(cache.ids) for cache in evaluated))
        inputs = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, eval_every=every))
    return inputs


def build(inputs: Prepared, world: World) -> Run:
    """Ids -> batches; pretrained weights -> model and optimizer, at the beginning of a run."""
    config, encoder, caches = inputs.config, inputs.encoder, inputs.caches
    loss = make_loss(config, inputs.train_labels, world.device)
    kept_ids = np.arange(encoder.shape.vocab_size)
    if not config.full_vocabulary:
        kept_ids = used_ids((cache.distinct_ids for cache in caches.values()), encoder.shape.vocab_size)
        for cache in caches.values():
            cache.renumbering = renumbering(kept_ids, encoder.shape.vocab_size)
    classifier, head_is_new = build_classifier(
        encoder,
        config.classes,
        Dropouts(head=config.head_dropout) if config.freeze_encoder else dropouts_of(config),
        seed=config.seed,
        kept_ids=None if config.full_vocabulary else kept_ids,
    )
    classifier.encoder.requires_grad_(not config.freeze_encoder)
    classifier.to(world.device)
    groups = Groups(encoder.shape.layers, config.weight_decay, config.layerwise_lr_decay)
    optimizer = AdamW(classifier, groups, config.max_grad_norm, bf16=config.precision == "bf16")
    sampler = GlobalBatchSampler(inputs.train_lengths, config.batch_size, config.seed, world, inputs.train_rows)
    loader = BatchLoader(caches["train"], sampler, config, world.device)
    encoder_digest = distributed.from_main(world, digest_of(encoder.weights_file) if world.is_main else None)
    progress = Progress(inputs.train_digest, encoder_digest, len(loader))
    return Run(
        world=world,
        inputs=inputs,
        classifier=classifier,
        head_is_new=head_is_new,
        loss=loss,
        constant_loss=loss_of_constant_answer(config, inputs.train_labels),
        loader=loader,
        schedule=Schedule(config, len(loader)),
        state=RunState(progress, Window(world), optimizer, torch.from_numpy(kept_ids)),
        computation=Computation(classifier),
        model=classifier,
    )


def restore(run: Run, resume: bool) -> Path | None:
    """Seed torch, and go back to the newest checkpoint of a resumed run; returns that, if there is one."""
    config, world = run.config, run.world
    seed_rank(config.seed, world.rank)
    if not resume:
        return None

    def newest() -> Path | None:
        remove_former_attempts(run.folder / "checkpoints", run.state.progress.restarts)
        return find_checkpoint(run.folder / "checkpoints", print)

    checkpoint = distributed.from_main(world, distributed.on_main(world, newest))
    if checkpoint:
        load_checkpoint(checkpoint, run.state, config.seed, world)
        progress = run.state.progress
        if begins_again(run):  # --restart-on-collapse is new, or allows more
            progress.look_due = True
    return checkpoint


def claim_folders(config: Config, resume: bool) -> IO[str]:
    """Lock the run's folder for this process, and write its options: from here on `--resume` goes on; on rank 0."""
    folder = Path(str(config.output_dir))
    claim_event_folder(config, resume)
    lock = claim(folder)
    if not resume:
        write_config(folder, config, is_new=True)
    clean_up(folder)
    return lock


def splits_during(config: Config) -> list[str]:
    """Return the splits to evaluate on during training; all others follow at its end."""
    return ["dev", *(name for name, _ in map(named_file, config.eval_file))]


def splits_at_end(run: Run) -> list[str]:
    return [split for split in run.inputs.files if split not in ("train", *splits_during(run.config))]


def open_outputs(run: Run, asked: Config, resume: bool) -> Report:
    """Open metrics and TensorBoard; on rank 0, once a resumed run's checkpoint has been accepted.

    Args:
        asked: the run's options, before any restart has changed them.
    """
    if resume:
        write_config(run.folder, asked, is_new=False)
    during, at_end, progress = splits_during(run.config), splits_at_end(run), run.state.progress
    evaluated = {split: run.inputs.files[split] for split in (*during, *at_end)}
    written_again = [*at_end, *(during if progress.evaluation_due else [])]
    report = open_report(run.config, evaluated, progress.step, run.schedule.total_steps, written_again)
    report.log_restarts(read_restarts(run.folder))
    return report


def header(run: Run) -> list[str]:
    """Return the lines that describe a run at its start; on rank 0."""
    state = run.state
    figures = HeaderFigures(
        len(state.kept_ids), run.head_is_new, run.schedule.total_steps, run.computation.why_not_compiled
    )
    return header_lines(run.inputs, state.optimizer, run.world, figures)


def evaluate_splits(run: Run, outputs: Outputs, splits: list[str], draws: bool) -> dict[str, Evaluation]:
    """Evaluate on some files and report what comes out, perhaps with pictures.

    Returns:
        Evaluations by split, with probabilities on rank 0 if there are pictures or a temperature is to be fitted.

    Raises:
        Interrupted: if a signal came before the last was done.
    """
    caches, step = run.inputs.caches, run.state.progress.step
    evaluations, tokens, keeps = {}, run.config.eval_batch_tokens, draws or run.config.calibrate
    for split in splits:
        with memory_errors(f"start again with --eval-batch-tokens {max(1, tokens // 2)} or less"):
            evaluations[split] = evaluate(
                run.computation.model, caches[split], tokens, run.world, keeps, outputs.stop.is_agreed
            )
        outputs.report.log_evaluation(step, split, evaluations[split], caches[split], draws)
    return evaluations


def evaluate_dev(run: Run, outputs: Outputs) -> bool:
    """Evaluate during training, and keep the model if it is the best; returns False if a signal came in between."""
    progress, patience = run.state.progress, run.config.early_stopping_patience
    ends = progress.batch == 0 or progress.step == run.schedule.total_steps
    may_be_last = ends or progress.stale_evaluations + 1 == patience
    try:
        evaluations = evaluate_splits(run, outputs, splits_during(run.config), draws=may_be_last)
    except Interrupted:
        return False
    accuracy = evaluations["dev"].metrics["accuracy"]
    is_best = accuracy > progress.best_accuracy
    outputs.report.say_evaluation(progress.step, evaluations, is_best)
    if run.config.calibrate and (is_best or may_be_last):
        probabilities, labels = evaluations["dev"].probabilities, run.inputs.caches["dev"].labels
        fitted = None if probabilities is None else calibrate(probabilities, labels)
        progress.calibration = distributed.from_main(run.world, fitted)
    if is_best:
        try:
            export(run, outputs, "best")
        except UserError:
            save(run, outputs)  # with the evaluation still due, so that no step is lost
            raise
    progress.count_evaluation(accuracy)
    return True


def look_for_collapse(run: Run, outputs: Outputs) -> bool:
    """Look whether dev's answers say anything, and report it if not; returns False if a signal came in between."""
    progress, config, dev = run.state.progress, run.config, run.inputs.caches["dev"]
    model, tokens = run.computation.model, config.eval_batch_tokens
    try:
        evaluation = evaluate(model, dev, tokens, run.world, True, outputs.stop.is_agreed)
    except Interrupted:
        return False
    answers = evaluation.probabilities  # on rank 0
    why = "" if answers is None else why_collapsed(answers, dev.labels, progress.has_learned, config.classes)
    why = distributed.from_main(run.world, why)
    progress.look_due, progress.checked_step = False, progress.step
    progress.collapsed_step = progress.step if why else 0
    if why:
        cure = f"lower --lr, now {config.lr:g}, or let --restart-on-collapse N try again"
        if begins_again(run):
            number = f"{progress.restarts + 1} of {config.restart_on_collapse}"
            cure = f"beginning again with half the rate, {config.lr / 2:g}, and another seed, {number}"
        outputs.report.log_collapse(progress.step, f"{why}; {cure}")
    return True


def begins_again(run: Run) -> bool:
    """Whether the run has collapsed and has an attempt left."""
    progress = run.state.progress
    return progress.collapsed_step > 0 and progress.restarts < run.config.restart_on_collapse


def export(run: Run, outputs: Outputs, name: str) -> None:
    """Write the model as it is now to a folder of that name in the run's folder."""
    state, inputs = run.state, run.inputs

    def write() -> None:
        weights = {**state.optimizer.masters()}
        if not run.config.full_vocabulary:
            pretrained, decay = pretrained_table(inputs.encoder), state.optimizer.table_decay
            weights[TABLE_NAME] = expand_table(pretrained, state.kept_ids, weights[TABLE_NAME], decay)
        rows = {split: len(cache) for split, cache in inputs.caches.items()}
        rows["train"] = len(inputs.train_labels)
        fitted = state.progress.calibration
        calibration = Calibration(*fitted) if fitted else None
        step, folder = state.progress.step, run.folder / name
        export_run(folder, weights, run.config, inputs.encoder, rows, step, calibration, outputs.finisher)

    distributed.on_main(run.world, write)


def save(run: Run, outputs: Outputs) -> None:
    """Write a checkpoint; no checkpoint is ever ahead of the metrics on the disk."""
    distributed.on_main(run.world, outputs.report.sync)
    saved = save_checkpoint(run.folder / "checkpoints", run.state, run.config, run.world, outputs.finisher)
    if saved:
        outputs.report.log_checkpoint(run.state.progress.step, *saved)


def train_loop(run: Run, outputs: Outputs) -> bool:
    """Train until the run is over, is to begin again, or a signal stops it; returns whether one did."""
    schedule, loader, config = run.schedule, run.loader, run.config
    progress, window, optimizer = run.state.progress, run.state.window, run.state.optimizer
    # On CUDA, reading the norm at every step would keep the GPU waiting; `window` notices it later.
    reads_norm = run.world.device.type == "cpu" or config.skip_nonfinite > 0
    rank_rows = -(-config.batch_size // run.world.world_size)
    half = max(1, (config.micro_batch_size or rank_rows) // 2)
    smaller_batch = f"start again with --micro-batch-size {half} or less, which changes the result only by rounding"
    stopped = progress.evaluation_due and not evaluate_dev(run, outputs)
    stopped = stopped or (progress.look_due and not look_for_collapse(run, outputs))
    if stopped or begins_again(run) or schedule.is_over(progress):
        return stopped
    run.model.train()
    for batch in loader.starting_at(progress.epoch, progress.batch):
        # 1. the gradient of the global batch
        with memory_errors(smaller_batch):
            sums = forward_backward(run.model, batch, run.loss, optimizer, run.world)
        norm = optimizer.gradient_norm()

        # 2. one step, or this batch is passed over
        if not reads_norm or math.isfinite(float(norm)):
            optimizer.step(schedule.lr(progress.step), norm)
            window.add(sums, norm, batch)
            progress.advance()
        else:
            progress.pass_over(config.skip_nonfinite, loader.rows_at(progress.epoch, progress.batch))
            optimizer.clear_gradients()
            outputs.report.say(f"step {progress.step:>6}  gradient is not finite: batch passed over")
        outputs.report.advance()

        # 3. log, evaluate, save
        due = schedule.due(progress)
        stopped = outputs.stop.is_agreed()
        if not (due.log or due.evaluate or due.save or stopped):
            continue
        window.collect(progress.step)
        if due.log and window.totals.rows:  # there may be nothing but batches passed over
            rows = window.totals.rows
            entry = window.close(progress, schedule.lr(progress.step - 1))
            outputs.report.log_training(entry)
            progress.has_learned |= beats_constant(entry["loss"], rows, run.constant_loss)
            since_warmup = progress.step - schedule.warmup_steps
            progress.look_due = is_suspicious(entry["loss"], run.constant_loss, since_warmup, progress)
        if due.evaluate:
            progress.evaluation_due = True
            stopped = stopped or not evaluate_dev(run, outputs)
            progress.look_due |= schedule.has_stopped_improving(progress) and not progress.collapsed_step
        if progress.look_due and not stopped:
            stopped = not look_for_collapse(run, outputs)
            if begins_again(run):
                break
        if due.save or stopped or schedule.is_over(progress):
            save(run, outputs)
        if stopped or schedule.is_over(progress):
            break
        window.go_on()
    return stopped


def finish(run: Run, outputs: Outputs, stopped: bool) -> None:
    """Evaluate on the files for the end, write the model, and say where it lies; or how a stopped run goes on."""
    progress, report = run.state.progress, outputs.report
    if not stopped and run.schedule.has_stopped_improving(progress):
        report.say(f"stopped early: {progress.stale_evaluations} evaluations without a better dev accuracy")
    if not stopped:
        try:
            evaluate_splits(run, outputs, splits_at_end(run), draws=True)
        except Interrupted:
            stopped = True
    if not stopped:
        report.log_end(progress.step)
        export(run, outputs, "model")
    distributed.on_main(run.world, outputs.finisher.wait)
    if stopped:
        name = signal.Signals(outputs.stop.number).name
        report.say(f"stopped    by {name} after step {progress.step}, and saved; continue with")
        report.say(f"           train.py --resume --output-dir {shlex.quote(str(run.folder))}")
        raise Stopped(outputs.stop.number)
    if progress.collapsed_step:
        report.say(f"collapsed  at step {progress.collapsed_step}; begin again with a lower --lr, or with")
        more = f"--restart-on-collapse {progress.restarts + 3}"
        report.say(f"           train.py --resume --output-dir {shlex.quote(str(run.folder))} {more}")
    if progress.calibration:
        report.say(f"calibrated {Calibration(*progress.calibration)}")
    chosen = f", the best of {progress.evaluations} and so a little too high" if progress.evaluations > 1 else ""
    best = f"dev accuracy {progress.best_accuracy:.4f} at step {progress.best_step}{chosen}"
    report.say(f"best       {best}: {run.folder / 'best'}")
    report.say(f"model      after step {progress.step}: {run.folder / 'model'}")


def build_attempt(inputs: Prepared, world: World) -> Run:
    """Build the run, with the rate halved and another seed for every attempt that has collapsed before."""
    folder = Path(str(inputs.config.output_dir))
    restarts = len(distributed.from_main(world, distributed.on_main(world, lambda: read_restarts(folder))))
    lr, seed = inputs.config.lr / 2**restarts, (inputs.config.seed + restarts * SEEDS_APART) % 2**31
    config = dataclasses.replace(inputs.config, lr=lr, seed=seed)
    run = build(dataclasses.replace(inputs, config=config), world)
    run.state.progress.restarts = restarts
    return run


def note_attempt(run: Run) -> None:
    """Take note, on disk, that this attempt has collapsed; on rank 0."""
    attempt = {"step": run.state.progress.step, "lr": run.config.lr, "seed": run.config.seed}
    write_restarts(run.folder, [*read_restarts(run.folder), attempt])


def train(config: Config, resume: bool, world: World) -> None:
    """Train as `config` says, and leave the model in the run's folder."""
    inputs = load_inputs(config, world)
    run = build_attempt(inputs, world)
    lock = distributed.on_main(world, lambda: claim_folders(inputs.config, resume))
    stop = StopRequest(world)
    while not run_attempt(run, inputs.config, resume, stop):
        resume = True
        del run  # before the next one takes as much memory
        run = build_attempt(inputs, world)
    if lock is not None:
        lock.close()


def run_attempt(run: Run, asked: Config, resume: bool, stop: StopRequest) -> bool:
    """Train, from the newest checkpoint of a resumed run or from the beginning, and write the model.

    Args:
        asked: the run's options, before any restart has changed them.
        stop: is entered while it trains; remembers a signal until the next attempt.

    Returns:
        False if the run has collapsed and is to begin again.
    """
    world, checkpoint = run.world, restore(run, resume)
    run.computation = accelerate(run.classifier, world, run.state.optimizer, run.config.compile)
    run.model = connect(run.computation, run.state.optimizer, world)
    report = distributed.on_main(world, lambda: open_outputs(run, asked, resume)) or SilentReport()
    if world.is_main:
        for line in header(run):
            report.say(line)
    if resume:
        report.say(f"resume     {f'from {checkpoint}' if checkpoint else 'no checkpoint yet: from the beginning'}")
    with Finisher() as finisher, stop, contextlib.closing(report):
        outputs = Outputs(report, finisher, stop)
        stopped = train_loop(run, outputs)
        if begins_again(run):
            distributed.on_main(world, finisher.wait)
            distributed.on_main(world, lambda: note_attempt(run))
            return False
        finish(run, outputs, stopped)
    return True


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    config, resume = parse_args(argv)
    too_large = "take a smaller --encoder, or a machine with more"
    with distributed.start(config.device, config.threads, config.timeout_minutes) as world, memory_errors(too_large):
        train(config, resume, world)


if __name__ == "__main__":  # torchrun -m sst2_xlmr.train
    exit_on_user_error(main)
