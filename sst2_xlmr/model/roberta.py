"""XLM-R's modules. They own the parameters, under the names of torchtext's `RobertaModel`, and compute the logits.

torchtext's own `RobertaModel` computes the same; it is the reference of the tests. It is not used here because it does
not load under a torch newer than 2.3, computes all positions of the last layer, and always makes a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PAD_ID = 1
# Position 0 of a text is row 2 of the position table, as in fairseq.
FIRST_POSITION = PAD_ID + 1


@dataclass(frozen=True)
class Dropouts:
    """Probabilities of dropout: of hidden states, of attention weights, and in the classification head."""

    hidden: float = 0.0
    attention: float = 0.0
    head: float = 0.0


class Attention(nn.Module):
    """Multi-head self-attention; the projections of queries, keys and values are one matrix."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)
        self.heads, self.dropout = heads, dropout
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, queries: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return [batch, queries, hidden] (see `Layer.forward`)."""
        batch, _, width = hidden.shape
        size = width // self.heads
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if queries is hidden:
            projected = F.linear(hidden, weight, bias).view(batch, -1, 3, self.heads, size).permute(2, 0, 3, 1, 4)
            query, key, value = projected.unbind(0)
        else:
            query = F.linear(queries, weight[:width], bias[:width]).view(batch, -1, self.heads, size).transpose(1, 2)
            projected = F.linear(hidden, weight[width:], bias[width:]).view(batch, -1, 2, self.heads, size)
            key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, -1, width))


class Layer(nn.Module):
    """One post-norm transformer layer (https://arxiv.org/abs/1706.03762).

    Dropout stands where transformers has it, after both halves; torchtext has one more inside the feed-forward part.
    """

    def __init__(self, hidden: int, heads: int, ffn: int, epsilon: float, dropouts: Dropouts) -> None:
        super().__init__()
        self.self_attn = Attention(hidden, heads, dropouts.attention)
        self.linear1, self.linear2 = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden, epsilon), nn.LayerNorm(hidden, epsilon)
        self.dropout = nn.Dropout(dropouts.hidden)

    def forward(self, queries: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute the layer at the positions of `queries` only.

        Args:
            queries: [batch, queries, hidden], the positions to compute.
            hidden: [batch, length, hidden], all positions, for keys and values.
            mask: [batch, 1, 1, length], added to attention scores: 0, or -inf where there is padding; None for zeros.

        Returns:
            [batch, queries, hidden].
        """
        attended = self.norm1(queries + self.dropout(self.self_attn(queries, hidden, mask)))
        return self.norm2(attended + self.dropout(self.linear2(F.gelu(self.linear1(attended)))))


class Transformer(nn.Module):
    """Embeddings and layers.

    Nothing but the last layer's output at `<s>` reaches the head, so that layer is computed there only, with keys and
    values from all positions.
    """

    def __init__(self, table_rows: int, positions: int, layers: list[Layer], dropout: float) -> None:
        super().__init__()
        hidden, epsilon = layers[0].linear1.in_features, layers[0].norm1.eps
        self.token_embedding = nn.Embedding(table_rows, hidden, PAD_ID)
        self.layers = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.positional_embedding = nn.ModuleDict({"embedding": nn.Embedding(positions, hidden)})
        self.embedding_layer_norm = nn.LayerNorm(hidden, epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor, padded: bool) -> torch.Tensor:
        """Return the last layer's output at `<s>`, [batch, hidden] (see `Classifier.forward`)."""
        length = tokens.shape[1]
        # Padding gets positions too: no other position attends to it, so it changes nothing, and its gradient is zero.
        positions = self.positional_embedding["embedding"].weight[FIRST_POSITION : FIRST_POSITION + length]
        hidden = self.token_embedding(tokens) + positions
        hidden = self.dropout(self.embedding_layer_norm(hidden))
        mask = None
        if padded:  # as what is added to the scores: a mask of bools would be turned into that in every layer
            is_padding = tokens.eq(PAD_ID)[:, None, None, :]
            mask = torch.zeros_like(is_padding, dtype=hidden.dtype).masked_fill_(is_padding, -torch.inf)
        *layers, last = self.layers["layers"]
        for layer in layers:
            hidden = layer(hidden, hidden, mask)
        return last(hidden[:, :1], hidden, mask)[:, 0]


class Head(nn.Module):
    """RoBERTa's classification head: dropout, dense, tanh, dropout, projection."""

    def __init__(self, hidden: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, num_labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits, [batch, num_labels].

        Args:
            features: [batch, hidden], the encoder's output at `<s>`.
        """
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(features)))))
