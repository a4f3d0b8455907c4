"""Tensors in safetensors or in files of torch.save, in one file or several, read a few at a time."""

from __future__ import annotations

import contextlib
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sst2_xlmr.model.weight_names import EMBEDDING_SOURCES, layer_of
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_json

_ROWS_AT_ONCE = 512
_MAPPED_BYTES = 1 << 26
_FAULT_BYTES = 1 << 16  # what Linux maps around a byte that is read


@contextlib.contextmanager
def reading_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"cannot read weights from {file}: it no longer exists; put it back") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, IndexError, zipfile.BadZipFile, struct.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read weights from {file}: {reason}; the file is damaged, fetch it again") from None
    except Exception as error:  # weights_only raises pickle's errors for anything that is not plain tensors
        if "UnpicklingError" not in type(error).__name__:
            raise
        raise UserError(f"{file} holds more than tensors, or is damaged; convert it to model.safetensors") from None


def _is_plain_zip(file: Path) -> bool:
    """Whether a file from torch.save is a zip; otherwise it is a bare pickle.

    UserError for formats that `weights_only` does not guard in torch.load: tar files (CVE-2025-32434; torch 2.6 refuses
    them too) and TorchScript.
    """
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"  # torch's own test
    if is_zip:
        with zipfile.ZipFile(file) as zipped:
            unsafe = any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in zipped.namelist())
    else:
        unsafe = tarfile.is_tarfile(file)
    if unsafe:
        raise UserError(f"{file} is TorchScript or a tar file, which may run code; convert it to model.safetensors")
    return is_zip


def parts_of(file: Path) -> list[Path]:
    """Return the files that hold the weights: this one, or those that it names if it is an index of shards."""
    if not file.name.endswith(".index.json"):
        return [file]
    with reading_errors(file):
        names = read_json(file, "copy it again").get("weight_map", {}).values()
        return [file.with_name(Path(name).name) for name in sorted(set(names))]


class Weights:
    """The floating-point tensors of files, without those above the lowest `layers`; each is read, as fp32, when asked
    for.

    A file is mapped into memory. Pages that have been read count as the process's memory until the mapping is closed,
    so it is renewed from time to time. Tensors are copied, because a mapping would change with the file. Only torch's
    old format, a bare pickle, cannot be mapped and is read as a whole.

    Args:
        file: of the weights, or an index of shards.
        ids: int64 [rows], the rows of the embedding table to read; None for all.
    """

    def __init__(self, file: Path, ids: torch.Tensor | None, layers: int) -> None:
        self._files, self._ids, self._layers = parts_of(file), ids, layers
        self._is_mapped = all(part.suffix == ".safetensors" or _is_plain_zip(part) for part in self._files)
        self._map()

    def _map(self) -> None:
        raw: dict[str, Any] = {}
        for file in self._files:
            if file.suffix == ".safetensors":
                found = load_file(file)
            else:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=self._is_mapped)
                if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
                    raise UserError(f"{file} is a checkpoint; save its 'state_dict' alone, under transformers' names")
                if not isinstance(found, dict):
                    raise UserError(f"{file} holds no tensors by name; save a model's state_dict()")
            raw.update(found)
        floats = {name: raw[name] for name in raw if torch.is_tensor(raw[name]) and raw[name].is_floating_point()}
        self.raw = {name: floats[name] for name in floats if layer_of(name) < self._layers}
        self._read_bytes = 0

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; of the embedding table, the rows to read."""
        if self._ids is None or name not in EMBEDDING_SOURCES:
            return self.read(name, ...)
        return torch.cat([self.read(name, ids) for ids in self._ids.split(_ROWS_AT_ONCE)])

    def read(self, name: str, rows: Any) -> torch.Tensor:
        """Return the part of a tensor that the index `rows` selects."""
        result = self.raw[name][rows].to(torch.float32, copy=self._is_mapped)
        scattered = len(rows) * _FAULT_BYTES if isinstance(rows, torch.Tensor) else 0
        self._read_bytes += max(result.nbytes, scattered)
        if self._is_mapped and self._read_bytes > _MAPPED_BYTES:
            self._map()
        return result
