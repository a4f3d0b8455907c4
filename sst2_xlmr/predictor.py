"""A trained model, and its answers to rows of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from sst2_xlmr.backend import accelerate, quantized
from sst2_xlmr.data.rows import Example
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.memory import memory_errors
from sst2_xlmr.util.precision import choose_precision

NO_ANSWER = "?"
T = TypeVar("T")


class Model(NamedTuple):
    """A trained model, ready for prediction.

    Attributes:
        module: gives logits.
        precision: in which it computes: int8, bf16 or fp32.
        device: where it computes.
    """

    module: nn.Module
    tokenizer: Tokenizer
    label_names: list[str]
    precision: str
    device: torch.device


class Answer(NamedTuple):
    """A row, its label or `NO_ANSWER`, and the probabilities of all classes."""

    row: Example
    label: str
    probabilities: list[float]


def load_model(folder: Path, device: torch.device, precision: str) -> Model:
    """Load a trained model's folder.

    Args:
        precision: auto, bf16, fp32 or int8. If this machine cannot compute int8 faster, one line on standard error says
            so, and it is auto.

    Raises:
        UserError: for int8 on CUDA, or if the folder is not a model's.
    """
    if precision == "int8" and device.type != "cpu":
        raise UserError("--precision int8 is for a CPU; take bf16 or fp32, or --device cpu")
    plain = choose_precision("auto" if precision == "int8" else precision, device)
    if precision == "int8":
        loaded = quantized(folder, torch.bfloat16 if plain == "bf16" else torch.float32)
        if loaded:
            return Model(*loaded, precision, device)
        lacks = "int8 needs a CPU with AVX512-VNNI, Linux and GCC"
        print(f"warning: {lacks}: computing in {plain} instead", file=sys.stderr)
    classifier, tokenizer, label_names = load_classifier(folder, device, plain == "bf16")
    module = accelerate(classifier, World.alone(device)).model
    return Model(module, tokenizer, label_names, plain, device)


def answers(
    model: Model, chunks: Iterator[list[Example]], batch_tokens: int, abstain_below: float, reads_ahead: bool
) -> Iterator[list[Answer]]:
    """Yield the answers to every chunk of rows.

    Args:
        batch_tokens: per forward pass.
        abstain_below: the answer to a row is `NO_ANSWER` if its label is less probable than this.
        reads_ahead: whether to read and tokenize the next chunk meanwhile; not from a stream, which may have to be
            waited for.
    """
    tokenized = ((chunk, _ids(model.tokenizer, chunk)) for chunk in chunks)
    for chunk, ids in _one_ahead(tokenized) if reads_ahead else tokenized:
        with memory_errors(f"take a smaller --batch-tokens than {batch_tokens}"):
            probabilities = predict(model.module, ids, batch_tokens, model.device)
        best = zip(chunk, probabilities.argmax(1).tolist(), probabilities.tolist())
        yield [
            Answer(row, model.label_names[label] if of_row[label] >= abstain_below else NO_ANSWER, of_row)
            for row, label, of_row in best
        ]


def _ids(tokenizer: Tokenizer, chunk: list[Example]) -> list[list[int]]:
    pairs = None if chunk[0].pair is None else [row.pair or "" for row in chunk]
    return tokenizer([row.text for row in chunk], pairs)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield all items; the next one is made on a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item
