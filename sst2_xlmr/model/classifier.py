"""Build the classifier from a pretrained encoder or a trained model, and read its weights."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sst2_xlmr.model.encoders import EncoderFolder, check_tokenizer, find_model
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.model.weights import EMBEDDING_SOURCES, Tensors, WeightReader, from_hugging_face, layer_of, weight_errors
from sst2_xlmr.task import Task, stored_task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import LazyTensor


def load_classifier(
    folder: Path, device: torch.device, bf16: bool, convert: Callable[[SequenceClassifier, Task], Any] | None = None
) -> tuple[Any, Tokenizer, Task]:
    """Load a trained model in evaluation mode, a `SequenceClassifier`, or what `convert` makes of it.

    `convert` must copy the weights that it keeps: they may lie in the file. UserError if the folder is unusable.
    """
    encoder = find_model(folder)
    task = task_of(encoder)
    with ThreadPoolExecutor(1) as thread:  # each takes half a second
        tokenizer_loading = thread.submit(Tokenizer, encoder.tokenizer_file, encoder.max_length, encoder.long_texts)
        model, _ = build_classifier(encoder, task, copy_weights=convert is None and not bf16)
        if not all(torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in model.parameters()):
            raise UserError(f"{folder} has weights that are not finite (NaN, infinite); train it again, or use another")
        out = copy.deepcopy(model.head.out)
        model.requires_grad_(False).eval().to(device, torch.bfloat16 if bf16 else torch.float32)
        if bf16 and task.is_output_fp32:
            model.head.out = out.requires_grad_(False).to(device)
            # The layers before it give bf16.
            model.head.out.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        converted = convert(model, task) if convert else model
    tokenizer = tokenizer_loading.result()
    check_tokenizer(encoder, tokenizer.vocab_size)
    return converted, tokenizer, task


def task_of(encoder: EncoderFolder) -> Task:
    """Return the task of a model from `find_model`, with its thresholds."""
    return stored_task(encoder.problem_type, encoder.label_names or [], encoder.thresholds)


class _Uninitialized(TorchFunctionMode):
    """Skips the initialization of new modules: it is useless on the meta device, and makes torch import SymPy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def build_classifier(
    encoder: EncoderFolder,
    task: Task,
    dropout: float = 0.0,
    head_dropout: float = 0.0,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    copy_weights: bool = True,
) -> tuple[SequenceClassifier, bool]:
    """Return the classifier with the encoder's weights, in fp32 on the CPU, and whether its head is new.

    The encoder's own head is kept if its task and label names are the same; a new one is initialized from `seed`. Only
    the embedding rows of `vocabulary` are read. UserError if the weights do not fit the encoder's configuration.
    """
    ids = None if vocabulary is None else vocabulary.ids
    rows = None if ids is None else len(ids)
    with torch.device("meta"), _Uninitialized():
        model = SequenceClassifier(encoder.shape, task.outputs, dropout, head_dropout, rows)
    tensors = load_tensors(encoder, ids, copy_weights)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    head_is_new = (encoder.label_names, encoder.problem_type) != (task.label_names, task.problem_type)
    if head_is_new:  # normal weights with std 0.02, as in BERT and RoBERTa; zero biases, except for the task's
        generator = torch.Generator().manual_seed(seed)
        for name in filter(lambda name: name.startswith("head."), shapes):
            tensors[name] = torch.zeros(shapes[name])
            if tensors[name].dim() == 2:
                tensors[name].normal_(0, 0.02, generator=generator)
        if task.initial_bias:
            tensors["head.out.bias"] = torch.tensor(task.initial_bias)
    elif task.output_scale != (1.0, 0.0):  # the export folded them into the head
        factor, offset = task.output_scale
        tensors["head.out.weight"] = tensors["head.out.weight"] / factor
        tensors["head.out.bias"] = (tensors["head.out.bias"] - offset) / factor
    _check_fit(tensors, shapes, encoder.weights_file)
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    if vocabulary is not None:
        model.id_map = vocabulary.id_map()
    return model, head_is_new


def load_tensors(encoder: EncoderFolder, ids: torch.Tensor | None = None, copy_weights: bool = True) -> Tensors:
    """Read an encoder's weights; returns fp32 tensors under our names, with `head.*` if it has a head.

    `ids`, int64 [rows], are the embedding rows to read; None for all. UserError if the file cannot be used.
    """
    with weight_errors(encoder.weights_file):
        weights = WeightReader(encoder.weights_file, copy_weights)
        if ids is not None:
            _find_table(encoder, weights)
        names = [name for name in weights.raw if layer_of(name) < encoder.shape.layers]
        return from_hugging_face(names, lambda name: weights.tensor(name, ids), encoder.is_bert)


def pretrained_table(encoder: EncoderFolder) -> LazyTensor:
    """Return the encoder's embedding table, fp32 [vocab_size, hidden], read lazily; errors as in `load_tensors`."""
    weights = WeightReader(encoder.weights_file)
    name = _find_table(encoder, weights)
    shape = weights.raw[name].shape
    return LazyTensor(shape, torch.float32, lambda start, stop: weights.read(name, slice(start, stop)))


def _find_table(encoder: EncoderFolder, weights: WeightReader) -> str:
    """Return the name of the embedding table in the file; UserError if it is missing or has another shape."""
    name = next((name for name in EMBEDDING_SOURCES if name in weights.raw), "")
    expected = torch.Size((encoder.shape.vocab_size, encoder.shape.hidden))
    _check_fit({EMBEDDING: weights.raw[name]} if name else {}, {EMBEDDING: expected}, encoder.weights_file)
    return name


def _check_fit(tensors: Tensors, expected: dict[str, torch.Size], file: Path) -> None:
    """Raise UserError if a tensor is missing, unexpected or has another shape than configured."""
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
