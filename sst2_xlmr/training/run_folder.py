"""The run's folder: its lock, `config.json` and `metrics.jsonl`, and what a killed process has left in it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from sst2_xlmr import __version__
from sst2_xlmr.config import LOCK_NAME, Config
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import recover, write_text


def claim(run_folder: Path) -> IO[str]:
    """Make the folder if need be, and lock it for as long as the returned file is open and this process lives.

    What a killed process left half-written is removed, and what it was replacing is put back.

    The lock is POSIX's: it works over NFS, goes with the process however that ends, and is not inherited by loader
    processes, which may outlive it for seconds.

    Raises:
        UserError: if another process holds it, or the folder cannot be written.
    """
    path = run_folder / LOCK_NAME
    for name in ("checkpoints", "tensorboard", "best", "model"):
        if (run_folder / name).is_symlink():
            raise UserError(f"{run_folder / name} is a symbolic link; a run stays in its folder: link that as a whole")
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another --output-dir") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = file.read(200).strip() or "another process"
        raise UserError(f"{run_folder} is in use by {holder}; wait for it, or choose another directory") from None
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; put the run on a file system with locks") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    recover(run_folder)
    recover(run_folder / "checkpoints")
    return file


def write_config(run_folder: Path, config: Config, is_new: bool) -> None:
    """Write `config.json`, with the package's version; the folder must be claimed.

    A new run's is written right after that: a folder without it cannot be resumed, should the process die. A resumed
    run's is replaced when its checkpoint has been accepted. UserError if a new run finds another one there.
    """
    target = run_folder / "config.json"
    if is_new and target.exists():
        raise UserError(f"{target} already exists; continue it with --resume or choose another directory")
    content = {"sst2_xlmr": __version__, **dataclasses.asdict(config)}
    try:
        write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}; make room, or choose another directory") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, as far as they were written whole."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the process died while it wrote this line
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def forget_metrics(path: Path, first_step: int, written_again: list[str]) -> None:
    """Remove the lines that a run resumed at `first_step` writes again; OSError if the disk is full.

    Args:
        written_again: splits that will be evaluated (once more) at that step.
    """
    kept = [
        entry
        for entry in read_metrics(path)
        if entry["step"] < first_step or (entry["step"] == first_step and entry.get("split") not in written_again)
    ]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def evaluations_at(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the metrics of the last evaluation of each file at a step, by the file's name."""
    entries = [entry for entry in read_metrics(path) if "split" in entry and entry["step"] == step]
    return {entry.pop("split"): entry for entry in entries}
