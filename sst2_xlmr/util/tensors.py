"""Tensors on disk, in safetensors' format, without having them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Union

import torch

_CHUNK_BYTES = 1 << 23
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of one or more dimensions whose rows are computed while it is written, never in memory as a whole.

    `rows(start, stop)` returns its [start:stop], on any device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    def chunk(self, count: int) -> list[LazyTensor]:
        """Cut into equal parts along the rows, as `torch.chunk` does."""
        size, rest = divmod(self.shape[0], count)
        if rest:
            raise ValueError(f"{self.shape[0]} rows cannot be cut into {count} equal parts")

        shape, rows = (size, *self.shape[1:]), self.rows

        def part(first: int) -> LazyTensor:
            return LazyTensor(shape, self.dtype, lambda start, stop: rows(first + start, first + stop))

        return [part(number * size) for number in range(count)]


TensorLike = Union[torch.Tensor, LazyTensor]


def _parts(tensor: TensorLike) -> Iterator[torch.Tensor]:
    """Yield a tensor's values in order, in contiguous pieces on the CPU."""
    if isinstance(tensor, torch.Tensor):
        yield tensor.detach().cpu().contiguous()
        return
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0])).detach().cpu().contiguous()


def write_tensors(tensors: Mapping[str, TensorLike], file: Path) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format), one tensor after another.

    safetensors' own `save_file` wants all tensors in memory, and makes the file readable by its owner only.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Wide types first, as in save_file: every tensor then starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in _parts(tensors[name]):
                assert part.dtype == tensors[name].dtype, name
                opened.write(part.view(-1).view(torch.uint8).numpy().data)
        assert opened.tell() == 8 + len(text) + end
