"""Checkpoints: atomic, verified, complete; everything needed to continue bit for bit.

A checkpoint is a folder `step-00001234/` whose `manifest.json` has the size and SHA-256 of every other file. It is
written under another name, synced to disk and renamed; without a valid manifest it does not exist. Training waits
until the tensors are written; digests, syncing and renaming are finished on a thread meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sst2_xlmr.config import Config
from sst2_xlmr.model.vocabulary import TABLE_NAME
from sst2_xlmr.training.optimizer import AdamW
from sst2_xlmr.training.state import Progress, Totals, Window
from sst2_xlmr.util.distributed import World, gather_objects, on_main
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import Finisher, Storable, digest_of, disk_errors, put_in_place, scratch_name, write_tensors

_TENSOR_FILES = tuple(f"{name}.safetensors" for name in ("model", "optimizer", "vocabulary", "random"))
_FILES = (*_TENSOR_FILES, "progress.json", "config.json")


@dataclass
class RunState:
    """What a checkpoint holds of a run besides its options and random states. Each part is its own owner.

    Attributes:
        kept_ids: int64 [rows], the ids of the embedding table's rows (see compact_vocab).
    """

    progress: Progress
    window: Window
    optimizer: AdamW
    kept_ids: torch.Tensor


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_checkpoint(
    folder: Path, state: RunState, config: Config, world: World, finisher: Finisher
) -> tuple[int, float] | None:
    """Write `folder/step-NNNNNNNN` from rank 0, with every rank's random state, and remove the oldest ones.

    Args:
        finisher: finishes the checkpoint, which does not exist before that.

    Returns:
        On rank 0 how many bytes were written, and the seconds that training waited for it.

    Raises:
        UserError: if this checkpoint or the last one cannot be written (a full disk, say); older ones are untouched.
    """
    started = time.monotonic()
    random_states = gather_objects(world, _random_states(world.device))
    target = folder / f"step-{state.progress.step:08d}"
    unfinished = scratch_name(target)

    def finish() -> None:
        with disk_errors(f"the checkpoint {target}", unfinished):
            _finish(unfinished, target)
            _remove_old(folder, config.keep_checkpoints)

    def write() -> tuple[int, float]:
        finisher.wait()
        with disk_errors(f"the checkpoint {target}", unfinished):
            _write(unfinished, state, config, random_states)
            size = sum(file.stat().st_size for file in unfinished.iterdir())
        finisher.submit(finish)
        return size, time.monotonic() - started

    return on_main(world, write)


def _write(folder: Path, state: RunState, config: Config, random_states: list[dict[str, torch.Tensor]]) -> None:
    folder.mkdir(parents=True)
    tensors: dict[str, Mapping[str, Storable]] = {
        "model": state.optimizer.masters(),
        "optimizer": state.optimizer.moments(),
        "vocabulary": {"kept_ids": state.kept_ids},
        "random": {
            f"{kind}.{rank}": random for rank, kinds in enumerate(random_states) for kind, random in kinds.items()
        },
    }
    for name in tensors:
        write_tensors(tensors[name], folder / f"{name}.safetensors")
    progress = {
        **dataclasses.asdict(state.progress),
        "window": dataclasses.asdict(state.window.totals),
        "optimizer": state.optimizer.counters(),
        "world_size": len(random_states),
    }
    for name, content in (("progress", progress), ("config", dataclasses.asdict(config))):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _manifest(files: Any) -> str:
    """Return a manifest's only valid text: with any other byte it is damaged."""
    return json.dumps(files, indent=2) + "\n"


def _finish(unfinished: Path, target: Path) -> None:
    files = {f.name: {"bytes": f.stat().st_size, "sha256": digest_of(f)} for f in sorted(unfinished.iterdir())}
    (unfinished / "manifest.json").write_text(_manifest(files), encoding="utf-8")
    put_in_place(unfinished, target)


def _remove_old(folder: Path, keep: int) -> None:
    whole = [saved for saved in sorted(folder.glob("step-????????")) if not what_is_damaged(saved, sizes_only=True)]
    for old in whole[:-keep]:
        (old / "manifest.json").unlink(missing_ok=True)  # first: then a half-removed checkpoint does not count as one
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
        for name, entry in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if not sizes_only and digest_of(file) != entry["sha256"]:
                return f"{name} has another SHA-256 than the manifest says"
    except OSError:
        return "manifest.json cannot be read"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "manifest.json is damaged"
    return ""


