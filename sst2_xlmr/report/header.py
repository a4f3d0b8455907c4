"""The lines that describe a run when it starts."""

from __future__ import annotations

import math
import platform

import numpy as np
import torch

from sst2_xlmr.data.prepare import Prepared
from sst2_xlmr.data.report import lines_of
from sst2_xlmr.labels import listed
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.training.schedule import Schedule
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import versions
from sst2_xlmr.util.distributed import World


def header_lines(
    inputs: Prepared, state: TrainState, optimizer: AdamW, fallback_reason: str, world: World, head_is_new: bool
) -> list[str]:
    """Return the lines on inputs, model, schedule and hardware; `fallback_reason` is `training_backend`'s."""
    config, rows, processes = inputs.config, len(inputs.train_labels), world.world_size
    total_steps = Schedule(config, state.batches_per_epoch, state.eval_every).total_steps
    head = f"{'new' if head_is_new else 'its own'} head for {listed(inputs.task.label_names)}"
    at_most = f" (at most {config.micro_batch_size} a pass)" if config.micro_batch_size else ""
    epochs = "" if config.max_steps else f"{config.epochs:g} epoch{'s' * (config.epochs != 1)}, "
    batches = f"{-(-rows // config.batch_size):,} an epoch, of {config.batch_size} rows{at_most}"
    evaluation = f"every {state.eval_every:,}" if state.eval_every else "after each epoch"
    backend = f"plain PyTorch: slower ({fallback_reason})" if fallback_reason else "engine"
    device = f"CPU with {(threads := torch.get_num_threads())} thread{'s' * (threads > 1)}"
    if world.device.type == "cuda":
        device, backend = torch.cuda.get_device_name(world.device), "plain PyTorch"  # engines are for the CPU
    device += f", {processes} process{'es' * (processes > 1)}{' that share memory' * optimizer.shares_memory}"
    names = {"bf16": "bf16 autocast" if fallback_reason else "bf16 with fp32 master weights"}
    names["tf32"] = "fp32 with tf32 products"
    option = "" if config.precision == state.precision else f"precision {config.precision} -> "
    shape, sizes = inputs.encoder.shape, {name: weight.shape for name, weight in optimizer.weights().items()}
    kept_rows = sizes[EMBEDDING][0]
    whole = sum(map(math.prod, sizes.values())) + (shape.vocab_size - kept_rows) * shape.hidden
    trained = sum(moment.numel() for moment in optimizer.moments().values()) / 2
    of_all = f" of {inputs.encoder.cut_from}" if inputs.encoder.cut_from else ""
    few = f" ({kept_rows:,} of {shape.vocab_size:,} embedding rows occur)" if kept_rows < shape.vocab_size else ""
    size = f"{shape.layers}{of_all} layers, {shape.hidden} wide, {whole / 1e6:,.1f} M parameters"
    return [
        f"stack      {versions.description()}, Python {platform.python_version()}",
        f"encoder    {config.encoder}: {size}, {trained / 1e6:,.1f} M trained{few}; {head}",
        f"rows       {describe_rows(inputs)}",
        *lines_of(inputs),
        *data_report(inputs),
        f"batches    {batches}; {epochs}{total_steps:,} steps, evaluation {evaluation}",
        f"device     {device}; {option}{names.get(state.precision, state.precision)}; {backend}",
    ]


def data_report(inputs: Prepared) -> list[str]:
    """Return a line each for duplicates, conflicting labels and leaks, if the training rows have any."""
    config, train = inputs.config, inputs.caches["train"]
    duplicates = "dropped" if config.drop_duplicates else "--drop-duplicates drops them"
    leaks = "dropped" if config.drop_leaks else "--drop-leaks drops them"
    lines = []

    def add(kind: str, count: int, has: str, cure: str, *examples: tuple[str, int]) -> None:
        rows = f"{count:,} training rows have" if count > 1 else "1 training row has"
        places = " and ".join(inputs.place_of(*example) for example in examples)
        lines.append(f"{kind:<10} {rows} {has}, e.g. {places}; {cure}")

    if count := len(train.repeats):
        add("duplicates", count, "the text and label of an earlier one", duplicates, ("train", train.repeats[0]))
    if count := len(train.contradictions):
        first = train.contradictions[0]
        same = np.flatnonzero(train.text_digests == train.text_digests[first])
        keys = inputs.task.label_keys(train.labels[same])
        other = same[keys != keys[same == first]][0]
        add("conflicts", count, "a text with conflicting labels", duplicates, ("train", first), ("train", other))
    for split, rows in inputs.leaks.items():
        leaked = np.flatnonzero(inputs.caches[split].text_digests == train.text_digests[rows[0]])[0]
        add("leaks", len(rows), f"a text of {split}", leaks, ("train", rows[0]), (split, leaked))
    return lines


def describe_rows(inputs: Prepared) -> str:
    """Return the rows of every file, and how many of them are trained on or truncated."""
    counts = {split: f"{len(cache):,}" for split, cache in inputs.caches.items()}
    if inputs.train_rows is not None:
        counts["train"] = f"{len(inputs.train_rows):,} of {counts['train']}"
    rows = ", ".join(f"{split} {count}" for split, count in counts.items())
    length, kind = inputs.config.max_length, inputs.config.long_texts
    if kind == "windows":
        windowed = sum(int((cache.lengths() > length).sum()) for cache in inputs.caches.values())
        return f"{rows}; {windowed:,} in windows of {length} tokens"
    truncated = sum(len(cache.cut_rows) for cache in inputs.caches.values())
    kept = " (their beginning and end)" if kind == "head-tail" else ""
    return rows + (f"; {truncated:,} cut to {length} tokens{kept}" if truncated else "")
