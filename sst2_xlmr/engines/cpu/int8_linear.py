"""Linear layers in 8-bit integers, and in 16, on a CPU with AVX512-VNNI (see int8.c)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sst2_xlmr.engines.cpu.kernels import Kernels, struct
from sst2_xlmr.util.tensors import quantize_weights

_PANEL = 64  # channels that lie together, as in int8.c
_LINEAR = struct(**dict.fromkeys(("weights", "scales", "sums", "bias"), "u8"), n="i4", k="i4")
_AFTER = struct(gelu="i4", **dict.fromkeys(("residual", "gamma", "beta"), "u8"), epsilon="f4")

# Activations, every row with a range of its own: bytes, uint8 [rows, n rounded up to a multiple of 4], and ranges, fp32
# [rows, 2], scale and shift: a value is scale * byte - shift.
Quantized = tuple[Tensor, Tensor]
# A linear layer as int8.c reads it, and the tensors that its addresses point to.
Int8Linear = tuple[np.ndarray, tuple[Tensor, ...]]
# A linear layer whose weights are the sum of two parts of 8 bits: the layer in 8 bits, and what that rounds away.
Int16Linear = tuple[Int8Linear, Int8Linear]


def int8_linear(values: Tensor, scales: Tensor, bias: Tensor) -> Int8Linear:
    """Return a layer in 8 bits, from the values and scales of `quantize_weights`, and a bias, fp32 [n]."""
    n, k = values.shape
    sums = values.sum(1, dtype=torch.int32) * scales
    padded = F.pad(values, (0, -k % 4, 0, -n % _PANEL))
    panels = padded.view(-1, _PANEL, padded.shape[1] // 4, 4).permute(0, 2, 1, 3).contiguous()
    tensors = (panels, scales, sums, bias.float().clone())
    return np.array((*[tensor.data_ptr() for tensor in tensors], n, k), _LINEAR), tensors


def int16_linear(weight: Tensor, bias: Tensor) -> Int16Linear:
    """Return a layer in 16 bits; weight is fp32 [n, k], bias fp32 [n]."""
    values, scales = quantize_weights(weight)
    rest = quantize_weights(weight - values * scales[:, None])
    return int8_linear(values, scales, bias), int8_linear(*rest, torch.zeros_like(bias))


def quantize(kernels: Kernels, x: Tensor) -> Quantized:
    """Quantize activations of the kernels' dtype, [rows, n]."""
    values, ranges = _room(len(x), x.shape[1])
    threads = torch.get_num_threads()
    kernels.library.quantize(x.data_ptr(), *x.shape, values.data_ptr(), ranges.data_ptr(), threads)
    return values, ranges


def linear16(kernels: Kernels, layer: Int16Linear, x: Tensor) -> Tensor:
    """Return a layer's output in 16 bits, fp32 [rows, n]; x is fp32 [rows, k]."""
    (high, _), (low, _) = layer
    values = torch.empty(len(x), int(high["n"]))
    weights = (high.ctypes.data, low.ctypes.data)
    kernels.library.int16_linear(*weights, x.data_ptr(), len(x), values.data_ptr(), torch.get_num_threads())
    return values


def linear8(
    kernels: Kernels,
    layer: Int8Linear,
    x: Quantized,
    gelu: bool = False,
    norm: tuple[Tensor, nn.LayerNorm] | None = None,
    wanted: str = "both",
) -> tuple[Tensor, Quantized]:
    """Return a layer's output in 8 bits, after GELU or `norm`, in the kernels' dtype and quantized.

    `norm` is the residual connection, of the kernels' dtype, [rows, n], and the LayerNorm that follow, in fp32.
    `wanted` is "values", "quantized" or "both"; what is not wanted is not filled in.
    """
    (linear, _), rows = layer, len(x[1])
    values = torch.empty(rows if wanted != "quantized" else 0, int(linear["n"]), dtype=kernels.dtype)
    result = _room(rows if wanted != "values" else 0, int(linear["n"]))
    after = np.array((gelu, 0, 0, 0, 0.0), _AFTER)
    if norm:
        residual, module = norm
        parameters = [tensor.data_ptr() for tensor in (residual, module.weight, module.bias)]
        after = np.array((gelu, *parameters, module.eps), _AFTER)
    inputs = (linear.ctypes.data, *[tensor.data_ptr() for tensor in x])
    outputs = [tensor.data_ptr() if len(tensor) else None for tensor in (values, *result)]
    kernels.library.int8_linear(*inputs, rows, after.ctypes.data, *outputs, torch.get_num_threads())
    return values, result


def _room(rows: int, n: int) -> Quantized:
    return torch.empty(rows, n + -n % 4, dtype=torch.uint8), torch.empty(rows, 2)
