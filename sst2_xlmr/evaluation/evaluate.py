"""Run a model over rows, for metrics over all ranks or for predictions.

Every row counts once, and metrics are computed from all ranks' results (see task.py) in the file's order.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sst2_xlmr.data.batches import select_rows, split_windows
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.task import Task
from sst2_xlmr.util.distributed import World, gather_objects
from sst2_xlmr.util.errors import Interrupted


@dataclass(frozen=True)
class Evaluation:
    """A model's results on a file's rows, in the file's order, the same on every rank."""

    metrics: dict[str, Any]
    results: np.ndarray  # fp32 [rows, ...], see `SingleLabel.row_results`
    probabilities: np.ndarray  # fp32 [rows, outputs]

    def recomputed(self, temperature: float, task: Task, labels: np.ndarray) -> Evaluation:
        """Return the evaluation with the logits divided by a temperature, and the task's thresholds."""
        if temperature == 1:
            return Evaluation(task.metrics(self.results, labels), self.results, self.probabilities)
        results = task.results_of(self.probabilities, labels, temperature)
        logits = torch.from_numpy(task.logits_of(self.probabilities) / temperature)
        return Evaluation(task.metrics(results, labels), results, task.probabilities(logits).float().numpy())


def length_sorted_batches(lengths: np.ndarray, batch_tokens: int, world_size: int = 1) -> Iterator[np.ndarray]:
    """Yield batches of row numbers, shortest rows first; in each, the ranks take rows in turn.

    Lengths are int [rows], in tokens. A rank gets at most `batch_tokens`, including padding, or one longer row.
    """
    order = np.argsort(lengths, kind="stable")
    while len(order):
        lengths_here = lengths[order[: batch_tokens * world_size]]
        # Rank 0's rows and padded tokens (it has the most), if the batch ended at row i.
        rank_rows = -(-np.arange(1, len(lengths_here) + 1) // world_size)
        rows = max(1, int(np.searchsorted(lengths_here * rank_rows, batch_tokens, side="right")))
        yield order[:rows]
        order = order[rows:]


@torch.no_grad()
def model_logits(
    model: nn.Module, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Return the rows' logits, fp32 [rows, outputs]; for the arrays see `select_rows`."""
    selected, of_rows = select_rows(ids, starts, lengths, rows)
    of_windows, windows = split_windows(selected, of_rows)
    return model(selected.to(device), of_windows, None, windows).float()


@functools.lru_cache(maxsize=1)
def _workers(threads: int) -> futures.ThreadPoolExecutor:
    """Return a pool of this many threads, on each of which torch itself uses one thread."""
    pool, all_started = futures.ThreadPoolExecutor(threads, "batch"), threading.Barrier(threads)

    def start() -> None:
        # torch gives a new thread the process's thread count at its first call; make that call before setting 1.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    futures.wait([pool.submit(start) for _ in range(threads)])
    torch.set_num_threads(threads)  # for this thread, and those started from now on
    return pool


os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has no threads


def on_all_cores(
    work: Callable[[np.ndarray], Any], batches: list[np.ndarray], device: torch.device
) -> Generator[Any, None, None]:
    """Yield `work(batch)` for every batch, in order.

    On a CPU, each core computes whole batches: threads that share a batch wait for one another, which is slow when
    other programs are running. If there are fewer batches than cores, all cores share each batch.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(batches) < threads:
        yield from map(work, batches)
        return
    pending = [_workers(threads).submit(work, batch) for batch in batches]
    try:
        for future in pending:
            yield future.result()
    finally:  # afterwards, no thread uses the model
        for future in pending:
            future.cancel()
        futures.wait(pending)


def predict(
    model: nn.Module, task: Task, ids: np.ndarray, lengths: np.ndarray, batch_tokens: int, device: torch.device
) -> np.ndarray:
    """Return the texts' probabilities, fp32 [texts, outputs]; for `ids` and `lengths` see `Tokenizer.flat_ids`.

    The model is a classifier or an engine's version of one, in evaluation mode, with the whole vocabulary.
    """
    starts = np.cumsum(lengths) - lengths
    probabilities = np.empty((len(lengths), task.outputs), np.float32)
    batches = list(length_sorted_batches(lengths, batch_tokens))[::-1]  # the longest first, so that all end together

    def compute(rows: np.ndarray) -> torch.Tensor:
        return task.probabilities(model_logits(model, ids, starts, lengths, rows, device))

    for rows, values in zip(batches, on_all_cores(compute, batches, device)):
        probabilities[rows] = values.cpu().numpy()
    return probabilities


def evaluate(
    model: nn.Module,
    task: Task,
    cache: TokenCache,
    batch_tokens: int,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate on all rows of a file, split over the ranks; for `batch_tokens` see `length_sorted_batches`.

    The model is a classifier or an engine's version of one, not under DDP; its mode is restored. `should_stop` is
    called after every batch, with the same result on all ranks; if it is true, Interrupted is raised.
    """
    # Each rank takes a part of every batch, perhaps none, so that all have the same number of batches.
    batches = list(length_sorted_batches(cache.lengths, batch_tokens, world.world_size))

    def compute(batch: np.ndarray) -> tuple[torch.Tensor, ...]:
        rows = batch[world.rank :: world.world_size]
        if not len(rows):
            return ()
        logits = model_logits(model, cache.ids, cache.starts, cache.lengths, rows, world.device)
        labels = torch.from_numpy(cache.labels[rows]).to(world.device)
        return task.row_results(logits, labels), task.probabilities(logits)

    outputs: list[tuple[torch.Tensor, ...]] = []  # they stay on the device, so that no batch waits for a GPU
    was_training = model.training
    model.eval()
    try:
        with contextlib.closing(on_all_cores(compute, batches, world.device)) as computed:
            for output in computed:
                outputs.append(output)
                if should_stop():
                    raise Interrupted
    finally:
        model.train(was_training)
    columns = list(zip(*filter(None, outputs))) or [(), ()]
    own_part = [torch.cat(column).cpu().numpy() if column else np.empty((0, 0), np.float32) for column in columns]
    parts = gather_objects(world, own_part)  # rank 0 has rows of every batch
    results, probabilities = (np.empty((len(cache), array.shape[1]), np.float32) for array in parts[0])
    for rank, part in enumerate(parts):
        if len(part[0]):
            order = np.concatenate([batch[rank :: world.world_size] for batch in batches])
            results[order], probabilities[order] = part
    return Evaluation(task.metrics(results, cache.labels), results, probabilities)
