"""The classifier's forward and backward pass on a CPU, on packed rows: no padding, few passes over memory.

The same mathematics, over the same parameters, as the plain `Classifier`, which autograd differentiates; the tests
compare the two.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sst2_xlmr.engines.cpu.kernels import Kernels, Packed, mix
from sst2_xlmr.engines.cpu.packed_layers import SITES_PER_LAYER, Embedding, LastLayer, Layer, Settings
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.roberta import PAD_ID


def rounded_up(tokens: int) -> int:
    """Return how many rows the matrices have for a number of tokens.

    oneDNN generates code for every new shape of a matrix product, half a millisecond each; multiples of 8 keep them
    few.
    """
    return tokens + -tokens % 8


def pack(tokens: torch.Tensor, keys: torch.Tensor | None, drop_p: float) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """Leave padding out, but for the few rows that `rounded_up` adds.

    Args:
        tokens: int64 [texts, length], padded with 1.
        keys: int64 [texts], below 2**32, where each text's dropout masks come from; None for zeros.

    Returns:
        The layout; ids and positions (0, 1, ... in every text), int64 [tokens], those behind the last text 1 and 0.
    """
    is_token = tokens != PAD_ID
    lengths = is_token.sum(1).numpy()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    real_tokens = int(starts[-1])
    rounding = rounded_up(real_tokens) - real_tokens
    positions = np.arange(real_tokens) - np.repeat(starts[:-1], lengths)
    token_keys = positions.astype(np.uint32)
    if keys is not None:
        token_keys = mix(token_keys * np.uint32(0x9E3779B9) + np.repeat(keys.numpy().astype(np.uint32), lengths))
    packed = Packed(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(np.pad(token_keys, (0, rounding)).view(np.int32)),
        int(lengths.max()),
        drop_p,
    )
    ids = F.pad(tokens[is_token], (0, rounding), value=PAD_ID)
    return packed, ids, torch.from_numpy(np.pad(positions, (0, rounding)))


class PackedClassifier(nn.Module):
    """A classifier with another forward pass, over packed rows; all parameters are the classifier's."""

    def __init__(self, classifier: Classifier, kernels: Kernels) -> None:
        super().__init__()
        self.classifier, self.kernels = classifier, kernels
        self.num_labels = classifier.num_labels

    def forward(
        self, tokens: torch.Tensor, padded: bool = True, dropout_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits, [batch, num_labels], of the parameters' dtype.

        Args:
            tokens: int64 [batch, length], padded with 1 at the right.
            padded: not used: padding is left out.
            dropout_keys: int64 [batch], what every row's dropout masks are drawn from.
        """
        transformer, head = self.classifier.transformer, self.classifier.head
        rows, ids, positions = pack(tokens, dropout_keys, transformer.dropout.p if self.training else 0.0)
        shape = self.classifier.shape
        settings = Settings(self.kernels, rows, rows, shape.heads, shape.layer_norm_eps, first_site=0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.classifier.is_encoder_frozen()):
            features = _encode(transformer, settings, ids, positions)
        head_rows = dataclasses.replace(rows, drop_p=head.dropout.p if self.training else 0.0)
        site = SITES_PER_LAYER * len(transformer.layers.layers) + 1
        features = features * _first_token_masks(features, self.kernels, head_rows, site)
        inner = torch.tanh(head.dense(features))
        return head.out_proj(inner * _first_token_masks(inner, self.kernels, head_rows, site + 1))


def _encode(transformer: nn.Module, settings: Settings, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the last layer's output at every text's first token, [texts, hidden].

    Args:
        transformer: torchtext's `TransformerEncoder`, with parameters of the kernels' dtype.
        ids, positions: int64 [tokens].
    """
    norm = transformer.embedding_layer_norm
    table, position_table = transformer.token_embedding.weight, transformer.positional_embedding.embedding.weight
    # Position 0 of a text is row PAD_ID + 1, as in fairseq.
    hidden = Embedding.apply(table, position_table, norm.weight, norm.bias, settings, (ids, positions + PAD_ID + 1))
    layers = transformer.layers.layers
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        parameters = [attention.in_proj_weight, attention.in_proj_bias]
        for module in (attention.out_proj, layer.norm1, layer.linear1, layer.linear2, layer.norm2):
            parameters += [module.weight, module.bias]
        attention_rows = dataclasses.replace(settings.rows, drop_p=attention.dropout if layer.training else 0.0)
        of_layer = settings._replace(attention_rows=attention_rows, first_site=SITES_PER_LAYER * number)
        function = LastLayer if number == len(layers) - 1 else Layer
        hidden = function.apply(hidden, of_layer, *parameters)
    return hidden


def _first_token_masks(like: torch.Tensor, kernels: Kernels, rows: Packed, site: int) -> torch.Tensor:
    """Return dropout masks like `like`, [texts, n], of every text's first token: 0 or 1 / (1 - rows.drop_p)."""
    masks = torch.ones_like(like)
    kernels.dropout_(masks, rows, site, rows.keys[rows.starts[:-1].long()])
    return masks
