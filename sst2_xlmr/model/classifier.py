"""The classifier around torchtext's `RobertaModel`, which owns the parameters; the forward pass is ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchtext.models import RobertaClassificationHead, RobertaEncoderConf, RobertaModel

from sst2_xlmr.config import Config
from sst2_xlmr.engines.cpu.kernels import Kernels, load_kernels
from sst2_xlmr.engines.cpu.packed_encoder import encode, first_token_masks, pack
from sst2_xlmr.errors import UserError
from sst2_xlmr.model.compact_vocab import TABLE_NAME
from sst2_xlmr.model.encoders import Encoder, EncoderShape, check_fit, find_encoder, load_tensors
from sst2_xlmr.model.tokenizer import PAD_ID, Tokenizer, load_tokenizer


class Classifier(RobertaModel):
    """XLM-R with RoBERTa's classification head: dropout, dense, tanh, dropout, projection.

    Parameters and their names are torchtext's. Against torchtext's own forward pass there is no mask where a batch has
    no padding, and the last layer computes the position of `<s>` only (its keys and values come from all positions),
    since nothing else reaches the head. Dropout stands where transformers has it: after the embeddings, on attention
    weights, after both halves of a layer; torchtext has one more inside the feed-forward part.
    """

    def __init__(self, shape: EncoderShape, num_labels: int, dropout: float, head_dropout: float) -> None:
        conf = RobertaEncoderConf(
            vocab_size=shape.vocab_size,
            embedding_dim=shape.hidden,
            ffn_dimension=shape.ffn,
            padding_idx=PAD_ID,
            max_seq_len=shape.positions,
            num_attention_heads=shape.heads,
            num_encoder_layers=shape.layers,
            dropout=dropout,
        )
        head = RobertaClassificationHead(num_labels, shape.hidden, dropout=head_dropout, activation=nn.Tanh)
        super().__init__(conf, head)
        self.shape = shape
        self.kernels: Kernels | None = None
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = shape.layer_norm_eps

    def forward(
        self, tokens: torch.Tensor, padded: bool = True, dropout_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits.

        Args:
            tokens: int64 [batch, length], padded with 1 at the right.
            padded: False if no row has padding; then no mask is computed.
            dropout_keys: int64 [batch], where `kernels` draw every row's dropout masks from; torch's generator else.

        Returns:
            The parameters' dtype, [batch, num_labels].
        """
        trains_encoder = torch.is_grad_enabled() and not self.is_encoder_frozen()
        if self.kernels is None:
            with torch.set_grad_enabled(trains_encoder):
                features = self._encode(tokens, padded)
            return self.head(features)
        transformer, head = self.encoder.transformer, self.head
        rows, ids, positions = pack(tokens, dropout_keys, transformer.dropout.p if self.training else 0.0)
        with torch.set_grad_enabled(trains_encoder):
            features = encode(transformer, self.kernels, rows, ids, positions, self.shape.layer_norm_eps)
        head_p = head.dropout.p if self.training else 0.0
        site = 3 * len(transformer.layers.layers) + 1
        features = features * first_token_masks(features, self.kernels, rows, site, head_p)
        inner = torch.tanh(head.dense(features))
        return head.out_proj(inner * first_token_masks(inner, self.kernels, rows, site + 1, head_p))

    def is_encoder_frozen(self) -> bool:
        return not self.encoder.transformer.token_embedding.weight.requires_grad

    def _encode(self, tokens: torch.Tensor, padded: bool) -> torch.Tensor:
        """Return the last layer's output at `<s>`, [batch, 1, hidden]."""
        transformer = self.encoder.transformer
        if padded:
            is_token = tokens.ne(PAD_ID)
            positions = transformer.positional_embedding(tokens)
            mask = is_token[:, None, None, :]
        else:
            # Position 0 of a text is row PAD_ID + 1, as in fairseq.
            first = PAD_ID + 1
            positions = transformer.positional_embedding.embedding.weight[first : first + tokens.shape[1]]
            mask = None
        hidden = transformer.token_embedding(tokens) + positions
        hidden = transformer.dropout(transformer.embedding_layer_norm(hidden))
        layers = transformer.layers.layers
        for layer in layers[:-1]:
            hidden = _layer(layer, hidden, hidden, mask)
        return _layer(layers[-1], hidden[:, :1], hidden, mask)


