"""The classifier: torchtext's `RobertaModel` owns the parameters; the forward pass is ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchtext.models import RobertaClassificationHead, RobertaEncoderConf, RobertaModel

from sst2_xlmr.config import Config
from sst2_xlmr.errors import UserError
from sst2_xlmr.model.encoders import Encoder, EncoderShape, find_encoder
from sst2_xlmr.model.tokenizer import PAD_ID, Tokenizer, load_tokenizer
from sst2_xlmr.model.weights import check_fit, load_tensors


@dataclass(frozen=True)
class Dropouts:
    """Probabilities of dropout: of hidden states, of attention weights, and in the classification head."""

    hidden: float = 0.0
    attention: float = 0.0
    head: float = 0.0


NO_DROPOUT = Dropouts()


def dropouts_of(config: Config) -> Dropouts:
    """Return the probabilities that a run's options ask for."""
    return Dropouts(hidden=config.dropout, attention=config.dropout, head=config.head_dropout)


class Classifier(RobertaModel):
    """XLM-R with RoBERTa's classification head: dropout, dense, tanh, dropout, projection.

    Parameters and their names are torchtext's. Unlike torchtext's own forward pass, this one uses no mask where a batch
    has no padding, and computes the last layer at the position of `<s>` only (keys and values come from all positions),
    since nothing else reaches the head. Dropout stands where transformers has it: after the embeddings, on attention
    weights, after both halves of a layer; torchtext has one more inside the feed-forward part.
    """

    def __init__(self, shape: EncoderShape, num_labels: int, dropouts: Dropouts = NO_DROPOUT) -> None:
        conf = RobertaEncoderConf(
            vocab_size=shape.vocab_size,
            embedding_dim=shape.hidden,
            ffn_dimension=shape.ffn,
            padding_idx=PAD_ID,
            max_seq_len=shape.positions,
            num_attention_heads=shape.heads,
            num_encoder_layers=shape.layers,
            dropout=dropouts.hidden,
        )
        head = RobertaClassificationHead(num_labels, shape.hidden, dropout=dropouts.head, activation=nn.Tanh)
        super().__init__(conf, head)
        self.shape = shape
        self.num_labels = num_labels
        for layer in self.encoder.transformer.layers.layers:
            layer.self_attn.dropout = dropouts.attention
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
            dropout_keys: int64 [batch], not used here: an engine may draw every row's dropout masks from it instead of
                from torch's generator.

        Returns:
            The parameters' dtype, [batch, num_labels].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_encoder_frozen()):
            features = self._encode(tokens, padded)
        return self.head(features)

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
    dropout = attention.dropout if layer.training else 0.0
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
    model, _ = build_classifier(encoder, encoder.label_names)
    model.requires_grad_(False).eval().to(device, torch.bfloat16 if bf16 else torch.float32)
    return model, load_tokenizer(encoder.tokenizer_file, encoder.max_length), encoder.label_names


def build_classifier(
    encoder: Encoder,
    label_names: list[str],
    dropouts: Dropouts = NO_DROPOUT,
    seed: int = 0,
    kept_ids: np.ndarray | None = None,
) -> tuple[Classifier, bool]:
    """Build the classifier with the encoder's weights, in fp32 on the CPU.

    The head is the encoder folder's own if that has one for the same label names; otherwise it is new.

    Args:
        seed: of a new head.
        kept_ids: int64 [rows], the embedding rows to keep (see compact_vocab); None for all.

    Returns:
        The classifier, and whether its head is new.

    Raises:
        UserError: if the weights do not fit the encoder's configuration.
    """
    with torch.device("meta"):
        model = Classifier(encoder.shape, len(label_names), dropouts)
    if kept_ids is not None:
        model.encoder.transformer.token_embedding = nn.Embedding(
            len(kept_ids), encoder.shape.hidden, PAD_ID, device="meta"
        )
    tensors = load_tensors(encoder, kept_ids)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    head_is_new = encoder.label_names != label_names
    if head_is_new:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        tensors.update(_new_head(shapes, seed))
    check_fit(tensors, shapes, encoder.weights_file)
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    return model, head_is_new


def _new_head(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Return fp32 tensors for a new head: normal weights of deviation 0.02, as in BERT and RoBERTa, and zero biases.

    Args:
        shapes: of all parameters; those of the head are named `head.*`.
    """
    generator = torch.Generator().manual_seed(seed)
    head = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("head.")}
    for tensor in head.values():
        if tensor.dim() == 2:
            tensor.normal_(0, 0.02, generator=generator)
    return head
