"""XLM-R with RoBERTa's classification head, in plain PyTorch.

Equivalent to transformers' `XLMRobertaForSequenceClassification` and torchtext's `RobertaModel`, except that there is
no mask if all texts have the same length, and that the last layer is computed at `<s>` only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sst2_xlmr.model.encoders import EncoderShape

PAD_ID = 1
FIRST_POSITION = PAD_ID + 1  # position 0 of a text is row 2 of the position table, as in fairseq


class Layer(nn.Module):
    """A post-norm transformer layer (https://arxiv.org/abs/1706.03762), with transformers' dropout."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        super().__init__()
        hidden, ffn, epsilon = shape.hidden, shape.ffn, shape.layer_norm_eps
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden, epsilon), nn.LayerNorm(hidden, epsilon)
        self.dropout = nn.Dropout(dropout)
        self.heads = shape.heads

    def forward(self, queries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output at the positions of `queries`, [texts, queries, hidden].

        Keys and values are of all positions, `hidden`, [texts, length, hidden]. The mask, [texts, 1, 1, length] or None
        for zeros, is added to the attention scores: 0 for tokens, -inf for padding.
        """
        attended = self.norm1(queries + self.dropout(self.out(self._attention(queries, hidden, mask))))
        return self.norm2(attended + self.dropout(self.down(F.gelu(self.up(attended)))))

    def _attention(self, queries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        texts, _, width = hidden.shape
        size = width // self.heads
        weight, bias = self.qkv.weight, self.qkv.bias
        if queries is hidden:
            projected = F.linear(hidden, weight, bias).view(texts, -1, 3, self.heads, size).permute(2, 0, 3, 1, 4)
            query, key, value = projected.unbind(0)
        else:
            query = F.linear(queries, weight[:width], bias[:width]).view(texts, -1, self.heads, size).transpose(1, 2)
            projected = F.linear(hidden, weight[width:], bias[width:]).view(texts, -1, 2, self.heads, size)
            key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return attended.transpose(1, 2).reshape(texts, -1, width)


class Encoder(nn.Module):
    """Embeddings and layers; the token embedding has `rows` rows (see model/vocabulary)."""

    def __init__(self, shape: EncoderShape, rows: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, shape.hidden, PAD_ID)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.positions = nn.Embedding(shape.positions, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, shape.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last layer's output at `<s>`, [texts, hidden]; tokens: int64 [texts, length], mask: see Layer."""
        # Padding gets positions too, which is harmless: nothing attends to it, so it has no gradient.
        positions = self.positions.weight[FIRST_POSITION : FIRST_POSITION + tokens.shape[1]]
        hidden = self.dropout(self.norm(self.tokens(tokens) + positions))
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, hidden, mask)
        return last(hidden[:, :1], hidden, mask)[:, 0]


class Head(nn.Module):
    """RoBERTa's classification head: dropout, dense, tanh, dropout, projection."""

    def __init__(self, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dense, self.out, self.dropout = nn.Linear(hidden, hidden), nn.Linear(hidden, outputs), nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, [texts, outputs], from the encoder's output at `<s>`, [texts, hidden]."""
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(features)))))


def mean_of_windows(features: Tensor, windows: Tensor | None) -> Tensor:
    """Average features, [windows, hidden], over each text's windows: [texts, hidden]; for `windows` see `forward`."""
    if windows is None:
        return features
    windows = windows.to(features.device)
    texts = torch.arange(len(windows), device=features.device).repeat_interleave(windows)
    sums = torch.zeros(len(windows), features.shape[1], device=features.device)
    return (sums.index_add(0, texts, features.float()) / windows[:, None]).to(features.dtype)


class SequenceClassifier(nn.Module):
    """Encoder and head, with `outputs` logits per text and `rows` embedding rows (None for the whole vocabulary)."""

    def __init__(
        self, shape: EncoderShape, outputs: int, dropout: float = 0, head_dropout: float = 0, rows: int | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.autocast = False  # whether to compute in bf16 with fp32 parameters
        self.encoder = Encoder(shape, rows or shape.vocab_size, dropout)
        self.head = Head(shape.hidden, outputs, head_dropout)
        self.id_map: Tensor | None  # int32 [vocabulary], the embedding row of each id; None for the identity
        self.register_buffer("id_map", None, persistent=False)

    @property
    def is_encoder_frozen(self) -> bool:
        return not self.encoder.tokens.weight.requires_grad

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the embedding rows of ids; both are int64."""
        return ids if self.id_map is None else self.id_map[ids].long()

    def forward(
        self, ids: Tensor, lengths: Tensor, keys: Tensor | None = None, windows: Tensor | None = None
    ) -> Tensor:
        """Return logits, [texts, outputs].

        Args:
            ids: int64 [tokens], the concatenated texts.
            lengths: int64 [windows], tokens per window, on the CPU to avoid synchronizing with a GPU.
            keys: dropout keys, which only engines use; see `MicroBatch.dropout_keys`.
            windows: int64 [texts], windows per text, on the CPU; None for one each.
        """
        tokens = torch.full((len(lengths), int(lengths.max())), PAD_ID, device=ids.device)
        if len(ids) == tokens.numel():
            return self.padded(ids.view(tokens.shape), None, windows)
        is_token = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(ids.device, non_blocking=True)
        return self.padded(tokens.masked_scatter_(is_token, ids), is_token, windows)

    def padded(self, tokens: Tensor, is_token: Tensor | None, windows: Tensor | None = None) -> Tensor:
        """Return logits, as `forward`, of ids padded with 1 on the right, int64 [windows, length].

        `is_token` is bool [windows, length], False for padding; None without padding.
        """
        mask = None
        if is_token is not None:  # every layer would convert a bool mask to this one
            dtype = torch.bfloat16 if self.autocast else self.encoder.norm.weight.dtype
            no_token = ~is_token[:, None, None, :]
            mask = torch.zeros_like(no_token, dtype=dtype).masked_fill_(no_token, -torch.inf)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_encoder_frozen):
                features = mean_of_windows(self.encoder(self.rows_of(tokens), mask), windows)
            return self.head(features)
