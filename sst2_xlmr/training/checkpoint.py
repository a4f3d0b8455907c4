"""Checkpoints: atomic, verified, complete; everything needed to go on bit for bit.

A checkpoint is a folder `step-00001234/` whose `manifest.json` has the size and SHA-256 of every other file. It is
written under another name, synced to the disk and renamed; without a valid manifest it does not exist. Training waits
until the tensors are written; digests, syncing and renaming are finished on a thread meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sst2_xlmr.config import Config
from sst2_xlmr.distributed import World, gather_objects, on_main
from sst2_xlmr.errors import UserError
from sst2_xlmr.files import Deferred, Finisher, digest_of, disk_errors, sync_files, sync_folder, write_tensors
from sst2_xlmr.model.compact_vocab import TABLE_NAME
from sst2_xlmr.training.optimizer import AdamW, Slot, join_master

_TENSOR_FILES = tuple(f"{name}.safetensors" for name in ("model", "optimizer", "vocabulary", "random"))
_FILES = (*_TENSOR_FILES, "progress.json", "config.json")


@dataclass
class Progress:
    """How far a run is; all that is saved besides tensors.

    Attributes:
        step: optimizer steps made.
        epoch, batch: position of the next global batch.
        best_accuracy, best_step: of the best evaluation on dev so far.
        stale_evaluations: evaluations since then.
        evaluation_due: whether the run was stopped before this step's evaluation was done.
        skipped, skipped_in_row: batches passed over because their gradient was not finite; the last ones without pause.
        window: over the steps since the last line of metrics and all ranks: sum of losses, rows, tokens, seconds.
        train_digest, encoder_digest: SHA-256 of the training file and of the encoder's weights.
        table_decay: what weight decay has left of embedding rows without gradient (see compact_vocab).
        world_size: how many processes wrote it.
    """

    train_digest: str
    encoder_digest: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    stale_evaluations: int = 0
    evaluation_due: bool = False
    skipped: int = 0
    skipped_in_row: int = 0
    window: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    world_size: int = 1
    table_decay: float = 1.0


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def masters_of(optimizer: AdamW) -> dict[str, Deferred]:
    """Return the fp32 weights by the parameters' names, to be written; in bf16 they are joined as they are written."""

    def deferred(slot: Slot) -> Deferred:
        weights, low = slot.working.data, slot.low

        def rows(start: int, stop: int) -> torch.Tensor:
            return weights[start:stop] if low is None else join_master(weights[start:stop], low[start:stop])

        return Deferred(tuple(weights.shape), torch.float32, rows)

    return {slot.name: deferred(slot) for slot in optimizer.slots}


def save_checkpoint(
    folder: Path,
    progress: Progress,
    optimizer: AdamW,
    kept_ids: torch.Tensor,
    config: Config,
    world: World,
    finisher: Finisher,
) -> tuple[int, float] | None:
    """Write `folder/step-NNNNNNNN` from rank 0, with every rank's random state, and remove the oldest ones.

    Args:
        kept_ids: int64 [rows], the ids of the embedding table's rows.
        finisher: finishes it; once that has, and only then, the checkpoint is there.

    Returns:
        On rank 0 how many bytes were written, and the seconds that training waited for it.

    Raises:
        UserError: if it, or the one before, cannot be written (a full disk, say); former checkpoints are untouched.
    """
    started = time.monotonic()
    states = gather_objects(world, _random_states(world.device))
    target = folder / f"step-{progress.step:08d}"
    beside = target.with_name(target.name + ".tmp")

    def finish() -> None:
        with disk_errors(f"the checkpoint {target}", beside):
            _finish(beside, target)
            _remove_old(folder, config.keep_checkpoints)

    def write() -> tuple[int, float]:
        finisher.wait()
        with disk_errors(f"the checkpoint {target}", beside):
            _write(beside, progress, optimizer, kept_ids, config, states)
            size = sum(file.stat().st_size for file in beside.iterdir())
        finisher.submit(finish)
        return size, time.monotonic() - started

    return on_main(world, write)