def _layer(
    layer: nn.TransformerEncoderLayer, queries: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """One post-norm transformer layer (https://arxiv.org/abs/1706.03762), at the positions of `queries` only.

    Args:
        queries: [batch, queries, hidden], the positions to compute.
        hidden: [batch, length, hidden], all positions, for keys and values.
        mask: bool [batch, 1, 1, length], True where attention may look; None for everywhere.
    """
    attention = layer.self_attn
    heads, size = attention.num_heads, attention.head_dim
    batch = hidden.shape[0]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if queries is hidden:
        projected = F.linear(hidden, weight, bias).view(batch, -1, 3, heads, size).permute(2, 0, 3, 1, 4)
        query, key, value = projected.unbind(0)
    else:
        cut = heads * size
        query = F.linear(queries, weight[:cut], bias[:cut]).view(batch, -1, heads, size).transpose(1, 2)
        projected = F.linear(hidden, weight[cut:], bias[cut:]).view(batch, -1, 2, heads, size).permute(2, 0, 3, 1, 4)
        key, value = projected.unbind(0)
    dropout = layer.dropout1.p if layer.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    mixed = mixed.transpose(1, 2).reshape(batch, -1, heads * size)
    hidden = layer.norm1(queries + layer.dropout1(attention.out_proj(mixed)))
    return layer.norm2(hidden + layer.dropout2(layer.linear2(F.gelu(layer.linear1(hidden)))))


def load_classifier(folder: Path, device: torch.device, bf16: bool) -> tuple[Classifier, Tokenizer, list[str]]:
    """Load a trained model's folder for prediction.

    Returns:
        The classifier in evaluation mode, its tokenizer, and the names of its labels.

    Raises:
        UserError: if the folder is incomplete, or holds an encoder without classification head.
    """
    encoder = find_encoder(str(folder))
    if encoder.label_names is None:
        raise UserError(f"{folder} has no classification head; give a model folder that train.py wrote")
    model, _ = build_classifier(encoder, Config(label_names=encoder.label_names), None)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model.requires_grad_(False).eval().to(device, dtype)
    model.kernels = load_kernels(dtype) if device.type == "cpu" else None
    return model, load_tokenizer(encoder.tokenizer_file, encoder.max_length), encoder.label_names


def build_classifier(encoder: Encoder, config: Config, kept_ids: np.ndarray | None) -> tuple[Classifier, bool]:
    """Build the classifier with the encoder's weights, in fp32 on the CPU.

    The head is the encoder folder's own if that has one for the same label names; otherwise it is new: weights from
    a normal distribution with deviation 0.02 (as in BERT, RoBERTa), drawn from the seed alone, biases zero.

    Args:
        kept_ids: int64 [rows], the embedding rows to keep (see compact_vocab); None for all.

    Returns:
        The classifier, and whether its head is new.

    Raises:
        UserError: if the weights do not fit the encoder's configuration.
    """
    dropout = 0.0 if config.freeze_encoder else config.dropout
    with torch.device("meta"):
        model = Classifier(encoder.shape, len(config.classes), dropout, config.head_dropout)
    tensors = load_tensors(encoder)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    head_is_new = encoder.label_names != config.classes
    if head_is_new:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        generator = torch.Generator().manual_seed(config.seed)
        for name, shape in shapes.items():
            if name.startswith("head."):
                is_matrix = len(shape) == 2
                tensors[name] = (
                    torch.empty(shape).normal_(0, 0.02, generator=generator) if is_matrix else torch.zeros(shape)
                )
    check_fit(tensors, shapes, encoder.weights_file)
    if kept_ids is not None:
        tensors[TABLE_NAME] = tensors[TABLE_NAME][torch.from_numpy(kept_ids)]
        model.encoder.transformer.token_embedding = nn.Embedding(
            len(kept_ids), encoder.shape.hidden, PAD_ID, device="meta"
        )
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    model.encoder.requires_grad_(not config.freeze_encoder)
    return model, head_is_new
