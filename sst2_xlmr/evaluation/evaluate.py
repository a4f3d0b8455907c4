"""Run a model over rows, for metrics over all ranks or for predictions.

Every row counts once, and metrics are computed from all ranks' results (see task.py) in the file's order.
"""

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
    """A model's logits for a file's rows, in the file's order, the same on every rank, and what follows from them."""

    logits: torch.Tensor  # fp32 [rows, outputs], on the CPU
    probabilities: np.ndarray  # fp32 [rows, outputs]
    results: np.ndarray  # fp32 [rows, ...], see `SingleLabel.row_results`
    metrics: dict[str, Any]


def evaluation_of(task: Task, logits: torch.Tensor, labels: np.ndarray) -> Evaluation:
    results = task.row_results(logits, torch.tensor(labels)).numpy()
    return Evaluation(logits, task.probabilities(logits).numpy(), results, task.metrics(results, labels))


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


def on_all_cores(work: Callable[..., Any], batches: list[np.ndarray], device: torch.device) -> Generator[Any]:
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
    if not len(lengths):
        return np.empty((0, task.outputs), np.float32)
    logits = outputs_of(model, ids, np.cumsum(lengths) - lengths, lengths, batch_tokens, device)
    return task.probabilities(logits).numpy()


def outputs_of(
    model: nn.Module, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, batch_tokens: int, device: torch.device
) -> torch.Tensor:
    """Return the model's outputs for all rows, in their order, fp32 [rows, n]; for the arrays see `select_rows`."""
    batches = list(length_sorted_batches(lengths, batch_tokens))[::-1]  # the longest first, so that all end together
    compute = functools.partial(model_logits, model, ids, starts, lengths, device=device)
    outputs = torch.cat([part.cpu() for part in on_all_cores(compute, batches, device)])
    return outputs[torch.from_numpy(np.argsort(np.concatenate(batches)))]


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
    own = [batch[world.rank :: world.world_size] for batch in batches]

    def compute(rows: np.ndarray) -> torch.Tensor:
        if not len(rows):
            return torch.empty(0, task.outputs, device=world.device)
        return model_logits(model, cache.ids, cache.starts, cache.lengths, rows, world.device)

    outputs: list[torch.Tensor] = []  # they stay on the device, so that no batch waits for a GPU
    was_training = model.training
    model.eval()
    try:
        with contextlib.closing(on_all_cores(compute, own, world.device)) as computed:
            for output in computed:
                outputs.append(output)
                if should_stop():
                    raise Interrupted
    finally:
        model.train(was_training)
    logits = torch.empty(len(cache), task.outputs)
    for rows, values in gather_objects(world, (np.concatenate(own), torch.cat(outputs).cpu())):
        logits[torch.from_numpy(rows)] = values
    return evaluation_of(task, logits, cache.labels)
