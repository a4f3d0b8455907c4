"""Means of training metrics since the last line of them."""

from __future__ import annotations

import time
from typing import Any

import torch

from sst2_xlmr.data.batches import Batch
from sst2_xlmr.training.guard import NotFinite
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.distributed import World, sum_over_ranks


class TrainMeter:
    """Sums over the steps since the last line of training metrics.

    Every rank adds up its own, without waiting for a GPU. `reduce` sums over ranks and stops the clock, so that
    evaluating and saving do not count as training; `start` starts it again.

    Attributes:
        totals: sums over all ranks, as of the last `reduce`, by name: "rows", "tokens", "seconds" of training,
            "grad_norm" (the last one), and "sum." and the name of each training metric. A checkpoint holds them.
    """

    def __init__(self, world: World) -> None:
        self.totals: dict[str, float] = {}
        self._world = world
        self.start()

    def start(self) -> None:
        """Continue from `totals`."""
        totals, device = self.totals, self._world.device
        rank_0 = 1.0 if self._world.is_main else 0.0  # the totals count once
        self._sums = {
            name: torch.tensor(total * rank_0, dtype=torch.float64, device=device)
            for name, total in totals.items()
            if name.startswith("sum.")
        }
        self._rows, self._tokens = (totals.get(name, 0.0) * rank_0 for name in ("rows", "tokens"))
        self._norm = torch.tensor(totals.get("grad_norm", 0.0), device=device)
        self._norm_sum = torch.zeros_like(self._norm)  # not finite, once any norm was not
        self._started = time.monotonic() - totals.get("seconds", 0.0)

    def add(self, sums: dict[str, torch.Tensor], norm: torch.Tensor, batches: list[Batch]) -> None:
        """Add an optimizer step.

        Args:
            sums: of training metrics over this rank's rows, the same names on every rank; float64, no dimensions.
            norm: fp32, no dimensions; the gradient's.
            batches: this rank's micro-batches.
        """
        for name, value in sums.items():
            key = f"sum.{name}"
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._norm = norm
        self._norm_sum += norm
        self._rows += sum(len(batch.lengths) * batch.weight for batch in batches)
        self._tokens += sum(len(batch.ids) * batch.weight for batch in batches)

    def reduce(self, step: int) -> None:
        """Sum up over all ranks.

        Raises:
            NotFinite: on every rank, if a loss or a gradient's norm was not finite; `step` is the last one added.
        """
        seconds = time.monotonic() - self._started
        counts = torch.tensor([self._rows, self._tokens], dtype=torch.float64, device=self._world.device)
        packed = torch.cat([counts, *(value.view(1) for value in self._sums.values())])
        rows, tokens, *sums = sum_over_ranks(self._world, packed).tolist()
        if not abs(sum(sums) + float(self._norm_sum)) < float("inf"):
            raise NotFinite(f"loss or gradient is not finite at step {step} or shortly before")
        self.totals = dict(zip(self._sums, sums))
        self.totals.update(rows=rows, tokens=tokens, seconds=seconds, grad_norm=float(self._norm))

    def flush(self, state: TrainState, lr: float) -> dict[str, Any]:
        """Return a line of training metrics, means since the last line, and begin the next one; `lr` is the last."""
        totals, self.totals = self.totals, {"grad_norm": self.totals["grad_norm"]}
        means = {name[4:]: total / totals["rows"] for name, total in totals.items() if name.startswith("sum.")}
        return {
            "step": state.step,
            "epoch": round(state.epochs, 4),
            **means,
            "lr": lr,
            "grad_norm": totals["grad_norm"],
            "samples_per_s": round(totals["rows"] / totals["seconds"], 2),
            "tokens_per_s": round(totals["tokens"] / totals["seconds"], 1),
        }
