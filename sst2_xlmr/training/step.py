"""The gradient of a global batch, which depends neither on the number of processes nor on the micro-batch size."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from sst2_xlmr.data.batches import MicroBatch
from sst2_xlmr.util.distributed import World

# Takes fp32 logits [rows, outputs], labels, and weights [rows] or None; returns the weighted sum of the rows' losses.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def forward_backward(model: nn.Module, batches: list[MicroBatch], loss: Loss, world: World) -> dict[str, torch.Tensor]:
    """Compute gradients whose average over the ranks is the gradient of the global batch's mean loss.

    So a rank's loss is summed over its rows, divided by the number of rows in the global batch, or by the sum of their
    weights if rows are weighted, and multiplied by the number of ranks. DDP averages gradients in the last backward
    pass; the others run under `no_sync`.

    Returns training metric -> its sum over this rank's rows, float64 []. To add a metric, add a sum here: `TrainMeter`
    and the report write the means of all.
    """
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    sums = {"loss": torch.zeros((), dtype=torch.float64, device=world.device)}
    for number, micro_batch in enumerate(batches, 1):
        batch = micro_batch.to(world.device)
        with contextlib.nullcontext() if number == len(batches) else no_sync():
            logits = model(batch.ids, batch.lengths, batch.dropout_keys, batch.windows).float()
            batch_loss = loss(logits, batch.labels, batch.row_weights) * batch.factor
            (batch_loss * (world.world_size / batch.global_weight)).backward()
        # The meter divides by rows, but the loss is a mean by weight: a factor of 1 without row weights.
        sums["loss"] += batch_loss.detach() * (batch.global_rows / batch.global_weight)
    return sums
