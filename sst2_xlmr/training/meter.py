"""Training metrics, averaged since the last logged line."""

import time
from typing import Any

import torch

from sst2_xlmr.data.batches import MicroBatch
from sst2_xlmr.training.guard import NOT_FINITE_FIX
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.distributed import World, sum_over_ranks
from sst2_xlmr.util.errors import raise_on_all


class TrainMeter:
    """Sums over the steps since the last logged line.

    Each rank adds up its own rows, without waiting for a GPU. `reduce` sums over ranks and stops the clock, so that
    evaluating and saving do not count as training; `start` restarts it.
    """

    def __init__(self, world: World) -> None:
        # As of the last `reduce`, and saved in checkpoints: "seconds" of training, the last "grad_norm", and, summed
        # over all ranks, "rows", "tokens" and each training metric.
        self.totals: dict[str, float] = {}
        self._world = world
        self.start()

    def start(self) -> None:
        """Restart the clock, and continue the sums from `totals`."""
        totals, device = {"rows": 0.0, "tokens": 0.0, **self.totals}, self._world.device
        self._started = time.monotonic() - totals.pop("seconds", 0.0)
        self._norm = torch.tensor(totals.pop("grad_norm", 0.0), device=device)
        self._norm_sum = torch.zeros_like(self._norm)  # stays non-finite after any non-finite norm
        rank_0 = float(self._world.rank == 0)  # the totals count once
        self._sums = {name: torch.tensor(totals[name] * rank_0, dtype=torch.float64, device=device) for name in totals}

    def add(self, sums: dict[str, torch.Tensor], norm: torch.Tensor, batches: list[MicroBatch]) -> None:
        """Add a step: sums of metrics over this rank's rows, float64 [], and the gradient's norm, fp32 []."""
        self._norm = norm
        self._norm_sum += norm
        self._sums["rows"] += sum(len(batch.labels) * batch.factor for batch in batches)
        self._sums["tokens"] += sum(len(batch.ids) * batch.factor for batch in batches)
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduce(self, step: int) -> None:
        """Sum over all ranks; UserError on every rank if a loss or gradient norm up to this step is not finite."""
        seconds = time.monotonic() - self._started
        sums = sum_over_ranks(self._world, torch.stack(list(self._sums.values()))).tolist()
        if not abs(sum(sums) + float(self._norm_sum)) < float("inf"):
            raise_on_all(f"loss or gradient is not finite at step {step} or shortly before: {NOT_FINITE_FIX}")
        self.totals = {**dict(zip(self._sums, sums)), "seconds": seconds, "grad_norm": float(self._norm)}

    def flush(self, state: TrainState, lr: float) -> dict[str, Any]:
        """Return a line of metrics: means since the last line, but the last step's lr and gradient norm; then reset."""
        totals, self.totals = self.totals, {"grad_norm": self.totals["grad_norm"]}
        rows, tokens, seconds, norm = (totals.pop(name) for name in ("rows", "tokens", "seconds", "grad_norm"))
        return {
            "step": state.step,
            "epoch": round(state.epoch + state.batch / state.batches_per_epoch, 4),
            **{name: total / rows for name, total in totals.items()},
            "lr": lr,
            "grad_norm": norm,
            "samples_per_s": round(rows / seconds, 2),
            "tokens_per_s": round(tokens / seconds, 1),
        }
