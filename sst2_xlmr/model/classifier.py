"""The classifier: XLM-R's encoder with a classification head, built from a model's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.model.encoders import Encoder, EncoderShape, check_tokenizer, find_model
from sst2_xlmr.model.roberta import Dropouts, Head, Layer, Transformer
from sst2_xlmr.model.tokenizer import Tokenizer, load_tokenizer
from sst2_xlmr.model.weights import check_fit, load_tensors
from sst2_xlmr.util.errors import UserError

NO_DROPOUT = Dropouts()


def dropouts_of(config: Config) -> Dropouts:
    """Return the probabilities that a run's options ask for."""
    return Dropouts(hidden=config.dropout, attention=config.dropout, head=config.head_dropout)


class Classifier(nn.Module):
    """XLM-R with RoBERTa's classification head.

    Args:
        table_rows: of the embedding table; None for the whole vocabulary (see compact_vocab).
    """

    def __init__(
        self, shape: EncoderShape, num_labels: int, dropouts: Dropouts = NO_DROPOUT, table_rows: int | None = None
    ) -> None:
        super().__init__()
        self.shape, self.num_labels = shape, num_labels
        layers = [
            Layer(shape.hidden, shape.heads, shape.ffn, shape.layer_norm_eps, dropouts) for _ in range(shape.layers)
        ]
        transformer = Transformer(table_rows or shape.vocab_size, shape.positions, layers, dropouts.hidden)
        self.encoder = nn.ModuleDict({"transformer": transformer})
        self.head = Head(shape.hidden, num_labels, dropouts.head)

    @property
    def transformer(self) -> Transformer:
        transformer = self.encoder["transformer"]
        assert isinstance(transformer, Transformer)
        return transformer

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
            features = self.transformer(tokens, padded)
        return self.head(features)

    def is_encoder_frozen(self) -> bool:
        return not self.transformer.token_embedding.weight.requires_grad


def load_classifier(folder: Path, device: torch.device, bf16: bool) -> tuple[Classifier, Tokenizer, list[str]]:
    """Load a trained model's folder for prediction.

    Returns:
        The classifier in evaluation mode, its tokenizer, and the names of its labels.

    Raises:
        UserError: if the folder is incomplete, has no classification head, weights that are not finite, or another
            model's tokenizer.
    """
    encoder, label_names = find_model(folder)
    model, _ = build_classifier(encoder, label_names)
    if not all(torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in model.parameters()):
        raise UserError(f"{folder} has weights that are not finite (NaN or infinite); train it again, or use another")
    model.requires_grad_(False).eval().to(device, torch.bfloat16 if bf16 else torch.float32)
    tokenizer = load_tokenizer(encoder.tokenizer_file, encoder.max_length)
    check_tokenizer(encoder, tokenizer.vocab_size)
    return model, tokenizer, label_names


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
        table_rows = None if kept_ids is None else len(kept_ids)
        model = Classifier(encoder.shape, len(label_names), dropouts, table_rows)
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
