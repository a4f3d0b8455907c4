"""Checkpoints: atomic, verified, complete; everything needed to continue bit for bit.

A checkpoint is a folder `step-00001234/` whose `manifest.json` has the size and SHA-256 of every other file. It is
written under another name, synced to disk and renamed; without a valid manifest it does not count. Training waits until
the tensors are written; digests, syncing and renaming follow on a background thread.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sst2_xlmr.config import Config
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.training.meter import TrainMeter
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.distributed import World, gather_objects, on_rank0
from sst2_xlmr.util.files import BackgroundWriter, digest_of, put_in_place, read_errors, scratch_name, write_errors
from sst2_xlmr.util.tensors import TensorLike, write_tensors

_TENSOR_FILES = tuple(f"{name}.safetensors" for name in ("model", "optimizer", "vocabulary", "random"))
_FILES = (*_TENSOR_FILES, "state.json", "config.json")
# For a file that cannot be read although the manifest is valid: another program wrote it, or it is forged.
_FIX = "remove it to use the one before"
# What is saved, besides the random state of every rank.
CheckpointContents = tuple[TrainState, TrainMeter, AdamW, Vocabulary]


def save_checkpoint(
    folder: Path, contents: CheckpointContents, config: Config, world: World, background_writer: BackgroundWriter
) -> tuple[int, float] | None:
    """Write `folder/step-NNNNNNNN` on rank 0, with every rank's random state, and remove the oldest checkpoints.

    It exists once `background_writer` is done. Rank 0 returns the bytes written and the seconds that training waited.
    UserError if this checkpoint or the previous one cannot be written (e.g. the disk is full); older ones stay intact.
    """
    started, (state, meter, optimizer, vocabulary) = time.monotonic(), contents
    random = {f"cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        random[f"cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    tensors: dict[str, Mapping[str, TensorLike]] = {
        "model": optimizer.weights(),
        "optimizer": optimizer.moments(),
        "vocabulary": {"ids": vocabulary.ids},
        "random": {name: state for own in gather_objects(world, random) for name, state in own.items()},
    }
    values = {"state": vars(state), "meter": meter.totals, "world_size": world.world_size}
    values["vocabulary"] = {"decay": vocabulary.unused_rows_factor}
    target = folder / f"step-{state.step:08d}"
    unfinished = scratch_name(target)

    def finish() -> None:
        with write_errors(f"the checkpoint {target}", unfinished, is_resumable=True):
            files = {f.name: {"bytes": f.stat().st_size, "sha256": digest_of(f)} for f in sorted(unfinished.iterdir())}
            (unfinished / "manifest.json").write_text(_json(files), encoding="utf-8")
            put_in_place(unfinished, target)
            manifests = sorted(folder.glob("step-????????/manifest.json"))
            # Those of later steps are damaged, or the run would have resumed from them: they do not count.
            older = [file for file in manifests if file.parent < target and not file.parent.is_symlink()]
            for manifest in older[: 1 - config.keep_checkpoints]:
                manifest.unlink(missing_ok=True)  # first: half-removed, it must not count
                shutil.rmtree(manifest.parent, ignore_errors=True)

    def write() -> tuple[int, float]:
        background_writer.wait()
        with write_errors(f"the checkpoint {target}", unfinished, is_resumable=True):
            unfinished.mkdir(parents=True)
            for name in tensors:
                write_tensors(tensors[name], unfinished / f"{name}.safetensors")
            for name, content in (("state", values), ("config", vars(config))):
                (unfinished / f"{name}.json").write_text(_json(content), encoding="utf-8")
            size = sum(file.stat().st_size for file in unfinished.iterdir())
        background_writer.submit(finish)
        return size, time.monotonic() - started

    return on_rank0(world, write)


def _json(content: Any) -> str:
    """Return the text of a JSON file; a manifest that differs from it in any byte is damaged."""
    return json.dumps(content, indent=2) + "\n"


def find_damage(checkpoint: Path) -> str:
    """Return how a checkpoint differs from its manifest; an empty string if it does not."""
    if checkpoint.is_symlink():
        return "it is a symbolic link"
    try:
        text = (checkpoint / "manifest.json").read_text(encoding="utf-8")
        files = json.loads(text)
        if text != _json(files) or not files.keys() >= {*_FILES}:
            return "manifest.json is damaged"
        for name, entry in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if digest_of(file) != entry["sha256"]:
                return f"{name} has another SHA-256 than manifest.json says"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "manifest.json cannot be read"
    return ""


def find_checkpoint(folder: Path, warn: Callable[[str], Any]) -> Path | None:
    """Return the newest valid checkpoint, or None; `warn` takes a line about each damaged newer one."""
    for checkpoint in sorted(folder.glob("step-????????"), reverse=True):
        if not (problem := find_damage(checkpoint)):
            return checkpoint
        warn(f"warning: {checkpoint} is damaged ({problem}) and is not used")
    return None


def read_state(checkpoint: Path) -> TrainState:
    """Return the saved state; UserError if the checkpoint cannot be read."""
    with read_errors(f"the checkpoint {checkpoint}", _FIX):
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["state"])


def load_checkpoint(checkpoint: Path, contents: CheckpointContents, seed: int, world: World) -> None:
    """Restore meter, optimizer, vocabulary and torch's random state; `read_state` has already restored the state.

    The run's embedding rows may differ (see `Vocabulary.adapt_checkpoint`). If the number of processes has changed,
    every rank starts a new random stream; apart from dropout, training continues the same up to rounding.
    """
    state, meter, optimizer, vocabulary = contents
    with read_errors(f"the checkpoint {checkpoint}", _FIX):
        values = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        meter.totals = values["meter"]
        meter.start()
        vocabulary.unused_rows_factor = values["vocabulary"]["decay"]
        weights, moments, saved, random = (load_file(checkpoint / name) for name in _TENSOR_FILES)
        vocabulary.adapt_checkpoint(weights, moments, saved["ids"], optimizer.weights()[EMBEDDING][:])
        optimizer.load(weights, moments, state.step - state.skipped)
        seed_rank(seed + state.step, world.rank)
        if values["world_size"] == world.world_size:
            torch.set_rng_state(random[f"cpu.{world.rank}"])
            if world.device.type == "cuda" and f"cuda.{world.rank}" in random:
                torch.cuda.set_rng_state(random[f"cuda.{world.rank}"], world.device)


def seed_rank(seed: int, rank: int) -> None:
    """Seed torch on all devices; every rank gets its own dropout masks."""
    torch.manual_seed(seed * 100_003 + rank)
