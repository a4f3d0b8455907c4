"""What a run says of itself at its start."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import listed
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.distributed import World
from sst2_xlmr.model.encoders import Encoder
from sst2_xlmr.training.optimizer import AdamW


@dataclass(frozen=True)
class Header:
    """A run, as its first lines describe it.

    Attributes:
        caches: the rows of all files, by split.
        table_rows: rows of the embedding table.
        has_new_head: whether the head is untrained, not the encoder's own.
        total_steps: optimizer steps from the run's beginning to its end.
        is_compiled: whether more than matrix products is compiled.
    """

    config: Config
    encoder: Encoder
    optimizer: AdamW
    caches: dict[str, TokenCache]
    world: World
    table_rows: int
    has_new_head: bool
    total_steps: int
    is_compiled: bool

    def lines(self) -> list[str]:
        """Return the lines to print."""
        head = f"{'new' if self.has_new_head else 'its own'} head for {listed(self.config.classes)}"
        return [
            f"encoder    {self.config.encoder}: {self._model()}; {head}",
            f"rows       {self._rows()}",
            f"batches    {self._batches()}",
            f"device     {self._device()}",
            f"run        {self.config.output_dir}",
        ]

    def _model(self) -> str:
        """Describe the model's size, and how much of it is trained."""
        shape, optimizer = self.encoder.shape, self.optimizer
        missing = (shape.vocab_size - self.table_rows) * shape.hidden
        parameters = sum(slot.working.numel() for slot in optimizer.slots) + missing
        trained = sum(slot.working.numel() for slot, _, _ in optimizer.trained())
        size = f"{shape.layers} layers, {shape.hidden} wide, {parameters / 1e6:,.1f} M parameters"
        table = f" ({self.table_rows:,} of {shape.vocab_size:,} embedding rows occur)" if missing else ""
        return f"{size}, {trained / 1e6:,.1f} M trained{table}"

    def _rows(self) -> str:
        """Give the rows of every file, and how many are cut."""
        rows = ", ".join(f"{split} {len(cache):,}" for split, cache in self.caches.items())
        truncated = sum(cache.truncated for cache in self.caches.values())
        return rows + (f"; {truncated:,} cut to {self.config.max_length} tokens" if truncated else "")

    def _batches(self) -> str:
        """Give the batches of an epoch, and the steps of the run."""
        config = self.config
        batches = -(-len(self.caches["train"]) // config.batch_size)
        cut = f" (at most {config.micro_batch_size} a pass)" if config.micro_batch_size else ""
        epochs = "" if config.max_steps else f"{config.epochs} epoch{'s' * (config.epochs > 1)}, "
        return f"{batches:,} an epoch, of {config.batch_size} rows{cut}; {epochs}{self.total_steps:,} steps"

    def _device(self) -> str:
        """Say what computes, in how many processes, and with which numbers."""
        world, threads = self.world, torch.get_num_threads()
        if world.device.type == "cuda":
            device = torch.cuda.get_device_name(world.device)
        else:
            device = f"CPU with {threads} thread{'s' * (threads > 1)}"
        processes = f"{world.world_size} process{'es' * (world.world_size > 1)}"
        sharing = " that share memory" if self.optimizer.shares_memory else ""
        numbers = "bf16 with fp32 master weights" if self.config.precision == "bf16" else "fp32"
        return (
            f"{device}, {processes}{sharing}; {numbers}; {'compiled' if self.is_compiled else 'not compiled: slower'}"
        )
