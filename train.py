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
import functools
import itertools
import math
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr import distributed, sources
from sst2_xlmr.arguments import parse_args
from sst2_xlmr.batching import GlobalBatchSampler, RankShare, TokenCache, build_loader, tokenize_file
from sst2_xlmr.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_progress,
    masters_of,
    save_checkpoint,
    seed_rank,
)
from sst2_xlmr.compact_vocab import TABLE_NAME, expand_table, renumbering, used_ids
from sst2_xlmr.config import Config, UserError, exit_on_user_error, named_file
from sst2_xlmr.cpu_kernels import Kernels, load_kernels
from sst2_xlmr.data import find_split, has_column, read_rows
from sst2_xlmr.distributed import World, shared_error
from sst2_xlmr.encoders import BUNDLE_SHAPES, Encoder, EncoderShape, find_encoder, pretrained_table
from sst2_xlmr.evaluate import evaluate
from sst2_xlmr.export import export_hugging_face
from sst2_xlmr.files import digest_of
from sst2_xlmr.memory import keep_freed_memory
from sst2_xlmr.model import Classifier, build_classifier
from sst2_xlmr.optim import AdamW, can_compile, lr_factor
from sst2_xlmr.report import (
    Report,
    advance,
    close_report,
    describe_batches,
    describe_device,
    describe_model,
    describe_rows,
    log_end,
    log_evaluation,
    log_training,
    open_report,
    open_run_folder,
    say,
    say_evaluation,
    splits_during,
)
from sst2_xlmr.tokenizer import load_tokenizer


def find_files(config: Config, quiet: bool) -> dict[str, Path]:
    """Return split name -> file: train, dev, and the test files by their names."""
    folder = Path(config.data_dir) if config.data_dir else None
    if folder is None and config.train_file is None:
        folder = sources.fetch_sst2(quiet=quiet)
    files = {}
    for split, given in (("train", config.train_file), ("dev", config.dev_file)):
        file = Path(given) if given else find_split(folder, split) if folder else None
        if file is None:
            raise UserError(
                f"{folder} has no {split}.tsv, {split}.csv or {split}.jsonl; name the file with --{split}-file"
            )
        files[split] = file
    files.update(map(named_file, config.eval_file))
    tests = [Path(file) for file in config.test_file]
    if not tests and folder and (test := find_split(folder, "test")) and has_column(test, config.label_column):
        tests = [test]  # GLUE's test file has no labels
    for file in tests:
        files[file.stem if file.stem not in files else str(file)] = file
    return files


def check_max_length(config: Config, shape: EncoderShape) -> None:
    longest = shape.positions - 2
    if config.max_length > longest:
        raise UserError(f"--max-length {config.max_length}: {config.encoder} takes at most {longest} tokens")


def prepare(config: Config, quiet: bool) -> tuple[Encoder, dict[str, Path], dict[str, TokenCache]]:
    """Fetch and tokenize what the run needs; what an earlier run has left is used as it is."""
    files = find_files(config, quiet)
    for file in files.values():  # a wrong column or layout shows in the first rows, before anything is downloaded
        rows = read_rows(file, config.text_column, config.label_column, config.label_names)
        next(itertools.islice(rows, 1000, None), None)
    if config.encoder in BUNDLE_SHAPES:  # nor must this wait for a download
        check_max_length(config, BUNDLE_SHAPES[config.encoder])
    encoder = find_encoder(config.encoder, quiet)
    check_max_length(config, encoder.shape)
    cache_dir = sources.cache_dir() / "tokens"
    load = functools.lru_cache(maxsize=1)(load_tokenizer)
    caches = {
        split: tokenize_file(file, encoder.tokenizer_file, config, cache_dir, load) for split, file in files.items()
    }
    largest_id = max(int(cache.distinct_ids[-1]) for cache in caches.values())
    if largest_id >= encoder.shape.vocab_size:
        raise UserError(
            f"{encoder.tokenizer_file} gives ids up to {largest_id}, but {encoder.name} has {encoder.shape.vocab_size}"
            " embedding rows; the two are not of one model"
        )
    return encoder, files, caches


def choose_compiled(config: Config, world: World, bf16: bool) -> tuple[Kernels | None, bool]:
    """Return the CPU's kernels, if all ranks can compile them, and whether the optimizer's pass compiles on CUDA."""
    on_cpu = world.device.type == "cpu"
    kernels = load_kernels(torch.bfloat16 if bf16 else torch.float32) if config.compile and on_cpu else None
    works = kernels is not None or (config.compile and not on_cpu and can_compile(world.device))
    agreed = all(distributed.gather_objects(world, works))
    return (kernels if agreed else None), agreed and not on_cpu


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


