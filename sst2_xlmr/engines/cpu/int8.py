"""The encoder in 8-bit integers, for prediction on a CPU with AVX512-VNNI.

Weights are quantized when a model is loaded: the embedding table to 8 bits, those of the layers to 16, of which the
upper 8 answer a text. Attention, residual connections and norms are computed as in `PackedClassifier`, and the head in
fp32. 8 bits move a logit by some hundredths. So if the two best labels are nearly as probable, the text is computed
again with all 16 bits of weights and activations, and everything else in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sst2_xlmr.engines.cpu.int8_linear import Int8Kernels, Int16Linear, Norm, Quantized
from sst2_xlmr.engines.cpu.kernels import Kernels, Packed
from sst2_xlmr.engines.cpu.packed_encoder import pack
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.quantized import quantize_weights
from sst2_xlmr.model.roberta import PAD_ID

# Logits. Of eight models trained on SST-2, 8 bits alone changed 0.2 to 0.7 % of dev's labels. If the 0.5 to 1.6 % of
# texts that are as near as this are computed in 16 bits, 0.1 to 0.3 % change; that takes 2 % more time.
NEAR_TIE = 0.2
_TABLE_ROWS_AT_ONCE = 1 << 14


class LayerWeights:
    """A transformer layer's weights; the last layer's query has its own, since it is computed for `<s>` only.

    Args:
        layer: of the plain model, in fp32.
    """

    def __init__(self, layer: nn.Module, is_last: bool) -> None:
        attention = layer.self_attn
        weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.in_features
        cuts = [slice(0, width), slice(width, None)] if is_last else [slice(None)]
        self.projections = [Int16Linear(weight[cut], bias[cut]) for cut in cuts]
        self.out = Int16Linear(attention.out_proj.weight, attention.out_proj.bias)
        self.linear1 = Int16Linear(layer.linear1.weight, layer.linear1.bias)
        self.linear2 = Int16Linear(layer.linear2.weight, layer.linear2.bias)
        self.norm1, self.norm2 = layer.norm1, layer.norm2


class Int8Classifier(nn.Module):
    """A classifier for prediction, made from a plain one, which must be in fp32 and is not needed any more.

    Args:
        kernels: of the dtype of attention and residual connections.
        fp32: the same in fp32, for what is computed in 16 bits.
        near_tie: logits; a text whose two best labels are less apart is computed in 16 bits.
    """

    @torch.no_grad()
    def __init__(self, classifier: Classifier, kernels: Kernels, fp32: Kernels, near_tie: float = NEAR_TIE) -> None:
        super().__init__()
        transformer = classifier.transformer
        self.kernels, self.int8, self.shape = kernels, Int8Kernels(kernels), classifier.shape
        self.fp32, self.int16, self.near_tie = fp32, Int8Kernels(fp32), near_tie
        self.num_labels, self.head = classifier.num_labels, classifier.head
        parts = [quantize_weights(part) for part in transformer.token_embedding.weight.split(_TABLE_ROWS_AT_ONCE)]
        self.table, self.table_scales = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        # Position 0 of a text is row PAD_ID + 1, as in fairseq.
        self.positions = transformer.positional_embedding.embedding.weight[PAD_ID + 1 :].clone()
        self.norm = norm = transformer.embedding_layer_norm
        self.norm_parameters = (norm.weight.to(kernels.dtype), norm.bias.to(kernels.dtype), norm.eps)
        layers = transformer.layers.layers
        self.layers = [LayerWeights(layer, number == len(layers) - 1) for number, layer in enumerate(layers)]

    @torch.no_grad()
    def forward(
        self, tokens: torch.Tensor, padded: bool = True, dropout_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits, fp32 [batch, num_labels].

        Args:
            tokens: int64 [batch, length], padded with 1 at the right.
            padded, dropout_keys: not used.
        """
        logits = self._in_8_bits(tokens)
        if self.num_labels > 1:
            best, second = logits.topk(2).values.unbind(1)
            is_near = best - second < self.near_tie
            if is_near.any():
                logits[is_near] = self._in_16_bits(tokens[is_near])
        return logits

    def _in_8_bits(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, ids, positions = pack(tokens, None, 0.0)
        summed = self._embed(ids, positions).to(self.kernels.dtype)
        _, x = self.kernels.add_norm(summed, None, None, *self.norm_parameters, rows, site=0)
        quantized = self.int8.quantize(x)
        for layer in self.layers:
            x, quantized = self._layer(layer, x, quantized, rows)
        return self._classify(x.float())

    def _in_16_bits(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, ids, positions = pack(tokens, None, 0.0)
        x = self.norm(self._embed(ids, positions))
        linear, heads = self.int16.linear16, self.shape.heads
        for layer in self.layers:
            projected = torch.cat([linear(projection, x) for projection in layer.projections], 1)
            q, k, v = projected.chunk(3, dim=1)
            mixed = self.fp32.attention(q, k, v, heads, rows, site=0)
            y = layer.norm1(x + linear(layer.out, mixed))
            x = layer.norm2(y + linear(layer.linear2, F.gelu(linear(layer.linear1, y))))
        return self._classify(x[rows.starts[:-1].long()])

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return fp32 [tokens, hidden]."""
        return self.table[ids] * self.table_scales[ids, None] + self.positions[positions]

    def _classify(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head.out_proj(torch.tanh(self.head.dense(features)))
        return logits

    def _layer(
        self, layer: LayerWeights, x: torch.Tensor, quantized: Quantized, rows: Packed
    ) -> tuple[torch.Tensor, Quantized]:
        """Return a layer's output in 8 bits for all tokens, or, of the last one, for every text's first token."""
        linear = self.int8.linear
        if len(layer.projections) == 1:
            projected, _ = linear(layer.projections[0].high, quantized, wanted="values")
            q, k, v = projected.chunk(3, dim=1)
        else:
            firsts = rows.starts[:-1].long()
            x = x[firsts]
            q, _ = linear(layer.projections[0].high, Quantized(*(part[firsts] for part in quantized)), wanted="values")
            k, v = linear(layer.projections[1].high, quantized, wanted="values")[0].chunk(2, dim=1)
        mixed = self.kernels.attention(q, k, v, self.shape.heads, rows, site=0)
        y, y_quantized = linear(layer.out.high, self.int8.quantize(mixed), norm=Norm(x, layer.norm1))
        _, inner = linear(layer.linear1.high, y_quantized, gelu=True, wanted="quantized")
        return linear(layer.linear2.high, inner, norm=Norm(y, layer.norm2))
