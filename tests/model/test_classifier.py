"""The forward pass against torchtext's own (transformers': end_to_end/test_model_folders.py), dropout and bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SMALL_ENCODER, needs_small_encoder, random_texts
from reference import torchtext_model

from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import SST2_NAMES, SingleLabel

TASK = SingleLabel(SST2_NAMES)
LENGTHS = torch.tensor([3, 7, 12, 18, 19])
ENCODERS = [pytest.param("tiny"), pytest.param("small", marks=needs_small_encoder)]


def padded(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(ids.split(lengths.tolist()), batch_first=True, padding_value=1)


def classifier(folder: Path) -> SequenceClassifier:
    model, _ = build_classifier(find_encoder(str(folder)), TASK)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.head.parameters():  # a new head's logits are too small to show a difference
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_equals_torchtext(tiny_encoder: Path, name: str) -> None:
    model = classifier(tiny_encoder if name == "tiny" else SMALL_ENCODER)
    reference = torchtext_model(model)
    for lengths in (LENGTHS, torch.tensor([19] * 5)):
        ids = random_texts(lengths, model.shape.vocab_size)
        torch.testing.assert_close(model(*ids), reference(padded(*ids)), atol=1e-5, rtol=0)


def test_dropout_is_where_it_was_asked_for(tiny_encoder: Path) -> None:
    encoder = find_encoder(str(tiny_encoder))
    ids = random_texts(LENGTHS, encoder.shape.vocab_size)
    for dropout, head_dropout in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        model, _ = build_classifier(encoder, TASK, dropout, head_dropout)
        model.train()
        assert torch.equal(model(*ids), model(*ids)) == (dropout == head_dropout == 0.0)


def test_bf16_as_weights_and_under_autocast(tiny_encoder: Path) -> None:
    model = classifier(tiny_encoder)
    ids = random_texts(LENGTHS, model.shape.vocab_size)
    expected = model(*ids)
    model.autocast = True
    torch.testing.assert_close(model(*ids).float(), expected, atol=0.1, rtol=0.1)
    model.train()(*ids).sum().backward()
    assert {each.dtype for p in model.parameters() for each in (p, p.grad) if each is not None} == {torch.float32}
    model.autocast = False
    model.eval().bfloat16()
    torch.testing.assert_close(model(*ids).float(), expected, atol=0.1, rtol=0.1)
    assert model.train()(*ids).dtype == torch.bfloat16
