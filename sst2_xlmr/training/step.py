"""The gradient of a global batch, exact for every number of processes and every size of micro-batch."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sst2_xlmr.data.batches import RankBatch
from sst2_xlmr.training.loss import Loss
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.util.distributed import World


def forward_backward(
    model: nn.Module, rank_batch: RankBatch, loss: Loss, optimizer: AdamW, world: World
) -> dict[str, torch.Tensor]:
    """Compute this rank's gradients, whose average over the ranks is that of the mean loss over the global batch.

    That is the sum over this rank's rows, divided by the global batch's rows and multiplied by the number of ranks,
    however the rows are cut. DDP averages during the last backward pass, or the optimizer does so afterwards, if it
    accumulates micro-batches in fp32 or its engine reads the gradients of all processes.

    Args:
        model: gives logits; perhaps under DDP.

    Returns:
        Sums over this rank's rows, by the name of the training metric; float64, no dimensions. Another metric is one
        more sum here: `Window` and the report take whatever is in it, and write the means.
    """
    sums_in_fp32 = rank_batch.accumulates and optimizer.has_masters
    sums = {"loss": torch.zeros((), dtype=torch.float64, device=world.device)}
    for number, micro_batch in enumerate(rank_batch.micro_batches, 1):
        batch = micro_batch.to(world.device)
        ddp_averages = number == len(rank_batch.micro_batches) and not sums_in_fp32
        stays_here = isinstance(model, DistributedDataParallel) and not ddp_averages
        with model.no_sync() if stays_here else contextlib.nullcontext():
            logits = model(batch.tokens, batch.padded, batch.keys).float()
            batch_loss = loss(logits, batch.labels) * batch.weight
            (batch_loss * (world.world_size / rank_batch.global_rows)).backward()
        sums["loss"] += batch_loss.detach()
        if sums_in_fp32:
            optimizer.accumulate()
    if sums_in_fp32:
        optimizer.average_accumulated(world)
    return sums