def remove_former_attempts(folder: Path, restarts: int) -> None:
    """Remove the checkpoints of attempts that have collapsed; `restarts` is the number of the current one.

    Raises:
        UserError: if there is one of a later attempt, so that the list of attempts must have been lost.
    """
    for checkpoint in folder.glob("step-????????"):
        # A damaged one is reported by find_checkpoint.
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
            if progress.get("restarts", 0) > restarts:
                raise UserError(f"{checkpoint} is of a later attempt than restarts.json says; put that file back")
            if progress.get("restarts", 0) < restarts:
                (checkpoint / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(checkpoint, ignore_errors=True)


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
    """Report a checkpoint that has a valid manifest but cannot be read: written by something else, or forged."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Not shared: perhaps only one node cannot read it, and must say so itself.
        raise UserError(f"cannot read the checkpoint {checkpoint}: {reason}; remove it to use the one before") from None


def load_checkpoint(checkpoint: Path, state: RunState, seed: int, world: World) -> None:
    """Restore `state`, and torch's random state.

    If the number of processes has changed, every rank starts a new random stream, seeded by seed and step; whatever
    does not depend on dropout continues exactly.

    Args:
        state: of a new run; its embedding rows may differ, since other test files may use other ids.

    Raises:
        UserError: if the run was started with other rows or weights, or the content is invalid under a valid manifest.
    """
    with _reading(checkpoint):
        values = _read_progress(checkpoint)
        counters, world_size = values.pop("optimizer"), values.pop("world_size")
        state.window.totals = Totals(**values.pop("window"))
        state.window.go_on()
        values["batches_per_epoch"] = state.progress.batches_per_epoch
        new, state.progress = state.progress, Progress(**values)
    for what, before, now in (
        ("rows", state.progress.train_digest, new.train_digest),
        ("weights", state.progress.encoder_digest, new.encoder_digest),
    ):
        if before != now:
            raise UserError(f"the training {what} differ from those that {checkpoint.parent.parent} was started with")
    with _reading(checkpoint):
        masters, moments, vocabulary, random = (load_file(checkpoint / name) for name in _TENSOR_FILES)
        _fit_rows(masters, moments, vocabulary["kept_ids"], state, counters["table_decay"])
        state.optimizer.load(masters, moments, counters)
        seed_rank(seed + state.progress.step, world.rank)
        if world_size == world.world_size:
            torch.set_rng_state(random[f"cpu.{world.rank}"])
            if world.device.type == "cuda" and f"cuda.{world.rank}" in random:
                torch.cuda.set_rng_state(random[f"cuda.{world.rank}"], world.device)


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the content of `progress.json` in today's format."""
    values: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
    if "optimizer" not in values:  # an older format, in which the optimizer had no counters of its own
        steps = values["step"] - values["skipped"]
        values["optimizer"] = {"steps": steps, "table_decay": values.pop("table_decay")}
        values["window"] = dict(zip(("loss", "rows", "tokens", "seconds"), values["window"]))
    if "loss" in values["window"]:
        values["window"]["sums"] = {"loss": values["window"].pop("loss")}
    return values


def _fit_rows(
    masters: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    saved_ids: torch.Tensor,
    state: RunState,
    table_decay: float,
) -> None:
    """Give the loaded embedding table and its moments the rows of `state.kept_ids`."""
    if torch.equal(saved_ids, state.kept_ids):
        return
    table = state.optimizer.masters()[TABLE_NAME]
    untrained = table.rows(0, len(state.kept_ids)).cpu() * table_decay
    masters[TABLE_NAME] = _moved_rows(masters[TABLE_NAME], saved_ids, state.kept_ids, untrained)
    for name in (f"exp_avg.{TABLE_NAME}", f"exp_avg_sq.{TABLE_NAME}"):
        if name in moments:
            moments[name] = _moved_rows(moments[name], saved_ids, state.kept_ids, torch.zeros_like(untrained))


def _moved_rows(rows: torch.Tensor, old_ids: torch.Tensor, new_ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return `start` ([new rows, hidden]), in which the ids that both have got their rows from `rows`."""
    is_common = torch.isin(new_ids, old_ids)
    start[is_common] = rows[torch.isin(old_ids, new_ids)]
    return start


def seed_rank(seed: int, rank: int) -> None:
    """Seed torch on all devices, differently on every rank, so that ranks drop different units."""
    torch.manual_seed(seed * 100_003 + rank)
