"""Build the classifier from a pretrained encoder's or a trained model's folder, and read its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sst2_xlmr.model.encoders import Encoder, check_tokenizer, find_model
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.tokenizer import LongTexts, Tokenizer
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.model.weight_files import Weights, reading_weights
from sst2_xlmr.model.weight_names import EMBEDDING_SOURCES, Tensors, from_hugging_face, layer_of
from sst2_xlmr.task import Task, stored_task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import LazyTensor


def load_classifier(folder: Path, device: torch.device, bf16: bool) -> tuple[SequenceClassifier, Tokenizer, Task]:
    """Load a trained model's folder, in evaluation mode.

    UserError if it is incomplete, has no head, weights that are not finite, or another model's tokenizer.
    """
    encoder = find_model(folder)
    task = task_of(encoder)
    model, _ = build_classifier(encoder, task)
    if not all(torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in model.parameters()):
        raise UserError(f"{folder} has weights that are not finite (NaN or infinite); train it again, or use another")
    model.requires_grad_(False).eval().to(device, torch.bfloat16 if bf16 else torch.float32)
    tokenizer = Tokenizer(encoder.tokenizer_file, encoder.max_length, stored_long_texts(encoder))
    check_tokenizer(encoder, tokenizer.vocab_size)
    return model, tokenizer, task


def task_of(encoder: Encoder) -> Task:
    """Return the task, with its thresholds, of what `find_model` has found."""
    return stored_task(encoder.problem_type, encoder.label_names or [], encoder.dropouts.get("thresholds", ()))


def stored_long_texts(encoder: Encoder) -> LongTexts:
    """Return what becomes of long texts, as it is stored with a model."""
    return LongTexts(encoder.dropouts.get("long_texts", "cut"), encoder.dropouts.get("stride", 0))


class _Uninitialized(TorchFunctionMode):
    """Skips the initialization of new modules; on the meta device, which has no values, torch imports SymPy for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def build_classifier(
    encoder: Encoder,
    task: Task,
    dropout: float = 0.0,
    head_dropout: float = 0.0,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
) -> tuple[SequenceClassifier, bool]:
    """Return the classifier with the encoder's weights, in fp32 on the CPU, and whether its head is new.

    The folder's own head is kept if it has the same label names; a new one depends on `seed`. Of the embedding table,
    only the rows of `vocabulary` are read. UserError if the weights do not fit the encoder's configuration.
    """
    ids = None if vocabulary is None or vocabulary.is_whole else vocabulary.ids
    rows = None if ids is None else len(ids)
    with torch.device("meta"), _Uninitialized():
        model = SequenceClassifier(encoder.shape, task.outputs, dropout, head_dropout, rows)
    tensors = load_tensors(encoder, ids)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    head_is_new = (encoder.label_names, encoder.problem_type) != (task.label_names, task.problem_type)
    if head_is_new:  # normal weights of deviation 0.02, as in BERT and RoBERTa, and zero biases but for the task's
        generator = torch.Generator().manual_seed(seed)
        for name in filter(lambda name: name.startswith("head."), shapes):
            tensors[name] = torch.zeros(shapes[name])
            if tensors[name].dim() == 2:
                tensors[name].normal_(0, 0.02, generator=generator)
        if task.initial_bias:
            tensors["head.out.bias"] = torch.tensor(task.initial_bias)
    elif task.folding != (1.0, 0.0):  # it was exported with them
        factor, offset = task.folding
        tensors["head.out.weight"] = tensors["head.out.weight"] / factor
        tensors["head.out.bias"] = (tensors["head.out.bias"] - offset) / factor
    _check_fit(tensors, shapes, encoder.weights_file)
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    if vocabulary is not None:
        model.id_map = vocabulary.id_map()
    return model, head_is_new


def load_tensors(encoder: Encoder, ids: torch.Tensor | None = None) -> Tensors:
    """Read an encoder's weights; returns fp32 tensors under our names, with `head.*` where it has a head.

    `ids`, int64 [rows], are the rows of the embedding table to read; None for all. UserError if the file cannot be
    read, or its table does not have the configured number of rows.
    """
    with reading_weights(encoder.weights_file):
        weights = Weights(encoder.weights_file)
        if ids is not None:
            _find_table(encoder, weights)
        names = [name for name in weights.raw if layer_of(name) < encoder.shape.layers]
        return from_hugging_face(names, lambda name: weights.tensor(name, ids), encoder.is_bert)


def pretrained_table(encoder: Encoder) -> LazyTensor:
    """Return the encoder's embedding table, fp32 [vocab_size, hidden], read a few rows at a time; errors as above."""
    weights = Weights(encoder.weights_file)
    name = _find_table(encoder, weights)
    shape = weights.raw[name].shape
    return LazyTensor(shape, torch.float32, lambda start, stop: weights.read(name, slice(start, stop)))


def _find_table(encoder: Encoder, weights: Weights) -> str:
    """Return the embedding table's name in the file, and check its shape."""
    name = next((name for name in EMBEDDING_SOURCES if name in weights.raw), "")
    expected = torch.Size((encoder.shape.vocab_size, encoder.shape.hidden))
    _check_fit({EMBEDDING: weights.raw[name]} if name else {}, {EMBEDDING: expected}, encoder.weights_file)
    return name


def _check_fit(tensors: Tensors, expected: dict[str, torch.Size], file: Path) -> None:
    """Raise UserError if a tensor is missing, superfluous or of another shape than configured."""
    for name in [*expected, *(name for name in tensors if name.startswith("encoder."))]:
        if name not in tensors:
            problem = f"{name} {list(expected[name])} is missing"
        elif name not in expected:
            problem = f"{name} is not in the configured model"
        elif tensors[name].shape != expected[name]:
            problem = f"{name} has shape {list(tensors[name].shape)}, expected {list(expected[name])}"
        else:
            continue
        raise UserError(f"{file} does not fit its configuration: {problem}; check config.json beside it")
