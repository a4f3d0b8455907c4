"""The gradient of a global batch, exact for every number of processes and every size of micro-batch."""

from __future__ import annotations

import contextlib
from typing import Callable, Optional

import torch
from torch import nn

from sst2_xlmr.data.batches import Batch
from sst2_xlmr.util.distributed import World

# Takes fp32 logits [rows, outputs], labels and weights or None [rows]; returns the weighted sum of the rows' losses.
Loss = Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor]], torch.Tensor]


def forward_backward(model: nn.Module, batches: list[Batch], loss: Loss, world: World) -> dict[str, torch.Tensor]:
    """Compute this rank's gradients, whose average over the ranks is that of the mean loss over the global batch.

    That is the sum over this rank's rows, divided by the global batch's rows (by the sum of their weights) and
    multiplied by the number of ranks. Gradients are averaged in the last backward pass; those before are under
    `no_sync`.

    Returns sums over this rank's rows, by the training metric's name; float64, no dimensions. For another metric, add a
    sum here: `TrainMeter` and the report write the means of all.
    """
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    sums = {"loss": torch.zeros((), dtype=torch.float64, device=world.device)}
    for number, micro_batch in enumerate(batches, 1):
        batch = micro_batch.to(world.device)
        with contextlib.nullcontext() if number == len(batches) else no_sync():
            logits = model(batch.ids, batch.lengths, batch.keys, batch.windows).float()
            batch_loss = loss(logits, batch.labels, batch.row_weights) * batch.weight
            (batch_loss * (world.world_size / batch.global_weight)).backward()
        sums["loss"] += batch_loss.detach() * (batch.global_rows / batch.global_weight)
    return sums
