"""The run's folder: its lock, `config.json`, `metrics.jsonl`, and the leftovers of a killed process."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from sst2_xlmr import __version__
from sst2_xlmr.config import LOCK_NAME, Config
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import recover, write_errors, write_text


def lock_run_folder(run_folder: Path) -> IO[str]:
    """Create the folder, lock it while the returned file is open, and clean up after a killed process."""
    path = run_folder / LOCK_NAME
    for name in ("checkpoints", "tensorboard", "best", "model"):
        if (run_folder / name).is_symlink():
            raise UserError(f"{run_folder / name} is a symbolic link; link the whole run folder instead")
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another --output-dir") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a POSIX lock works over NFS, and ends with the process
    except (BlockingIOError, PermissionError):
        holder = file.read(200).strip() or "another process"
        raise UserError(f"{run_folder} is in use by {holder}; wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; put the run on a file system with locks") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    recover(run_folder)
    recover(run_folder / "checkpoints")
    return file


def write_config(run_folder: Path, config: Config, is_new: bool) -> None:
    """Write `config.json`, with the package's version, into a claimed folder. UserError if a new run finds one."""
    target = run_folder / "config.json"
    if is_new and target.exists():
        raise UserError(f"{target} already exists; continue it with --resume or choose another directory")
    content = {"sst2_xlmr": __version__, **vars(config)}
    with write_errors(target):
        write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of `metrics.jsonl`: a process may have died while writing one."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


def drop_metrics(path: Path, first_step: int, rewritten_splits: list[str]) -> None:
    """Drop the lines after `first_step`, and at `first_step` those of the splits in `rewritten_splits`."""
    entries = read_metrics(path)
    kept = [entry for entry in entries if (entry["step"], entry.get("split") in rewritten_splits) < (first_step, True)]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def evaluations_at(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return split -> metrics of its last evaluation at a step."""
    entries = [entry for entry in read_metrics(path) if "split" in entry and entry["step"] == step]
    return {entry.pop("split"): entry for entry in entries}
