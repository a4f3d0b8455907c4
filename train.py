"""Fine-tune XLM-R for text classification.

    python train.py --device cpu                       # laptop or workstation
    torchrun --nproc_per_node=2 train.py               # one machine, several GPUs (or CPU processes)
    sbatch scripts/train.sbatch                        # SLURM cluster, one or many nodes

The way of the data: files -> rows -> ids -> global batches -> model -> loss -> step -> checkpoint -> model folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr import distributed, sources
from sst2_xlmr.arguments import parse_args
from sst2_xlmr.batching import GlobalBatchSampler, RankShare, TokenCache, build_loader, tokenize_file
from sst2_xlmr.checkpoint import Progress, find_checkpoint, load_checkpoint, load_progress, save_checkpoint, seed_rank
from sst2_xlmr.compact_vocab import TABLE_NAME, expand_table, renumbering, used_ids
from sst2_xlmr.config import Config, UserError, exit_on_user_error
from sst2_xlmr.data import find_split, has_column
from sst2_xlmr.distributed import World
from sst2_xlmr.encoders import Encoder, find_encoder, load_tensors
from sst2_xlmr.evaluate import evaluate
from sst2_xlmr.export import export_hugging_face
from sst2_xlmr.model import build_classifier
from sst2_xlmr.optim import AdamW, lr_factor
from sst2_xlmr.report import (
    advance,
    close_report,
    describe_batches,
    describe_device,
    describe_model,
    describe_rows,
    log_evaluation,
    log_training,
    open_report,
    say,
)


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
    tests = [Path(file) for file in config.test_file]
    if not tests and folder and (test := find_split(folder, "test")) and has_column(test, config.label_column):
        tests = [test]  # GLUE's test file has no labels
    for file in tests:
        files[file.stem if file.stem not in files else str(file)] = file
    return files


def prepare(config: Config, quiet: bool) -> tuple[Encoder, dict[str, TokenCache]]:
    """Fetch and tokenize what the run needs; what an earlier run has left is used as it is."""
    files = find_files(config, quiet)
    encoder = find_encoder(config.encoder, quiet)
    if config.max_length > encoder.shape.positions - 2:
        raise UserError(
            f"--max-length {config.max_length}: {encoder.name} takes at most {encoder.shape.positions - 2} tokens"
        )
    cache_dir = sources.cache_dir() / "tokens"
    return encoder, {
        split: tokenize_file(file, encoder.tokenizer_file, config, cache_dir) for split, file in files.items()
    }


def open_run_folder(config: Config, world: World) -> Path:
    """Make the run's folder and write its `config.json`."""
    name = config.output_dir or distributed.from_main(world, f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    folder = Path(name)
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            problem = f"cannot write to --output-dir {folder}: {error.strerror}"
    if problem := distributed.from_main(world, problem):
        raise UserError(problem)
    return folder


def has_stopped_improving(config: Config, progress: Progress) -> bool:
    """Whether the last evaluations were so many without a better one that training ends."""
    return 0 < config.early_stopping_patience <= progress.stale_evaluations


def check_finite(step: int, loss: float) -> None:
    """Stop before a broken model is saved as if it were a good one."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is not finite at step {step}: lower --lr, or take --precision fp32; older checkpoints are whole"
        )


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
            logits = model(batch.tokens, batch.padded).float()
            smoothing = config.label_smoothing
            loss = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing) * batch.weight
            (loss * (world.world_size / share.global_rows)).backward()
        loss_sum += loss.detach()
        if in_fp32:
            optimizer.accumulate()
    if in_fp32:
        optimizer.average_accumulated(world.world_size)
    return loss_sum


def train(config: Config, resume: bool, world: World) -> None:
    """Train as `config` says, and leave the model in the run's folder."""
    # 1. Files -> rows -> ids.
    config = dataclasses.replace(config, precision=distributed.choose_precision(config.precision, world.device))
    bf16 = config.precision == "bf16"
    encoder, caches = distributed.once_per_node(world, lambda: prepare(config, quiet=world.local_rank != 0))
    run_folder = open_run_folder(config, world)
    checkpoints = run_folder / "checkpoints"

    # 2. Model, optimizer, batches.
    kept_ids = np.arange(encoder.shape.vocab_size)
    if config.compact_vocab:
        kept_ids = used_ids((cache.ids for cache in caches.values()), encoder.shape.vocab_size)
        for cache in caches.values():
            cache.renumbering = renumbering(kept_ids, encoder.shape.vocab_size)
    vocabulary = torch.from_numpy(kept_ids)
    classifier, head_is_new = build_classifier(encoder, config, kept_ids if config.compact_vocab else None)
    classifier.to(world.device)
    optimizer = AdamW(
        classifier,
        layers=encoder.shape.layers,
        weight_decay=config.weight_decay,
        layerwise_lr_decay=config.layerwise_lr_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16,
        compile_step=config.compile,
    )
    sampler = GlobalBatchSampler(
        caches["train"].lengths(), config.batch_size, config.seed, world.rank, world.world_size
    )
    loader = build_loader(caches["train"], sampler, config, pin_memory=world.device.type == "cuda")
    total_steps = config.max_steps or config.epochs * len(sampler)

    # 3. Where to begin.
    progress = Progress(train_digest=caches["train"].digest)
    seed_rank(config.seed, world.rank)
    checkpoint = find_checkpoint(checkpoints, print) if resume and world.is_main else None
    checkpoint = distributed.from_main(world, checkpoint)
    if checkpoint:
        progress = load_progress(checkpoint)
        if progress.train_digest != caches["train"].digest:
            raise UserError(
                f"the training rows are not those that {run_folder} was started with; name the same --train-file"
            )
        load_checkpoint(checkpoint, progress, optimizer, vocabulary, config.seed, world)
    model: torch.nn.Module = classifier
    if world.world_size > 1:
        device_ids = [world.device] if world.device.type == "cuda" else None
        model = DistributedDataParallel(classifier, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    tensorboard_dir = Path(config.tensorboard_dir or run_folder / "tensorboard")
    report = open_report(run_folder, tensorboard_dir, progress.step, total_steps, world.is_main)
    head = f"{'new' if head_is_new else 'its own'} head for {', '.join(config.label_names)}"
    masters = "bf16 with fp32 master weights" if bf16 else "fp32"
    compiled = "AdamW compiled" if optimizer.is_compiled else "AdamW not compiled"
    say(report, f"encoder    {config.encoder}: {describe_model(encoder, optimizer, len(kept_ids))}; {head}")
    say(report, f"rows       {describe_rows(caches, config.max_length)}")
    say(report, f"batches    {describe_batches(config, len(sampler), total_steps)}")
    say(report, f"device     {describe_device(world)}; {masters}; {compiled}")
    say(report, f"run        {run_folder}")
    if resume:
        say(report, f"resume     {f'from {checkpoint}' if checkpoint else 'no checkpoint yet: from the beginning'}")

    # 4. The loop.
    window = torch.tensor(progress.window if world.is_main else [0.0] * 3, dtype=torch.float64, device=world.device)
    window_start = time.monotonic()
    stopped_early = has_stopped_improving(config, progress)
    model.train()
    while progress.step < total_steps and not stopped_early:
        sampler.load_state_dict({"epoch": progress.epoch, "batch": progress.batch})
        for share in loader:
            lr = config.lr * lr_factor(progress.step, total_steps, config.warmup_ratio, config.schedule)
            loss_sum = forward_and_backward(model, share, optimizer, config, world, bf16)
            grad_norm = optimizer.step(lr, accumulated=share.accumulates and bf16)
            progress.step += 1
            progress.batch += 1
            rows = sum(len(batch.labels) * batch.weight for batch in share.micro_batches)
            tokens = sum(batch.real_tokens * batch.weight for batch in share.micro_batches)
            window += torch.stack([loss_sum, loss_sum.new_tensor(rows), loss_sum.new_tensor(tokens)])
            advance(report)
            ends_epoch = progress.batch == len(sampler)
            ends_run = progress.step == total_steps

            if progress.step % config.log_every == 0 or ends_run:
                loss, rows, tokens = distributed.sum_over_ranks(world, window).tolist()
                elapsed_s = time.monotonic() - window_start
                entry = {
                    "step": progress.step,
                    "epoch": round(progress.epoch + progress.batch / len(sampler), 4),
                    "loss": loss / rows,
                    "lr": lr,
                    "grad_norm": float(grad_norm),
                    "samples_per_s": round(rows / elapsed_s, 2),
                    "tokens_per_s": round(tokens / elapsed_s, 1),
                }
                check_finite(progress.step, loss)
                log_training(report, entry)
                window.zero_()
                window_start = time.monotonic()

            paused = time.monotonic()
            if ends_epoch:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            if ends_epoch or ends_run or (config.eval_every and progress.step % config.eval_every == 0):
                metrics = evaluate(classifier, caches["dev"], config.eval_batch_size, world)
                is_best = metrics["accuracy"] > progress.best_accuracy
                progress.stale_evaluations = 0 if is_best else progress.stale_evaluations + 1
                log_evaluation(report, progress.step, "dev", metrics, "  (best so far)" if is_best else "")
                if is_best:
                    progress.best_accuracy, progress.best_step = metrics["accuracy"], progress.step
                    export(run_folder / "best", optimizer, encoder, vocabulary, config, world)
                stopped_early = has_stopped_improving(config, progress)
            if (
                ends_epoch
                or ends_run
                or stopped_early
                or (config.save_every and progress.step % config.save_every == 0)
            ):
                distributed.sum_over_ranks(world, window)
                progress.window = window.tolist()
                check_finite(progress.step, progress.window[0])
                progress.world_size, progress.table_decay = world.world_size, optimizer.table_decay
                window *= world.is_main
                save_checkpoint(checkpoints, progress, optimizer, vocabulary, config, world)
            window_start += time.monotonic() - paused
            if ends_run or stopped_early:
                break

    # 5. What comes out.
    if stopped_early:
        say(report, f"stopped early: {progress.stale_evaluations} evaluations without a better dev accuracy")
    for split, cache in caches.items():
        if split not in ("train", "dev"):
            log_evaluation(report, progress.step, split, evaluate(classifier, cache, config.eval_batch_size, world))
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
    if world.is_main:
        masters = {name: tensor.cpu() for name, tensor in optimizer.master_tensors().items()}
        if config.compact_vocab:
            pretrained = load_tensors(encoder)[TABLE_NAME]
            masters[TABLE_NAME] = expand_table(pretrained, kept_ids, masters[TABLE_NAME], optimizer.table_decay)
        export_hugging_face(
            folder, masters, encoder.shape, config.label_names, config.max_length, encoder.tokenizer_file
        )
    distributed.barrier(world)


def main(argv: list[str] | None = None) -> None:
    config, resume = parse_args(argv)
    with distributed.start(config.device, config.threads, config.timeout_minutes) as world:
        train(config, resume, world)


if __name__ == "__main__":
    exit_on_user_error(main)
