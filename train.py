"""Fine-tune XLM-R for text classification.

    python train.py --device cpu                       # laptop or workstation
    torchrun --nproc_per_node=2 train.py               # one machine, several GPUs (or CPU processes)
    sbatch scripts/train.sbatch                        # SLURM cluster, one or many nodes

The way of the data: files -> rows -> ids -> global batches -> model -> loss -> step -> checkpoint -> model folder.
"""

from __future__ import annotations

import sst2_xlmr  # noqa: F401 (says in one line if Python or torch cannot work, before anything below fails)

# isort: split
import contextlib
import dataclasses
import math
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr import distributed
from sst2_xlmr.cli import parse_args
from sst2_xlmr.config import Config
from sst2_xlmr.data.batches import GlobalBatchSampler, RankShare, build_loader
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.distributed import World, shared_error
from sst2_xlmr.engines.cpu.kernels import Kernels, load_kernels
from sst2_xlmr.errors import Stopped, UserError, exit_on_user_error
from sst2_xlmr.evaluation.evaluate import Interrupted, evaluate
from sst2_xlmr.export.hugging_face import export_run
from sst2_xlmr.files import Finisher, digest_of
from sst2_xlmr.memory import keep_freed_memory
from sst2_xlmr.model.classifier import Classifier, build_classifier
from sst2_xlmr.model.compact_vocab import renumbering, used_ids
from sst2_xlmr.report.event_folder import claim_event_folder
from sst2_xlmr.report.header import Header
from sst2_xlmr.report.report import Report, SilentReport, open_report, splits_during
from sst2_xlmr.training.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_progress,
    save_checkpoint,
    seed_rank,
)
from sst2_xlmr.training.loss import class_weights, sum_of_losses
from sst2_xlmr.training.optimizer import AdamW, can_compile, lr_factor
from sst2_xlmr.training.run_folder import claim, clean_up, write_config
from sst2_xlmr.training.signals import StopRequest


def choose_compiled(config: Config, world: World, bf16: bool) -> tuple[Kernels | None, bool]:
    """Return the CPU's kernels, if all ranks can compile them, and whether the optimizer's pass compiles on CUDA."""
    on_cpu = world.device.type == "cpu"
    kernels = load_kernels(torch.bfloat16 if bf16 else torch.float32) if config.compile and on_cpu else None
    works = kernels is not None or (config.compile and not on_cpu and can_compile(world.device))
    agreed = all(distributed.gather_objects(world, works))
    return (kernels if agreed else None), agreed and not on_cpu


def connect_processes(classifier: Classifier, optimizer: AdamW, world: World) -> torch.nn.Module:
    """Return the model to train: as it is, or under DDP where processes cannot share memory.

    On one machine's CPU, with kernels, they can; all others exchange gradients.
    """
    if optimizer.share_memory(world):
        return classifier
    return distributed.wrap_model(classifier, world, classifier.kernels.mean_of if classifier.kernels else None)


def has_stopped_improving(config: Config, progress: Progress) -> bool:
    """Whether the last evaluations were so many without a better one that training ends."""
    return 0 < config.early_stopping_patience <= progress.stale_evaluations


def training_entry(progress: Progress, batches: int, lr: float, grad_norm: float) -> dict[str, float]:
    """Return a line of training metrics: what the steps since the last line had on average."""
    loss, rows, tokens, elapsed_s = progress.window
    return {
        "step": progress.step,
        "epoch": round(progress.epoch + progress.batch / batches, 4),
        "loss": loss / rows,
        "lr": lr,
        "grad_norm": grad_norm,
        "samples_per_s": round(rows / elapsed_s, 2),
        "tokens_per_s": round(tokens / elapsed_s, 1),
    }


def not_finite(step: int, rows: np.ndarray | None, skipped_in_row: int) -> UserError:
    """Return the error that ends a run whose gradient is not finite, before that reaches a checkpoint.

    Args:
        rows: int [rows], numbers from 0 of the training rows to look at; None if it may have been an earlier step.
        skipped_in_row: how many batches, this one included, were like this.
    """
    if rows is None:
        return shared_error(
            f"loss or gradient is not finite at step {step} or shortly before: lower --lr or raise --warmup-ratio in a"
            " new run, or --resume with --skip-nonfinite N, which looks at every step; checkpoints are whole"
        )
    numbers = ", ".join(str(row + 1) for row in rows[:50]) + (", ..." if len(rows) > 50 else "")
    after = f" (the last of {skipped_in_row} in a row)" if skipped_in_row > 1 else ""
    return shared_error(
        f"loss or gradient is not finite at step {step}{after}: lower --lr or raise --warmup-ratio in a new run, or"
        f" --resume with --skip-nonfinite N; checkpoints are whole; training rows of this batch, from 1: {numbers}"
    )


