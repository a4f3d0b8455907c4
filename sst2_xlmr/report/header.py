"""What a run says of itself at its start."""

from __future__ import annotations

import torch

from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import listed
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.distributed import World
from sst2_xlmr.model.encoders import Encoder
from sst2_xlmr.training.optimizer import AdamW


def header_lines(
    config: Config,
    encoder: Encoder,
    optimizer: AdamW,
    table_rows: int,
    head_is_new: bool,
    caches: dict[str, TokenCache],
    total_steps: int,
    world: World,
    is_compiled: bool,
) -> list[str]:
    """Return the lines that say what will run.

    Args:
        table_rows: how many rows the embedding table has.
        caches: the rows of all files, by split.
        is_compiled: whether more than matrix products is compiled.
    """
    head = f"{'new' if head_is_new else 'its own'} head for {listed(config.classes)}"
    masters = "bf16 with fp32 master weights" if config.precision == "bf16" else "fp32"
    compiled = "compiled" if is_compiled else "not compiled: slower"
    return [
        f"encoder    {config.encoder}: {_describe_model(encoder, optimizer, table_rows)}; {head}",
        f"rows       {_describe_rows(caches, config.max_length)}",
        f"batches    {_describe_batches(config, len(caches['train']), total_steps)}",
        f"device     {_describe_device(world, optimizer)}; {masters}; {compiled}",
        f"run        {config.output_dir}",
    ]


def _describe_model(encoder: Encoder, optimizer: AdamW, table_rows: int) -> str:
    """Say the model's size, and how much of it is trained."""
    shape = encoder.shape
    whole = sum(slot.working.numel() for slot in optimizer.slots) + (shape.vocab_size - table_rows) * shape.hidden
    trained = sum(slot.working.numel() for slot, _, _ in optimizer.trained())
    rows = f" ({table_rows:,} of {shape.vocab_size:,} embedding rows occur)" if table_rows < shape.vocab_size else ""
    size = f"{shape.layers} layers, {shape.hidden} wide, {whole / 1e6:,.1f} M parameters"
    return f"{size}, {trained / 1e6:,.1f} M trained{rows}"


def _describe_rows(caches: dict[str, TokenCache], max_length: int) -> str:
    """Say how many rows every file has, and how many are cut."""
    rows = ", ".join(f"{split} {len(cache):,}" for split, cache in caches.items())
    truncated = sum(cache.truncated for cache in caches.values())
    return rows + (f"; {truncated:,} cut to {max_length} tokens" if truncated else "")


def _describe_batches(config: Config, rows: int, total_steps: int) -> str:
    """Say how the rows become steps."""
    cut = f" (at most {config.micro_batch_size} a pass)" if config.micro_batch_size else ""
    epochs = "" if config.max_steps else f"{config.epochs} epoch{'s' * (config.epochs > 1)}, "
    batches = -(-rows // config.batch_size)
    return f"{batches:,} an epoch, of {config.batch_size} rows{cut}; {epochs}{total_steps:,} steps"


def _describe_device(world: World, optimizer: AdamW) -> str:
    """Say what computes, and how many processes of it there are."""
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    else:
        device = f"CPU with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    how = " that share memory" if optimizer.shares_memory else ""
    return f"{device}, {world.world_size} process{'es' * (world.world_size > 1)}{how}"
