"""The encoder in 8-bit integers, for prediction on a CPU with AVX512-VNNI: see int8.c for how it loses nothing.

Weights of the layers and the embedding table become int8 when a model is loaded. Attention, residual connections and
norms are computed as in `PackedClassifier`, and the head in fp32.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sst2_xlmr.engines.cpu.kernels import Kernels, Packed
from sst2_xlmr.engines.cpu.packed_encoder import pack
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.quantized import quantize_weights
from sst2_xlmr.model.roberta import PAD_ID

_PANEL = 64  # channels that lie together, as in int8.c
_TABLE_ROWS_AT_ONCE = 1 << 14
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("weights", "scales", "sums", "bias")),
        *((name, ctypes.c_int32) for name in ("n", "k")),
    )


class _After(ctypes.Structure):
    _fields_ = (
        ("gelu", ctypes.c_int32),
        *((name, _P) for name in ("residual", "gamma", "beta")),
        ("epsilon", ctypes.c_float),
    )


class Quantized(NamedTuple):
    """Activations, every row with a range of its own.

    Attributes:
        bytes: uint8 [rows, n rounded up to a multiple of 4].
        ranges: fp32 [rows, 2], scale and shift: a value is scale * byte - shift.
    """

    bytes: torch.Tensor
    ranges: torch.Tensor


class Norm(NamedTuple):
    """The residual connection and the LayerNorm that follow a layer.

    Attributes:
        residual: of the kernels' dtype, [rows, n].
        module: its parameters in fp32.
    """

    residual: torch.Tensor
    module: nn.LayerNorm


class Int8Linear:
    """A linear layer whose weights lie as int8.c reads them.

    Args:
        weight: fp32 [n, k].
        bias: fp32 [n].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        values, scales = quantize_weights(weight)
        self.n, self.k = weight.shape
        sums = values.sum(1, dtype=torch.int32) * scales
        padded = F.pad(values, (0, -self.k % 4, 0, -self.n % _PANEL))
        panels = padded.view(-1, _PANEL, padded.shape[1] // 4, 4).permute(0, 2, 1, 3).contiguous()
        self._tensors = (panels, scales, sums, bias.float().clone())  # kept: the struct has their addresses
        self.as_c = _Linear(*[tensor.data_ptr() for tensor in self._tensors], self.n, self.k)


class Int8Kernels:
    """The functions of int8.c."""

    def __init__(self, kernels: Kernels) -> None:
        self._library, self.dtype = kernels.library, kernels.dtype
        self._library.quantize.argtypes = (_P, _L, _I, _P, _P, _I)
        self._library.int8_linear.argtypes = (_P, _P, _P, _L, _P, _P, _P, _P, _I)
        for function in (self._library.quantize, self._library.int8_linear):
            function.restype = None

    def quantize(self, x: torch.Tensor) -> Quantized:
        """Quantize activations of the kernels' dtype, [rows, n]."""
        result = _room(len(x), x.shape[1])
        threads = torch.get_num_threads()
        self._library.quantize(x.data_ptr(), *x.shape, result.bytes.data_ptr(), result.ranges.data_ptr(), threads)
        return result

    def linear(
        self,
        layer: Int8Linear,
        x: Quantized,
        gelu: bool = False,
        norm: Norm | None = None,
        wanted: str = "both",
    ) -> tuple[torch.Tensor, Quantized]:
        """Return the layer's output, after GELU or `norm`, in the kernels' dtype and quantized.

        Args:
            wanted: "values", "quantized" or "both"; what is not wanted is not filled in.
        """
        rows = len(x.ranges)
        values = torch.empty(rows if wanted != "quantized" else 0, layer.n, dtype=self.dtype)
        result = _room(rows if wanted != "values" else 0, layer.n)
        after = _After(int(gelu), None, None, None, 0.0)
        if norm:
            module = norm.module
            parameters = (norm.residual.data_ptr(), module.weight.data_ptr(), module.bias.data_ptr())
            after = _After(int(gelu), *parameters, module.eps)
        outputs = [tensor.data_ptr() if len(tensor) else None for tensor in (values, *result)]
        self._library.int8_linear(
            ctypes.byref(layer.as_c),
            x.bytes.data_ptr(),
            x.ranges.data_ptr(),
            rows,
            ctypes.byref(after),
            *outputs,
            torch.get_num_threads(),
        )
        return values, result


def _room(rows: int, n: int) -> Quantized:
    return Quantized(torch.empty(rows, n + -n % 4, dtype=torch.uint8), torch.empty(rows, 2))


class Int8Layer:
    """A transformer layer's weights; the last layer's query has its own, since it is computed for `<s>` only.

    Args:
        layer: of the plain model, in fp32.
    """

    def __init__(self, layer: nn.Module, is_last: bool) -> None:
        attention = layer.self_attn
        weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.in_features
        cuts = [slice(0, width), slice(width, None)] if is_last else [slice(None)]
        self.projections = [Int8Linear(weight[cut], bias[cut]) for cut in cuts]
        self.out = Int8Linear(attention.out_proj.weight, attention.out_proj.bias)
        self.linear1 = Int8Linear(layer.linear1.weight, layer.linear1.bias)
        self.linear2 = Int8Linear(layer.linear2.weight, layer.linear2.bias)
        self.norm1, self.norm2 = layer.norm1, layer.norm2


class Int8Classifier(nn.Module):
    """A classifier for prediction, made from a plain one, which must be in fp32 and is not needed any more.

    Args:
        kernels: of the dtype of attention and residual connections.
    """

    @torch.no_grad()
    def __init__(self, classifier: Classifier, kernels: Kernels) -> None:
        super().__init__()
        transformer = classifier.transformer
        self.kernels, self.int8, self.shape = kernels, Int8Kernels(kernels), classifier.shape
        self.num_labels, self.head = classifier.num_labels, classifier.head
        parts = [quantize_weights(part) for part in transformer.token_embedding.weight.split(_TABLE_ROWS_AT_ONCE)]
        self.table, self.table_scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        # Position 0 of a text is row PAD_ID + 1, as in fairseq.
        self.positions = transformer.positional_embedding.embedding.weight[PAD_ID + 1 :].clone()
        norm = transformer.embedding_layer_norm
        self.norm_parameters = (norm.weight.to(kernels.dtype), norm.bias.to(kernels.dtype), norm.eps)
        layers = transformer.layers.layers
        self.layers = [Int8Layer(layer, number == len(layers) - 1) for number, layer in enumerate(layers)]

    @torch.no_grad()
    def forward(
        self, tokens: torch.Tensor, padded: bool = True, dropout_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits, fp32 [batch, num_labels].

        Args:
            tokens: int64 [batch, length], padded with 1 at the right.
            padded, dropout_keys: not used.
        """
        rows, ids, positions = pack(tokens, None, 0.0)
        summed = self.table[ids] * self.table_scales[ids, None] + self.positions[positions]
        _, x = self.kernels.add_norm(summed.to(self.kernels.dtype), None, None, *self.norm_parameters, rows, site=0)
        quantized = self.int8.quantize(x)
        for layer in self.layers:
            x, quantized = self._layer(layer, x, quantized, rows)
        inner = torch.tanh(self.head.dense(x.float()))
        return self.head.out_proj(inner)

    def _layer(
        self, layer: Int8Layer, x: torch.Tensor, quantized: Quantized, rows: Packed
    ) -> tuple[torch.Tensor, Quantized]:
        """Return the layer's output for all tokens, or, of the last one, for every text's first token."""
        linear = self.int8.linear
        if len(layer.projections) == 1:
            projected, _ = linear(layer.projections[0], quantized, wanted="values")
            q, k, v = projected.chunk(3, dim=1)
        else:
            firsts = rows.starts[:-1].long()
            x = x[firsts]
            q, _ = linear(layer.projections[0], Quantized(*(part[firsts] for part in quantized)), wanted="values")
            k, v = linear(layer.projections[1], quantized, wanted="values")[0].chunk(2, dim=1)
        mixed = self.kernels.attention(q, k, v, self.shape.heads, rows, site=0)
        y, y_quantized = linear(layer.out, self.int8.quantize(mixed), norm=Norm(x, layer.norm1))
        _, inner = linear(layer.linear1, y_quantized, gelu=True, wanted="quantized")
        return linear(layer.linear2, inner, norm=Norm(y, layer.norm2))
