"""The classifier's forward and backward pass on a CPU, on packed rows: no padding, few passes over memory.

The same mathematics, over the same parameters, as the plain `SequenceClassifier`, which autograd differentiates; the
tests compare the two.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sst2_xlmr.engines.cpu.kernels import Kernels, Packed, mix
from sst2_xlmr.engines.cpu.packed_layers import SITES_PER_LAYER, Embedding, LastLayer, Layer, Settings
from sst2_xlmr.model.roberta import FIRST_POSITION, PAD_ID, Encoder, SequenceClassifier, mean_of_windows


def rounded_up(tokens: int) -> int:
    """Return how many rows the matrices have for a number of tokens.

    oneDNN generates code for every new shape of a matrix product, half a millisecond each; multiples of 8 keep them
    few.
    """
    return tokens + -tokens % 8


def pack(ids: Tensor, lengths: Tensor, keys: Tensor | None, drop_p: float) -> tuple[Packed, Tensor, Tensor]:
    """Add the few rows of `rounded_up` to packed texts: ids, int64 [tokens], and lengths, int64 [texts].

    `keys`, int64 [texts], below 2**32, are what each text's dropout masks are drawn from; None for zeros. Returns the
    layout, and ids and positions (0, 1, ... in every text), int64 [tokens], those behind the last text 1 and 0.
    """
    starts = np.concatenate([[0], np.cumsum(lengths.numpy())])
    real_tokens = int(starts[-1])
    rounding = rounded_up(real_tokens) - real_tokens
    positions = np.arange(real_tokens) - np.repeat(starts[:-1], lengths.numpy())
    token_keys = positions.astype(np.uint32)
    if keys is not None:
        of_tokens = np.repeat(keys.numpy().astype(np.uint32), lengths.numpy())
        token_keys = mix(token_keys * np.uint32(0x9E3779B9) + of_tokens)
    packed = Packed(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(np.pad(token_keys, (0, rounding)).view(np.int32)),
        int(lengths.max()),
        drop_p,
    )
    return packed, F.pad(ids, (0, rounding), value=PAD_ID), torch.from_numpy(np.pad(positions, (0, rounding)))


class PackedClassifier(nn.Module):
    """A classifier with another forward pass, over packed rows; all parameters are the classifier's."""

    def __init__(self, classifier: SequenceClassifier, kernels: Kernels) -> None:
        super().__init__()
        self.classifier, self.kernels = classifier, kernels
        # The optimizer's context in which gradients add up to those of the backward pass after it.
        self.no_sync: Callable[[], AbstractContextManager[None]] = nullcontext

    def forward(
        self, ids: Tensor, lengths: Tensor, keys: Tensor | None = None, windows: Tensor | None = None
    ) -> Tensor:
        """Return logits, [texts, outputs], of the parameters' dtype; for the arguments see `SequenceClassifier`.

        `keys`, int64 [windows], seed the dropout masks of every window; the head's, those of its text's first.
        """
        encoder, head, shape = self.classifier.encoder, self.classifier.head, self.classifier.shape
        rows, ids, positions = pack(ids, lengths, keys, encoder.dropout.p if self.training else 0.0)
        with_grad = torch.is_grad_enabled() and not self.classifier.is_encoder_frozen
        settings = Settings(self.kernels, rows, rows, shape.heads, shape.layer_norm_eps, with_grad, first_site=0)
        with torch.set_grad_enabled(with_grad):
            features = _encode(encoder, settings, self.classifier.rows_of(ids), positions)
            features = mean_of_windows(features, windows)
        firsts = rows.starts[:-1].long()
        if windows is not None:
            firsts = firsts[windows.cumsum(0) - windows]
        head_rows = dataclasses.replace(rows, drop_p=head.dropout.p if self.training else 0.0)
        site = SITES_PER_LAYER * shape.layers + 1
        features = features * _masks(features, self.kernels, head_rows, firsts, site)
        inner = torch.tanh(head.dense(features))
        return head.out(inner * _masks(inner, self.kernels, head_rows, firsts, site + 1))


def _encode(encoder: Encoder, settings: Settings, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the last layer's output at every text's first token, [texts, hidden].

    `rows` and `positions`, int64 [tokens], are rows of the embedding table, and positions in the texts.
    """
    norm, where = encoder.norm, (rows, positions + FIRST_POSITION)
    hidden = Embedding.apply(encoder.tokens.weight, encoder.positions.weight, norm.weight, norm.bias, settings, where)
    for number, layer in enumerate(encoder.layers):
        parameters = [
            parameter
            for module in (layer.qkv, layer.out, layer.norm1, layer.up, layer.down, layer.norm2)
            for parameter in (module.weight, module.bias)
        ]
        attention_rows = dataclasses.replace(settings.rows, drop_p=layer.dropout.p if layer.training else 0.0)
        of_layer = settings._replace(attention_rows=attention_rows, first_site=SITES_PER_LAYER * number)
        function = LastLayer if number == len(encoder.layers) - 1 else Layer
        hidden = function.apply(hidden, of_layer, *parameters)
    return hidden


def _masks(like: Tensor, kernels: Kernels, rows: Packed, tokens: Tensor, site: int) -> Tensor:
    """Return dropout masks like `like`, [texts, n], of one token of each text: 0 or 1 / (1 - rows.drop_p)."""
    masks = torch.ones_like(like)
    kernels.dropout_(masks, rows, site, rows.keys[tokens])
    return masks