def _write(
    beside: Path,
    progress: Progress,
    optimizer: AdamW,
    kept_ids: torch.Tensor,
    config: Config,
    states: list[dict[str, torch.Tensor]],
) -> None:
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    random = {f"{kind}.{rank}": state for rank, kinds in enumerate(states) for kind, state in kinds.items()}
    for name, tensors in (
        ("model", masters_of(optimizer)),
        ("optimizer", optimizer.state_tensors()),
        ("vocabulary", {"kept_ids": kept_ids}),
        ("random", random),
    ):
        write_tensors(tensors, beside / f"{name}.safetensors")
    for name, content in (("progress", progress), ("config", config)):
        text = json.dumps(dataclasses.asdict(content), indent=2, ensure_ascii=False)
        (beside / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _manifest(files: Any) -> str:
    """Return the one text that says so: a manifest with any other byte is damaged."""
    return json.dumps(files, indent=2) + "\n"


def _finish(beside: Path, target: Path) -> None:
    files = {f.name: {"bytes": f.stat().st_size, "sha256": digest_of(f)} for f in sorted(beside.iterdir())}
    (beside / "manifest.json").write_text(_manifest(files), encoding="utf-8")
    sync_files(beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    sync_folder(target.parent)


def _remove_old(folder: Path, keep: int) -> None:
    whole = [found for found in sorted(folder.glob("step-????????")) if not what_is_damaged(found, sizes_only=True)]
    for old in whole[:-keep]:
        (old / "manifest.json").unlink(missing_ok=True)  # first, so that what remains of it does not exist
        shutil.rmtree(old, ignore_errors=True)


def what_is_damaged(checkpoint: Path, sizes_only: bool = False) -> str:
    """Compare a checkpoint with its manifest; returns an empty string, or what is wrong."""
    if checkpoint.is_symlink():
        return "it is a symbolic link"
    try:
        text = (checkpoint / "manifest.json").read_text(encoding="utf-8")
        files = json.loads(text)
        if text != _manifest(files):
            return "manifest.json is damaged"
        if missing := [name for name in _FILES if name not in files]:
            return f"manifest.json does not name {missing[0]}"
        for name, facts in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
            if not sizes_only and digest_of(file) != facts["sha256"]:
                return f"{name} has another SHA-256 than the manifest says"
    except OSError:
        return "manifest.json cannot be read"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "manifest.json is damaged"
    return ""


def find_checkpoint(folder: Path, warn: Callable[[str], Any]) -> Path | None:
    """Return the newest valid checkpoint, or None; damaged newer ones are named through `warn`."""
    for checkpoint in sorted(folder.glob("step-????????"), reverse=True):
        problem = what_is_damaged(checkpoint)
        if not problem:
            return checkpoint
        warn(f"warning: {checkpoint} is damaged ({problem}) and is not used")
    return None


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """A checkpoint with a valid manifest that cannot be read was not written by this project, or was made to harm."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Not shared: it may be one node that cannot read it, and must say so itself.
        raise UserError(f"cannot read the checkpoint {checkpoint}: {reason}; remove it to use the one before") from None


def load_progress(checkpoint: Path) -> Progress:
    """Read how far the run was.

    Raises:
        UserError: if its content makes no sense, though its manifest is valid.
    """
    with _reading(checkpoint):
        return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def load_checkpoint(
    checkpoint: Path, progress: Progress, optimizer: AdamW, kept_ids: torch.Tensor, seed: int, world: World
) -> None:
    """Restore weights, moments and random states into `optimizer` and torch.

    With another number of processes than wrote it, every rank starts a random stream of its own, drawn from the seed
    and the step; what does not depend on dropout goes on exactly.

    Args:
        kept_ids: int64 [rows], the ids of the embedding rows now; other test files may have brought new ones.

    Raises:
        UserError: if its content makes no sense, though its manifest is valid.
    """
    with _reading(checkpoint):
        masters, moments, vocabulary, random = (load_file(checkpoint / name) for name in _TENSOR_FILES)
        saved_ids = vocabulary["kept_ids"]
        if not torch.equal(saved_ids, kept_ids):
            untrained = optimizer.master_tensors()[TABLE_NAME].cpu() * progress.table_decay
            masters[TABLE_NAME] = _moved_rows(masters[TABLE_NAME], saved_ids, kept_ids, untrained)
            for name in (f"exp_avg.{TABLE_NAME}", f"exp_avg_sq.{TABLE_NAME}"):
                if name in moments:
                    moments[name] = _moved_rows(moments[name], saved_ids, kept_ids, torch.zeros_like(untrained))
        optimizer.load(masters, moments, progress.step - progress.skipped, progress.table_decay)
        seed_rank(seed + progress.step, world.rank)
        if progress.world_size == world.world_size:
            torch.set_rng_state(random[f"cpu.{world.rank}"])
            if world.device.type == "cuda" and f"cuda.{world.rank}" in random:
                torch.cuda.set_rng_state(random[f"cuda.{world.rank}"], world.device)


def _moved_rows(rows: torch.Tensor, old_ids: torch.Tensor, new_ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return `start` ([new rows, hidden]) with the rows of ids that both have taken from `rows`."""
    is_common = torch.isin(new_ids, old_ids)
    start[is_common] = rows[torch.isin(old_ids, new_ids)]
    return start


def seed_rank(seed: int, rank: int) -> None:
    """Seed torch on all devices, differently on every rank, so that ranks drop different units."""
    torch.manual_seed(seed * 100_003 + rank)
