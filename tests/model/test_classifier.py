"""The forward pass against torchtext's own and transformers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import SMALL_ENCODER, needs_small_encoder, random_texts
from reference import our_name, torchtext_model

from sst2_xlmr.export.folder import write_folder
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


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_equals_transformers(tiny_encoder: Path, tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_encoder if name == "tiny" else SMALL_ENCODER
    model, encoder = classifier(folder), find_encoder(str(folder))
    described = dataclasses.replace(encoder, label_names=["no", "yes"], max_length=64)
    write_folder(tmp_path / "m", dict(model.named_parameters()), described)
    reference = transformers.XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert reference.config.id2label == {0: "no", 1: "yes"}
    ids = random_texts(LENGTHS, model.shape.vocab_size)
    expected = reference(padded(*ids), attention_mask=padded(*ids).ne(1).long()).logits
    torch.testing.assert_close(model(*ids), expected, atol=1e-5, rtol=0)


def test_gradients_equal_torchtexts(tiny_encoder: Path) -> None:
    """In training mode with dropout 0, all parameters get the gradient of torchtext's forward pass."""
    ours = classifier(tiny_encoder)
    theirs = torchtext_model(ours)
    ids = random_texts(LENGTHS, ours.shape.vocab_size)
    ours.train()(*ids).square().sum().backward()
    theirs.train()(padded(*ids)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, other in theirs.named_parameters():
        torch.testing.assert_close(gradients.pop(our_name(name)), other.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert not gradients


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
