"""Tensors in safetensors or in files of torch.save, in one file or several, read a few at a time."""

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
_FAULT_BYTES = 1 << 16  # what Linux maps around a byte that is read


def reading_weights(file: Path) -> contextlib.AbstractContextManager[None]:
    return read_errors(f"weights from {file}", "fetch the file again, or convert it to model.safetensors")


def _is_plain_zip(file: Path) -> bool:
    """Whether a file from torch.save is a zip; otherwise it is a bare pickle.

    UserError for what `weights_only` does not guard in torch.load: tar files (CVE-2025-32434) and TorchScript.
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


def parts_of(file: Path) -> list[Path]:
    """Return the files that hold the weights: this one, or those that an index of shards names."""
    if not file.name.endswith(".index.json"):
        return [file]
    with reading_weights(file):
        names = read_json(file, "copy it again").get("weight_map", {}).values()
        return [file.with_name(Path(name).name) for name in sorted(set(names))]


class Weights:
    """The floating-point tensors of a file, or of an index of shards; each is read, as fp32, when asked for.

    A file is mapped into memory. Pages that have been read count as the process's memory until the mapping is closed,
    so it is renewed from time to time. Tensors are copied, because a mapping would change with the file. Only torch's
    old format, a bare pickle, cannot be mapped and is read as a whole.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._files = file, parts_of(file)
        with reading_weights(file):
            self._is_mapped = all(part.suffix == ".safetensors" or _is_plain_zip(part) for part in self._files)
            self._map()

    def _map(self) -> None:
        raw: dict[str, Any] = {}
        for file in self._files:
            if file.suffix == ".safetensors":
                found = load_file(file)
            else:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=self._is_mapped)
                if not isinstance(found, dict) or isinstance(found.get("state_dict"), dict):
                    raise UserError(f"{file} is no model's state_dict(); save that alone, under transformers' names")
            raw.update(found)
        self.raw = {name: raw[name] for name in raw if torch.is_tensor(raw[name]) and raw[name].is_floating_point()}
        self._read_bytes = 0

    def tensor(self, name: str, ids: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor; of the embedding table, only the rows `ids`, int64 [rows], unless they are None."""
        if ids is None or name not in EMBEDDING_SOURCES:
            return self.read(name, ...)
        return torch.cat([self.read(name, part) for part in ids.split(_ROWS_AT_ONCE)])

    def read(self, name: str, rows: Any) -> torch.Tensor:
        """Return the part of a tensor that the index `rows` selects."""
        with reading_weights(self._file):
            result = self.raw[name][rows].to(torch.float32, copy=self._is_mapped)
            scattered = len(rows) * _FAULT_BYTES if isinstance(rows, torch.Tensor) else 0
            self._read_bytes += max(result.nbytes, scattered)
            if self._is_mapped and self._read_bytes > _MAPPED_BYTES:
                self._map()
            return result
