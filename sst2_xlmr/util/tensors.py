"""Tensors: written in the safetensors format without holding all of them in memory, and quantized to int8."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_CHUNK_BYTES = 1 << 23
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is never in memory as a whole: `rows(start, stop)` returns its [start:stop], on any device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.rows(start, stop)

    def chunk(self, count: int) -> "list[LazyTensor]":
        """Split into equal parts along the rows, like `torch.chunk`."""
        size, rows = self.shape[0] // count, self.rows
        shape = (size, *self.shape[1:])

        def part(first: int) -> LazyTensor:
            return LazyTensor(shape, self.dtype, lambda start, stop: rows(first + start, first + stop))

        return [part(number * size) for number in range(count)]


TensorLike = torch.Tensor | LazyTensor


def write_tensors(tensors: Mapping[str, TensorLike], file: Path) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format), one tensor after another."""
    # safetensors' own `save_file` needs all tensors in memory, and makes the file readable only by its owner.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Wide dtypes first, as in save_file: so every tensor starts at a multiple of its element size.
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
        for tensor in map(tensors.__getitem__, names):
            step = max(1, _CHUNK_BYTES // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
            for start in range(0, 1 if isinstance(tensor, torch.Tensor) else tensor.shape[0], step):
                part = tensor if isinstance(tensor, torch.Tensor) else tensor[start : start + step]
                assert part.dtype == tensor.dtype
                opened.write(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        assert opened.tell() == 8 + len(text) + end


def quantize_weights(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize fp32 weights [n, k] to int8 [n, k] and fp32 scales [n]; the largest magnitude of a row becomes 127.

    The scales are those of output channels, or of the rows of an embedding table. Quantizing the dequantized weights
    again gives the same integers.
    """
    largest = weight.abs().amax(1)
    values = (weight * (127 / largest.clamp(min=1e-30))[:, None]).round_()
    return values.to(torch.int8), largest / 127
