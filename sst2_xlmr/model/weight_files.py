"""Tensors in safetensors or torch.save files, possibly sharded, read a few at a time."""

from __future__ import annotations

import contextlib
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sst2_xlmr.model.weight_names import EMBEDDING_SOURCES
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_errors, read_json

_ROWS_AT_ONCE = 512
_MAPPED_BYTES = 1 << 26
_FAULT_BYTES = 1 << 16  # mapped by Linux per page fault


def reading_weights(file: Path) -> contextlib.AbstractContextManager[None]:
    return read_errors(f"weights from {file}", "fetch the file again, or convert it to model.safetensors")


def _is_plain_zip(file: Path) -> bool:
    """Whether a torch.save file is a zip file, not a bare pickle.

    UserError for tar files and TorchScript, for which `weights_only` of torch.load is not safe (CVE-2025-32434).
    """
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"  # torch's own test
    if is_zip:
        with zipfile.ZipFile(file) as zipped:
            is_unsafe = any(Path(name).name == "constants.pkl" for name in zipped.namelist())
    else:
        is_unsafe = tarfile.is_tarfile(file)
    if is_unsafe:
        raise UserError(f"{file} is TorchScript or a tar file, which may run code; convert it to model.safetensors")
    return is_zip


def shards_of(file: Path) -> list[Path]:
    """Return the shards listed in an index file, or the file itself."""
    if not file.name.endswith(".index.json"):
        return [file]
    with reading_weights(file):
        names = read_json(file, "copy it again").get("weight_map", {}).values()
        return [file.with_name(Path(name).name) for name in sorted(set(names))]


class WeightReader:
    """The floating-point tensors of a file or of its shards, read on demand as fp32.

    Files are memory-mapped. Pages that have been read count as the process's memory until the mapping is closed, so
    files are mapped anew after every 64 MiB read. Tensors are copied, because a mapping would change with the file;
    without `copy_weights`, the caller copies what it keeps. Only torch's old format, a bare pickle, cannot be mapped
    and is loaded whole.
    """

    def __init__(self, file: Path, copy_weights: bool = True) -> None:
        self._file, self._files, self._copy_weights = file, shards_of(file), copy_weights
        with reading_weights(file):
            self._is_mapped = all(shard.suffix == ".safetensors" or _is_plain_zip(shard) for shard in self._files)
            self._map()

    def _map(self) -> None:
        raw: dict[str, Any] = {}
        for file in self._files:
            if file.suffix == ".safetensors":
                tensors = load_file(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=self._is_mapped)
                if not isinstance(tensors, dict) or isinstance(tensors.get("state_dict"), dict):
                    raise UserError(f"{file} is not a state_dict(); save only that, with transformers' names")
            raw.update(tensors)
        self.raw = {name: raw[name] for name in raw if torch.is_tensor(raw[name]) and raw[name].is_floating_point()}
        self._read_bytes = 0

    def tensor(self, name: str, ids: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor; only the rows `ids`, int64 [rows], if it is the embedding table and they are given."""
        if ids is None or name not in EMBEDDING_SOURCES:
            return self.read(name, ...)
        return torch.cat([self.read(name, chunk) for chunk in ids.split(_ROWS_AT_ONCE)])

    def read(self, name: str, rows: Any) -> torch.Tensor:
        """Return `tensor[rows]`."""
        with reading_weights(self._file):
            result = self.raw[name][rows].to(torch.float32, copy=self._is_mapped and self._copy_weights)
            scattered = len(rows) * _FAULT_BYTES if isinstance(rows, torch.Tensor) else 0
            self._read_bytes += max(result.nbytes, scattered)
            if self._is_mapped and self._read_bytes > _MAPPED_BYTES:
                self._map()
            return result
