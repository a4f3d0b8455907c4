"""The lines that describe a run at its start."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from sst2_xlmr.config import Config
from sst2_xlmr.data.prepare import Prepared
from sst2_xlmr.data.rows import listed
from sst2_xlmr.model.encoders import Encoder
from sst2_xlmr.report.findings import findings
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.util import versions
from sst2_xlmr.util.distributed import World


@dataclass(frozen=True)
class HeaderFigures:
    """What `header_lines` cannot derive from options and files.

    Attributes:
        table_rows: of the embedding table.
        head_is_new: whether the classification head starts untrained.
        total_steps: of the run.
        why_not_compiled: see `Computation`.
    """

    table_rows: int
    head_is_new: bool
    total_steps: int
    why_not_compiled: str


def header_lines(inputs: Prepared, optimizer: AdamW, world: World, figures: HeaderFigures) -> list[str]:
    """Return the header's lines."""
    config = inputs.config
    head = f"{'new' if figures.head_is_new else 'its own'} head for {listed(config.classes)}"
    masters = {"bf16": "bf16 with fp32 master weights", "tf32": "fp32 with tf32 products"}.get(config.precision, "fp32")
    reason = figures.why_not_compiled
    compiled = f"not compiled: slower ({reason})" if reason else "compiled"
    return [
        f"stack      {versions.description()}, Python {platform.python_version()}",
        f"encoder    {config.encoder}: {_describe_model(inputs.encoder, optimizer, figures.table_rows)}; {head}",
        f"rows       {_describe_rows(inputs)}",
        *findings(inputs),
        f"batches    {_describe_batches(config, len(inputs.train_labels), figures.total_steps)}",
        f"device     {_describe_device(world, optimizer)}; {masters}; {compiled}",
        f"run        {config.output_dir}",
    ]


def _describe_model(encoder: Encoder, optimizer: AdamW, table_rows: int) -> str:
    """Return the model's size, and how much of it is trained."""
    shape = encoder.shape
    whole = sum(slot.working.numel() for slot in optimizer.slots) + (shape.vocab_size - table_rows) * shape.hidden
    trained = sum(slot.working.numel() for slot in optimizer.trained)
    rows = f" ({table_rows:,} of {shape.vocab_size:,} embedding rows occur)" if table_rows < shape.vocab_size else ""
    of_all = f" of {encoder.cut_from}" if encoder.cut_from else ""
    size = f"{shape.layers}{of_all} layers, {shape.hidden} wide, {whole / 1e6:,.1f} M parameters"
    return f"{size}, {trained / 1e6:,.1f} M trained{rows}"


def _describe_rows(inputs: Prepared) -> str:
    """Return how many rows every file has, how many are trained on, and how many are cut."""
    counts = {split: f"{len(cache):,}" for split, cache in inputs.caches.items()}
    if inputs.train_rows is not None:
        counts["train"] = f"{len(inputs.train_rows):,} of {counts['train']}"
    rows = ", ".join(f"{split} {count}" for split, count in counts.items())
    truncated = sum(cache.truncated for cache in inputs.caches.values())
    return rows + (f"; {truncated:,} cut to {inputs.config.max_length} tokens" if truncated else "")


def _describe_batches(config: Config, rows: int, total_steps: int) -> str:
    """Return how the rows become steps."""
    cut = f" (at most {config.micro_batch_size} a pass)" if config.micro_batch_size else ""
    epochs = "" if config.max_steps else f"{config.epochs:g} epoch{'s' * (config.epochs != 1)}, "
    batches = -(-rows // config.batch_size)
    return f"{batches:,} an epoch, of {config.batch_size} rows{cut}; {epochs}{total_steps:,} steps"


def _describe_device(world: World, optimizer: AdamW) -> str:
    """Return the device and the number of processes."""
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    else:
        device = f"CPU with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    how = " that share memory" if optimizer.engine.averages else ""
    return f"{device}, {world.world_size} process{'es' * (world.world_size > 1)}{how}"
