"""Build the classifier from a pretrained encoder's or a trained model's folder."""

from __future__ import annotations

from pathlib import Path

import torch

from sst2_xlmr.model.encoders import Encoder, check_tokenizer, find_model
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.tokenizer import LongTexts, Tokenizer, load_tokenizer
from sst2_xlmr.model.vocabulary import Vocabulary
from sst2_xlmr.model.weights import check_fit, load_tensors
from sst2_xlmr.task import Task, stored_task
from sst2_xlmr.util.errors import UserError


def load_classifier(folder: Path, device: torch.device, bf16: bool) -> tuple[SequenceClassifier, Tokenizer, Task]:
    """Load a trained model's folder for prediction; the classifier is in evaluation mode.

    UserError if the folder is incomplete, has no head, weights that are not finite, or another model's tokenizer.
    """
    encoder, label_names = find_model(folder)
    task = stored_task(encoder.problem_type, label_names, encoder.dropouts.get("thresholds", ()))
    model, _ = build_classifier(encoder, task)
    if not all(torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in model.parameters()):
        raise UserError(f"{folder} has weights that are not finite (NaN or infinite); train it again, or use another")
    model.requires_grad_(False).eval().to(device, torch.bfloat16 if bf16 else torch.float32)
    tokenizer = load_tokenizer(encoder.tokenizer_file, encoder.max_length, long_texts_of(encoder))
    check_tokenizer(encoder, tokenizer.vocab_size)
    return model, tokenizer, task


def long_texts_of(encoder: Encoder) -> LongTexts:
    """Return what becomes of long texts, as it is stored with a model."""
    return LongTexts(encoder.dropouts.get("long_texts", "cut"), encoder.dropouts.get("stride", 0))


def build_classifier(
    encoder: Encoder,
    task: Task,
    dropout: float = 0.0,
    head_dropout: float = 0.0,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
) -> tuple[SequenceClassifier, bool]:
    """Return the classifier with the encoder's weights, in fp32 on the CPU, and whether its head is new.

    The head is the encoder folder's own if that has one for the same label names; otherwise it is new. UserError if the
    weights do not fit the encoder's configuration.

    Args:
        seed: of a new head.
        vocabulary: the rows of the embedding table; None for all.
    """
    ids = None if vocabulary is None or vocabulary.is_whole else vocabulary.ids
    with torch.device("meta"):
        rows = None if ids is None else len(ids)
        model = SequenceClassifier(encoder.shape, task.outputs, dropout, head_dropout, rows)
    tensors = load_tensors(encoder, ids)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    head_is_new = (encoder.label_names, encoder.problem_type) != (task.label_names, task.problem_type)
    if head_is_new:
        tensors.update(_new_head(shapes, seed))
    elif task.folding != (1.0, 0.0):  # it was exported with them
        factor, offset = task.folding
        tensors["head.out.weight"] = tensors["head.out.weight"] / factor
        tensors["head.out.bias"] = (tensors["head.out.bias"] - offset) / factor
    check_fit(tensors, shapes, encoder.weights_file)
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    if vocabulary is not None:
        model.id_map = vocabulary.id_map()
    return model, head_is_new


def _new_head(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Return fp32 tensors for a new head: normal weights of deviation 0.02, as in BERT and RoBERTa, and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    head = {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith("head.")}
    for tensor in head.values():
        if tensor.dim() == 2:
            tensor.normal_(0, 0.02, generator=generator)
    return head
