"""Files that are either whole or not there: digests, syncing to the disk, replacing a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Return a file's digest, hexadecimal; `kind` is a name that hashlib knows."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file with the permissions of any new file; safetensors makes it readable by its owner only.

    Raises:
        OSError: if it cannot be written, with the reason in its text.
    """
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    file.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power failure (files are synced by themselves)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make all files of a folder, and its entries, survive a power failure."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)


def replace_folder(new: Path, old: Path) -> None:
    """Put the finished folder `new` in the place of `old`, which may exist.

    A reader finds one of them whole, or none for the moment between two renames; never a half-written one.
    """
    aside = old.with_name(old.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    sync_folder(old.parent)
    shutil.rmtree(aside, ignore_errors=True)