def check_finite(step: int, loss_and_norm: float) -> None:
    """Stop before a broken model is saved as if it were a good one."""
    if not math.isfinite(loss_and_norm):
        raise UserError(f"loss or gradient is not finite at step {step}: lower --lr; older checkpoints are whole")


def forward_and_backward(
    model: torch.nn.Module, share: RankShare, optimizer: AdamW, config: Config, world: World, bf16: bool
) -> torch.Tensor:
    """Compute the gradient of the mean loss over the global batch, on every rank the same.

    DDP averages the ranks' gradients; the sum over this rank's rows, divided by the global batch's rows and multiplied
    by the number of ranks, averages to the global mean, however the rows are cut. Several micro-batches in bf16 are
    summed in fp32 and averaged over the ranks afterwards.

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
            smoothing = config.label_smoothing
            loss = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing) * batch.weight
            (loss * (world.world_size / share.global_rows)).backward()
        loss_sum += loss.detach()
        if in_fp32:
            optimizer.accumulate()
    if in_fp32:
        optimizer.average_accumulated(world.world_size)
    return loss_sum


def evaluate_splits(
    splits: list[str],
    draws: bool,
    model: Classifier,
    caches: dict[str, TokenCache],
    report: Report,
    step: int,
    config: Config,
    world: World,
) -> dict[str, dict[str, Any]]:
    """Evaluate on some files, and report what comes out, with pictures if `draws`; returns metrics by split."""
    metrics = {}
    for split in splits:
        found = evaluate(model, caches[split], config.eval_batch_size, world, wants_probabilities=draws)
        log_evaluation(report, step, split, found, caches[split])
        metrics[split] = found.metrics
    return metrics


def train(config: Config, resume: bool, world: World) -> None:
    """Train as `config` says, and leave the model in the run's folder."""
    # 1. Files -> rows -> ids. What a node decides by its hardware, rank 0 decides for all.
    precision = distributed.from_main(world, distributed.choose_precision(config.precision, world.device))
    bf16 = precision == "bf16"
    output_dir = distributed.from_main(world, config.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    config = dataclasses.replace(config, precision=precision, output_dir=output_dir)
    run_folder = Path(output_dir)
    tensorboard_dir = Path(config.tensorboard_dir or run_folder / "tensorboard")
    checkpoints = run_folder / "checkpoints"
    encoder, files, caches = distributed.once_per_node(world, lambda: prepare(config, quiet=world.local_rank != 0))

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
    progress = Progress(caches["train"].digest, encoder_digest)
    seed_rank(config.seed, world.rank)
    checkpoint = find_checkpoint(checkpoints, print) if resume and world.is_main else None
    checkpoint = distributed.from_main(world, checkpoint)
    if checkpoint:
        inputs = (progress.train_digest, progress.encoder_digest)
        progress = load_progress(checkpoint)
        for what, before, now in zip(("rows", "weights"), (progress.train_digest, progress.encoder_digest), inputs):
            if before != now:
                raise shared_error(f"the training {what} differ from those that {run_folder} was started with")
        load_checkpoint(checkpoint, progress, optimizer, vocabulary, config.seed, world)
    model = distributed.wrap_model(classifier, world, kernels.mean_of if kernels else None)
    distributed.on_main(world, lambda: open_run_folder(run_folder, tensorboard_dir, config, resume))
    during = splits_during(config)
    at_end = [split for split in files if split not in ("train", *during)]
    evaluated = {split: files[split] for split in (*during, *at_end)}
    report = open_report(run_folder, tensorboard_dir, config, evaluated, progress.step, total_steps, world.is_main)
    head = f"{'new' if head_is_new else 'its own'} head for {', '.join(config.label_names)}"
    masters = "bf16 with fp32 master weights" if bf16 else "fp32"
    compiled = "compiled" if kernels or compiles else "not compiled: slower"
    say(report, f"encoder    {config.encoder}: {describe_model(encoder, optimizer, len(kept_ids))}; {head}")
    say(report, f"rows       {describe_rows(caches, config.max_length)}")
    say(report, f"batches    {describe_batches(config, len(sampler), total_steps)}")
    say(report, f"device     {describe_device(world)}; {masters}; {compiled}")
    say(report, f"run        {run_folder}")
    if resume:
        say(report, f"resume     {f'from {checkpoint}' if checkpoint else 'no checkpoint yet: from the beginning'}")

    # 4. The loop.
    loss_sum = torch.tensor(progress.window[0] * world.is_main, dtype=torch.float64, device=world.device)
    rows, tokens = (count * world.is_main for count in progress.window[1:3])
    window_start = time.monotonic() - progress.window[3]
    stopped_early = has_stopped_improving(config, progress)
    model.train()
    while progress.step < total_steps and not stopped_early:
        sampler.load_state_dict({"epoch": progress.epoch, "batch": progress.batch})
        for share in loader:
            lr = config.lr * lr_factor(progress.step, total_steps, config.warmup_ratio, config.schedule)
            loss_sum += forward_and_backward(model, share, optimizer, config, world, bf16)
            accumulated = share.accumulates and bf16
            grad_norm = optimizer.gradient_norm(accumulated)
            optimizer.step(lr, grad_norm, accumulated)
            progress.step += 1
            progress.batch += 1
            rows += sum(len(batch.labels) * batch.weight for batch in share.micro_batches)
            tokens += sum(batch.real_tokens * batch.weight for batch in share.micro_batches)
            advance(report)

            ends_epoch = progress.batch == len(sampler)
            ends = ends_epoch or progress.step == total_steps
            logs = progress.step % config.log_every == 0 or progress.step == total_steps
            evaluates = ends or (config.eval_every and progress.step % config.eval_every == 0)
            saves = ends or (config.save_every and progress.step % config.save_every == 0)
            if not (logs or evaluates or saves):
                continue

            elapsed_s = time.monotonic() - window_start
            sums = torch.stack([loss_sum, loss_sum.new_tensor(rows), loss_sum.new_tensor(tokens)])
            progress.window = [*distributed.sum_over_ranks(world, sums).tolist(), elapsed_s]
            check_finite(progress.step, progress.window[0] + float(grad_norm))
            if logs:
                log_training(report, training_entry(progress, len(sampler), lr, float(grad_norm)))
                progress.window = [0.0, 0.0, 0.0, 0.0]
            if ends_epoch:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            if evaluates:
                draws = ends or progress.stale_evaluations + 1 == config.early_stopping_patience
                found = evaluate_splits(during, draws, classifier, caches, report, progress.step, config, world)
                accuracy = found["dev"]["accuracy"]
                is_best = accuracy > progress.best_accuracy
                progress.stale_evaluations = 0 if is_best else progress.stale_evaluations + 1
                say_evaluation(report, progress.step, found, is_best)
                if is_best:
                    progress.best_accuracy, progress.best_step = accuracy, progress.step
                    export(run_folder / "best", optimizer, encoder, vocabulary, config, world)
                stopped_early = has_stopped_improving(config, progress)
            if saves or stopped_early:
                progress.world_size, progress.table_decay = world.world_size, optimizer.table_decay
                save_checkpoint(checkpoints, progress, optimizer, vocabulary, config, world)

            # Rank 0 goes on from the sums of all; what evaluation and saving took is no training time.
            loss_sum.fill_(progress.window[0] * world.is_main)
            rows, tokens = (count * world.is_main for count in progress.window[1:3])
            window_start = time.monotonic() - progress.window[3]
            if stopped_early or progress.step == total_steps:
                break

    # 5. What comes out.
    if stopped_early:
        say(report, f"stopped early: {progress.stale_evaluations} evaluations without a better dev accuracy")
    evaluate_splits(at_end, True, classifier, caches, report, progress.step, config, world)
    log_end(report, progress.step)
    export(run_folder / "model", optimizer, encoder, vocabulary, config, world)
    say(
        report,
        f"best       dev accuracy {progress.best_accuracy:.4f} at step {progress.best_step}: {run_folder / 'best'}",
    )
    say(report, f"model      after step {progress.step}: {run_folder / 'model'}")
    close_report(report)


def export(
    folder: Path, optimizer: AdamW, encoder: Encoder, kept_ids: torch.Tensor, config: Config, world: World
) -> None:
    """Write the weights as they are now in Hugging Face layout, with the whole vocabulary, from rank 0."""

    def write() -> None:
        masters = masters_of(optimizer)
        if not config.full_vocabulary:
            pretrained = pretrained_table(encoder)
            masters[TABLE_NAME] = expand_table(pretrained, kept_ids, masters[TABLE_NAME], optimizer.table_decay)
        export_hugging_face(
            folder, masters, encoder.shape, config.label_names, config.max_length, encoder.tokenizer_file
        )

    distributed.on_main(world, write)


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
