"""An encoder's weights, read from safetensors or from a file of torch.save, a few at a time."""

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

from sst2_xlmr.model.encoders import BUNDLE_SHAPES, Encoder
from sst2_xlmr.model.vocabulary import TABLE
from sst2_xlmr.model.weight_names import TABLE_SOURCES, Tensors, from_hugging_face, from_torchtext, layer_of
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import Deferred

_ROWS_AT_ONCE = 512
_MAPPED_BYTES = 1 << 26
_FAULT_BYTES = 1 << 16  # what Linux maps around a byte that is read


@contextlib.contextmanager
def _reading_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"cannot read weights from {file}: it no longer exists; put it back") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, struct.error) as error:
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


class _Weights:
    """A file's floating-point tensors, without those above the lowest `layers`; each is read, as fp32, when asked for.

    The file is mapped into memory. Pages that have been read count as the process's memory until the mapping is closed,
    so it is renewed from time to time. Tensors are copied, because a mapping would change with the file. Only torch's
    old format, a bare pickle, cannot be mapped and is read as a whole.

    Args:
        ids: int64 [rows], the rows of the embedding table to read; None for all.
    """

    def __init__(self, file: Path, ids: torch.Tensor | None, layers: int) -> None:
        self._file, self._ids, self._layers = file, ids, layers
        self._is_mapped = file.suffix == ".safetensors" or _is_plain_zip(file)
        self._map()

    def _map(self) -> None:
        if self._file.suffix == ".safetensors":
            raw = load_file(self._file)
        else:
            raw = torch.load(self._file, map_location="cpu", weights_only=True, mmap=self._is_mapped)
            if not isinstance(raw, dict):
                raise UserError(f"{self._file} holds no tensors by name; save a model's state_dict()")
        floats = {name: raw[name] for name in raw if torch.is_tensor(raw[name]) and raw[name].is_floating_point()}
        self.raw = {name: floats[name] for name in floats if layer_of(name) < self._layers}
        self._read_bytes = 0

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; of the embedding table, the rows to read."""
        if self._ids is None or name not in TABLE_SOURCES:
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


def load_tensors(encoder: Encoder, ids: torch.Tensor | None = None) -> Tensors:
    """Read an encoder's weights; returns fp32 tensors under our names, with `head.*` where it has a head.

    UserError if the file cannot be read as weights, or its table does not have the configured number of rows.

    Args:
        ids: int64 [rows], the rows of the embedding table to read; None for all.
    """
    with _reading_errors(encoder.weights_file):
        raw = _Weights(encoder.weights_file, ids, encoder.shape.layers)
        if ids is not None:
            _find_table(encoder, raw)
        rename = from_torchtext if encoder.name in BUNDLE_SHAPES else from_hugging_face
        return rename(list(raw.raw), raw.tensor)


def pretrained_table(encoder: Encoder) -> Deferred:
    """Return the encoder's embedding table, fp32 [vocab_size, hidden], read a few rows at a time.

    UserError if the file cannot be read as weights, or has no such table.
    """
    file = encoder.weights_file
    with _reading_errors(file):
        raw = _Weights(file, None, encoder.shape.layers)
        name = _find_table(encoder, raw)

    def rows(start: int, stop: int) -> torch.Tensor:
        with _reading_errors(file):
            return raw.read(name, slice(start, stop))

    return Deferred((encoder.shape.vocab_size, encoder.shape.hidden), torch.float32, rows)


def _find_table(encoder: Encoder, raw: _Weights) -> str:
    """Return the embedding table's name in the file, and check its shape."""
    name = next((name for name in TABLE_SOURCES if name in raw.raw), "")
    expected = torch.Size((encoder.shape.vocab_size, encoder.shape.hidden))
    check_fit({TABLE: raw.raw[name]} if name else {}, {TABLE: expected}, encoder.weights_file)
    return name


def check_fit(tensors: Tensors, expected: dict[str, torch.Size], file: Path) -> None:
    """Raise UserError, naming the first, if tensors are missing, superfluous or of another shape than configured."""
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} {list(shape)} is missing")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    superfluous = [name for name in tensors if name.startswith("encoder.") and name not in expected]
    problems += [f"{name} is not in the configured model" for name in superfluous]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{file} does not fit its configuration: {problems[0]}{more}; check config.json beside it")