def forward_and_backward(
    model: torch.nn.Module,
    share: RankShare,
    optimizer: AdamW,
    config: Config,
    world: World,
    bf16: bool,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute this rank's gradients, whose average over the ranks is that of the mean loss over the global batch.

    That is the sum over this rank's rows, divided by the global batch's rows and multiplied by the number of ranks,
    however the rows are cut. DDP averages at once, or afterwards where several micro-batches in bf16 are summed in
    fp32; processes that share memory average when they make the optimizer's step.

    Returns:
        The sum of this rank's losses; float64, no dimensions.
    """
    in_fp32 = share.accumulates and bf16
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, micro_batch in enumerate(share.micro_batches, 1):
        batch = micro_batch.to(world.device)
        synchronizes = number == len(share.micro_batches) and not in_fp32
        alone = isinstance(model, DistributedDataParallel) and not synchronizes
        with model.no_sync() if alone else contextlib.nullcontext():
            logits = model(batch.tokens, batch.padded, batch.keys).float()
            loss = sum_of_losses(logits, batch.labels, config.label_smoothing, weights) * batch.weight
            (loss * (world.world_size / share.global_rows)).backward()
        loss_sum += loss.detach()
        if in_fp32:
            optimizer.accumulate()
    if in_fp32:
        optimizer.average_accumulated(world.world_size)
    return loss_sum


def evaluate_splits(
    splits: list[str],
    keep_probabilities: bool,
    model: Classifier,
    caches: dict[str, TokenCache],
    config: Config,
    report: Report | SilentReport,
    step: int,
    world: World,
    stop: StopRequest,
) -> dict[str, dict[str, Any]]:
    """Evaluate on some files, and report what comes out, with pictures if `keep_probabilities`; returns the metrics.

    Raises:
        Interrupted: if a signal came before the last was done.
    """
    metrics = {}
    for split in splits:
        evaluation = evaluate(model, caches[split], config.eval_batch_tokens, world, keep_probabilities, stop.is_agreed)
        report.log_evaluation(step, split, evaluation, caches[split])
        metrics[split] = evaluation.metrics
    return metrics


def train(config: Config, resume: bool, world: World) -> None:
    """Train as `config` says, and leave the model in the run's folder."""
    # 1. Files -> rows -> ids. What a node decides by its hardware, rank 0 decides for all.
    precision = distributed.from_main(world, distributed.choose_precision(config.precision, world.device))
    bf16 = precision == "bf16"
    output_dir = distributed.from_main(world, config.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    config = dataclasses.replace(config, precision=precision, output_dir=output_dir)
    run_folder = Path(output_dir)
    checkpoints = run_folder / "checkpoints"
    config, encoder, files, caches = distributed.once_per_node(world, lambda: prepare(config, world.local_rank != 0))
    digests = distributed.gather_objects(world, {split: cache.digest for split, cache in caches.items()})
    if differing := [split for split in caches if len({digest.get(split) for digest in digests}) > 1]:
        raise shared_error(f"the nodes have different files for {differing[0]}; give all of them the same")
    weights = class_weights(config.class_weights, caches["train"].labels, config.classes)
    weights = weights if weights is None else weights.to(world.device)

    # 2. Model, optimizer, batches.
    kept_ids = np.arange(encoder.shape.vocab_size)
    if not config.full_vocabulary:
        kept_ids = used_ids((cache.distinct_ids for cache in caches.values()), encoder.shape.vocab_size)
        for cache in caches.values():
            cache.renumbering = renumbering(kept_ids, encoder.shape.vocab_size)
    vocabulary = torch.from_numpy(kept_ids)
    classifier, head_is_new = build_classifier(encoder, config, None if config.full_vocabulary else kept_ids)
    classifier.to(world.device)
    kernels, compiles = choose_compiled(config, world, bf16)
    classifier.kernels = kernels
    optimizer = AdamW(
        classifier,
        layers=encoder.shape.layers,
        weight_decay=config.weight_decay,
        layerwise_lr_decay=config.layerwise_lr_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16,
        kernels=kernels,
        compile_step=compiles,
    )
    sampler = GlobalBatchSampler(
        caches["train"].lengths(), config.batch_size, config.seed, world.rank, world.world_size
    )
    loader = build_loader(caches["train"], sampler, config, pin_memory=world.device.type == "cuda")
    total_steps = config.max_steps or config.epochs * len(sampler)

    # 3. Where to begin.
    encoder_digest = distributed.from_main(world, digest_of(encoder.weights_file) if world.is_main else None)

    def claim_folders() -> IO[str]:
        claim_event_folder(config, resume)
        lock = claim(run_folder)
        if not resume:
            write_config(run_folder, config, is_new=True)
        return lock

    lock = distributed.on_main(world, claim_folders)
    progress = Progress(caches["train"].digest, encoder_digest)
    seed_rank(config.seed, world.rank)
    checkpoint = find_checkpoint(checkpoints, print) if resume and world.is_main else None
    checkpoint = distributed.from_main(world, checkpoint)
    if checkpoint:
        inputs = (progress.train_digest, progress.encoder_digest)
        progress = load_progress(checkpoint)
        for what, before, now in zip(("rows", "weights"), (progress.train_digest, progress.encoder_digest), inputs):
            if before != now:
                raise UserError(f"the training {what} differ from those that {run_folder} was started with")
        load_checkpoint(checkpoint, progress, optimizer, vocabulary, config.seed, world)
    model = connect_processes(classifier, optimizer, world)
    during = splits_during(config)
    at_end = [split for split in files if split not in ("train", *during)]

    def open_outputs() -> Report:
        if resume:
            write_config(run_folder, config, is_new=False)
        clean_up(run_folder)
        evaluated = {split: files[split] for split in (*during, *at_end)}
        again = at_end + (during if progress.evaluation_due else [])
        return open_report(config, evaluated, progress.step, total_steps, again)

    report = distributed.on_main(world, open_outputs) or SilentReport()
    header = Header(
        config=config,
        encoder=encoder,
        optimizer=optimizer,
        caches=caches,
        world=world,
        table_rows=len(kept_ids),
        has_new_head=head_is_new,
        total_steps=total_steps,
        is_compiled=kernels is not None or compiles,
    )
    for line in header.lines():
        report.say(line)
    if resume:
        report.say(f"resume     {f'from {checkpoint}' if checkpoint else 'no checkpoint yet: from the beginning'}")

    with Finisher() as finisher, StopRequest(world) as stop, contextlib.closing(report):

        def evaluate_on_dev() -> bool:
            """Evaluate, keep the model if it is the best; returns False if a signal came in between."""
            ends = progress.batch == 0 or progress.step == total_steps
            keeps = ends or progress.stale_evaluations + 1 == config.early_stopping_patience
            try:
                found = evaluate_splits(during, keeps, classifier, caches, config, report, progress.step, world, stop)
            except Interrupted:
                return False
            accuracy = found["dev"]["accuracy"]
            is_best = accuracy > progress.best_accuracy
            report.say_evaluation(progress.step, found, is_best)
            if is_best:
                try:
                    export_to("best")
                except UserError:
                    save()  # with the evaluation still due, so that no step is lost
                    raise
                progress.best_accuracy, progress.best_step = accuracy, progress.step
            progress.stale_evaluations = 0 if is_best else progress.stale_evaluations + 1
            progress.evaluation_due = False
            return True

        def export_to(name: str) -> None:
            step = progress.step
            export_run(run_folder / name, optimizer, encoder, vocabulary, caches, step, config, world, finisher)

        def save() -> None:
            progress.world_size, progress.table_decay = world.world_size, optimizer.table_decay
            distributed.on_main(world, report.sync)
            saved = save_checkpoint(checkpoints, progress, optimizer, vocabulary, config, world, finisher)
            report.log_checkpoint(progress.step, saved)

        # 4. The loop. On CUDA, reading the norm at every step would keep the GPU waiting.
        watches_norm = world.device.type == "cpu" or config.skip_nonfinite > 0
        loss_sum = torch.tensor(progress.window[0] * world.is_main, dtype=torch.float64, device=world.device)
        rows, tokens = (count * world.is_main for count in progress.window[1:3])
        window_start = time.monotonic() - progress.window[3]
        grad_norm = torch.zeros(())
        is_stopped = progress.evaluation_due and not evaluate_on_dev()
        stopped_early = has_stopped_improving(config, progress)
        model.train()
        while progress.step < total_steps and not stopped_early and not is_stopped:
            sampler.load_state_dict({"epoch": progress.epoch, "batch": progress.batch})
            for share in loader:
                lr = config.lr * lr_factor(progress.step, total_steps, config.warmup_ratio, config.schedule)
                share_loss = forward_and_backward(model, share, optimizer, config, world, bf16, weights)
                accumulated = share.accumulates and bf16
                norm = optimizer.gradient_norm(accumulated)
                progress.step += 1
                progress.batch += 1
                if watches_norm and not math.isfinite(float(norm)):
                    progress.skipped += 1
                    progress.skipped_in_row += 1
                    if progress.skipped_in_row > config.skip_nonfinite:
                        batch = next(sampler.global_batches(progress.batch - 1))
                        raise not_finite(progress.step, batch, progress.skipped_in_row)
                    report.say(f"step {progress.step:>6}  gradient is not finite: batch passed over")
                    optimizer.clear_gradients()
                else:
                    progress.skipped_in_row = 0
                    grad_norm = norm
                    optimizer.step(lr, grad_norm, accumulated)
                    loss_sum += share_loss
                    rows += sum(len(batch.labels) * batch.weight for batch in share.micro_batches)
                    tokens += sum(batch.real_tokens * batch.weight for batch in share.micro_batches)
                report.advance()

                ends_epoch = progress.batch == len(sampler)
                ends = ends_epoch or progress.step == total_steps
                logs = progress.step % config.log_every == 0 or progress.step == total_steps
                evaluates = ends or (config.eval_every and progress.step % config.eval_every == 0)
                saves = ends or (config.save_every and progress.step % config.save_every == 0)
                is_stopped = stop.is_agreed()
                if not (logs or evaluates or saves or is_stopped):
                    continue

                elapsed_s = time.monotonic() - window_start
                sums = torch.stack([loss_sum, loss_sum.new_tensor(rows), loss_sum.new_tensor(tokens)])
                progress.window = [*distributed.sum_over_ranks(world, sums).tolist(), elapsed_s]
                if not watches_norm and not math.isfinite(progress.window[0] + float(grad_norm)):
                    raise not_finite(progress.step, None, 1)
                if logs and progress.window[1]:  # there may be nothing but batches passed over
                    report.log_training(training_entry(progress, len(sampler), lr, float(grad_norm)))
                    progress.window = [0.0, 0.0, 0.0, 0.0]
                if ends_epoch:
                    progress.epoch, progress.batch = progress.epoch + 1, 0
                if evaluates:
                    progress.evaluation_due = True
                    is_stopped = is_stopped or not evaluate_on_dev()
                    stopped_early = has_stopped_improving(config, progress)
                if saves or stopped_early or is_stopped:
                    save()

                # Rank 0 goes on from the sums of all; what evaluation and saving took is no training time.
                loss_sum.fill_(progress.window[0] * world.is_main)
                rows, tokens = (count * world.is_main for count in progress.window[1:3])
                window_start = time.monotonic() - progress.window[3]
                if stopped_early or is_stopped or progress.step == total_steps:
                    break

        # 5. What comes out.
        if stopped_early:
            report.say(f"stopped early: {progress.stale_evaluations} evaluations without a better dev accuracy")
        if not is_stopped:
            try:
                evaluate_splits(at_end, True, classifier, caches, config, report, progress.step, world, stop)
            except Interrupted:
                is_stopped = True
        if not is_stopped:
            report.log_end(progress.step)
            export_to("model")
        distributed.on_main(world, finisher.wait)
        if is_stopped:
            name = signal.Signals(stop.number).name
            report.say(f"stopped    by {name} after step {progress.step}, and saved; continue with")
            report.say(f"           train.py --resume --output-dir {run_folder}")
            raise Stopped(stop.number)
        best = f"dev accuracy {progress.best_accuracy:.4f} at step {progress.best_step}"
        report.say(f"best       {best}: {run_folder / 'best'}")
        report.say(f"model      after step {progress.step}: {run_folder / 'model'}")
        if lock is not None:
            lock.close()


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    config, resume = parse_args(argv)
    with distributed.start(config.device, config.threads, config.timeout_minutes) as world:
        try:
            train(config, resume, world)
        except torch.cuda.OutOfMemoryError:
            raise UserError("the GPU's memory is full: lower --micro-batch-size (the result stays the same)") from None


if __name__ == "__main__":
    exit_on_user_error(main)
