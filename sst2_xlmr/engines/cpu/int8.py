"""The encoder in 8-bit integers, for prediction on a CPU with AVX512-VNNI.

Weights are quantized when a model is loaded: the embedding table to 8 bits, those of the layers to 16, of which only
the upper 8 are used at first. Attention, residual connections and norms are computed as in `PackedClassifier`, and the
head in fp32. 8 bits change a logit by a few hundredths. So if the two best labels are nearly as probable, the text is
computed again with all 16 bits of weights and activations, and everything else in fp32.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sst2_xlmr.engines.cpu.int8_linear import Int16Linear, Quantized, int16_linear, linear8, linear16, quantize
from sst2_xlmr.engines.cpu.kernels import Kernels, Packed
from sst2_xlmr.engines.cpu.packed_encoder import pack
from sst2_xlmr.model.roberta import FIRST_POSITION, Layer, SequenceClassifier, mean_of_windows
from sst2_xlmr.task import Task
from sst2_xlmr.util.tensors import quantize_weights

# Logits. Of eight models trained on SST-2, 8 bits alone changed 0.2 to 0.7 % of dev's labels. If the 0.5 to 1.6 % of
# texts that are as near as this are computed in 16 bits, 0.1 to 0.3 % change; that takes 2 % more time.
NEAR_TIE = 0.2
_TABLE_ROWS_AT_ONCE = 1 << 14


def _weights_of(layer: Layer, is_last: bool) -> list[Int16Linear]:
    """Return `out`, `up` and `down` of an fp32 layer, then `qkv`; of the last, where q is for `<s>` only, q and kv."""
    weight, bias, width = layer.qkv.weight, layer.qkv.bias, layer.out.in_features
    cuts = [slice(0, width), slice(width, None)] if is_last else [slice(None)]
    parts = [int16_linear(module.weight, module.bias) for module in (layer.out, layer.up, layer.down)]
    return [*parts, *(int16_linear(weight[cut], bias[cut]) for cut in cuts)]


class Int8Classifier(nn.Module):
    """A classifier for prediction, made from a plain one in fp32, of whose weights it has copies.

    `kernels` have the dtype of attention and residual connections; `fp32` are for what is computed in 16 bits: texts
    whose prediction the task says a change of the logits by `near_tie` may change.
    """

    @torch.no_grad()
    def __init__(
        self, classifier: SequenceClassifier, kernels: Kernels, fp32: Kernels, task: Task, near_tie: float = NEAR_TIE
    ) -> None:
        super().__init__()
        encoder = classifier.encoder
        self.kernels, self.fp32, self.shape = kernels, fp32, classifier.shape
        self.head, self.norm = copy.deepcopy(classifier.head), copy.deepcopy(encoder.norm)
        self.near_tie, self.task = near_tie, task
        parts = [quantize_weights(part) for part in encoder.tokens.weight.split(_TABLE_ROWS_AT_ONCE)]
        self.table, self.table_scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        self.positions = encoder.positions.weight[FIRST_POSITION:].clone()
        self.norm_parameters = (self.norm.weight.to(kernels.dtype), self.norm.bias.to(kernels.dtype), self.norm.eps)
        layers = list(encoder.layers)
        self.weights = [_weights_of(layer, layer is layers[-1]) for layer in layers]
        self.norms = [(copy.deepcopy(layer.norm1), copy.deepcopy(layer.norm2)) for layer in layers]

    @torch.no_grad()
    def forward(
        self, ids: Tensor, lengths: Tensor, keys: Tensor | None = None, windows: Tensor | None = None
    ) -> Tensor:
        """Return logits, fp32 [texts, outputs]; arguments as in `SequenceClassifier`, keys are not used."""
        logits = self._classify(mean_of_windows(self._in_8_bits(ids, lengths), windows))
        is_near = self.task.near_ties(logits, self.near_tie)
        if is_near.any():
            here = is_near if windows is None else is_near.repeat_interleave(windows)
            features = self._in_16_bits(ids[here.repeat_interleave(lengths)], lengths[here])
            logits[is_near] = self._classify(mean_of_windows(features, None if windows is None else windows[is_near]))
        return logits

    def _in_8_bits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return fp32 features at `<s>`, [windows, hidden]."""
        rows, ids, positions = pack(ids, lengths, None, 0.0)
        summed = self._embed(ids, positions).to(self.kernels.dtype)
        _, x = self.kernels.add_norm(summed, None, None, *self.norm_parameters, rows, site=0)
        quantized = quantize(self.kernels, x)
        for weights, norms in zip(self.weights, self.norms):
            x, quantized = self._layer(weights, norms, x, quantized, rows)
        return x.float()

    def _in_16_bits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        rows, ids, positions = pack(ids, lengths, None, 0.0)
        x = self.norm(self._embed(ids, positions))
        linear = partial(linear16, self.fp32)
        for (out, up, down, *projections), (norm1, norm2) in zip(self.weights, self.norms):
            projected = torch.cat([linear(projection, x) for projection in projections], 1)
            q, k, v = projected.chunk(3, dim=1)
            mixed = self.fp32.attention(q, k, v, self.shape.heads, rows, site=0)
            y = norm1(x + linear(out, mixed))
            x = norm2(y + linear(down, F.gelu(linear(up, y))))
        return x[rows.starts[:-1].long()]

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return fp32 [tokens, hidden]."""
        return self.table[ids] * self.table_scales[ids, None] + self.positions[positions]

    def _classify(self, features: Tensor) -> Tensor:
        return self.head.out(torch.tanh(self.head.dense(features)))

    def _layer(
        self,
        weights: list[Int16Linear],
        norms: tuple[nn.LayerNorm, nn.LayerNorm],
        x: Tensor,
        quantized: Quantized,
        rows: Packed,
    ) -> tuple[Tensor, Quantized]:
        """Return a layer's output in 8 bits for all tokens, or, of the last one, for every text's first token."""
        linear, (out, up, down, *projections) = partial(linear8, self.kernels), [high for high, _ in weights]
        if len(projections) == 1:
            q, k, v = linear(projections[0], quantized, wanted="values")[0].chunk(3, dim=1)
        else:
            firsts = rows.starts[:-1].long()
            x = x[firsts]
            q, _ = linear(projections[0], (quantized[0][firsts], quantized[1][firsts]), wanted="values")
            k, v = linear(projections[1], quantized, wanted="values")[0].chunk(2, dim=1)
        mixed = self.kernels.attention(q, k, v, self.shape.heads, rows, site=0)
        y, y_quantized = linear(out, quantize(self.kernels, mixed), norm=(x, norms[0]))
        _, inner = linear(up, y_quantized, gelu=True, wanted="quantized")
        return linear(down, inner, norm=(y, norms[1]))
