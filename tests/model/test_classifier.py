"""The forward pass against torchtext's own and transformers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import SMALL_ENCODER, needs_small_encoder
from reference import torchtext_model

from sst2_xlmr.data.rows import SST2_NAMES
from sst2_xlmr.export.folder import write_folder
from sst2_xlmr.model.classifier import Classifier, Dropouts, build_classifier
from sst2_xlmr.model.encoders import find_encoder


def tokens(vocab_size: int, padded: bool = True) -> torch.Tensor:
    """int64 [5, 19]: random ids, rows 3 to 19 tokens long."""
    generator = torch.Generator().manual_seed(0)
    result = torch.randint(4, vocab_size, (5, 19), generator=generator)
    result[:, 0] = 0
    for row, length in enumerate([3, 7, 12, 18, 19] if padded else [19] * 5):
        result[row, length - 1] = 2
        result[row, length:] = 1
    return result


def classifier(folder: Path) -> Classifier:
    model, _ = build_classifier(find_encoder(str(folder)), SST2_NAMES)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.head.parameters():  # a new head's logits are too small to show a difference
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def check_against_torchtext(folder: Path) -> None:
    model = classifier(folder)
    reference = torchtext_model(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    for batch in (tokens(model.shape.vocab_size), tokens(model.shape.vocab_size, padded=False)):
        with torch.no_grad():
            torch.testing.assert_close(model(batch), reference(batch), atol=1e-5, rtol=0)


def check_against_transformers(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, encoder = classifier(folder), find_encoder(str(folder))
    masters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_folder(tmp_path / "m", masters, dataclasses.replace(encoder, label_names=["no", "yes"], max_length=64))
    reference = transformers.XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert reference.config.id2label == {0: "no", 1: "yes"}
    batch = tokens(model.shape.vocab_size)
    with torch.no_grad():
        expected = reference(batch, attention_mask=batch.ne(1).long()).logits
        torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=0)


def test_equals_torchtext_on_random_weights(tiny_encoder: Path) -> None:
    check_against_torchtext(tiny_encoder)


@needs_small_encoder
def test_equals_torchtext_on_real_weights() -> None:
    check_against_torchtext(SMALL_ENCODER)


def test_equals_transformers_on_random_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    check_against_transformers(tiny_encoder, tmp_path)


@needs_small_encoder
def test_equals_transformers_on_real_weights(tmp_path: Path) -> None:
    check_against_transformers(SMALL_ENCODER, tmp_path)


def test_transformers_tokenizer_gives_the_same_ids(tiny_encoder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from sst2_xlmr.model.tokenizer import load_tokenizer

    theirs = transformers.XLMRobertaTokenizer.from_pretrained(tiny_encoder)
    texts = ["A fine film.", "It did not hold me for a minute", "word " * 100]
    ours = load_tokenizer(tiny_encoder / "sentencepiece.bpe.model", 64)(texts)
    assert theirs(texts, truncation=True)["input_ids"] == ours


def test_no_mask_where_no_padding_is_the_same(tiny_encoder: Path) -> None:
    model = classifier(tiny_encoder)
    batch = tokens(model.shape.vocab_size, padded=False)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, padded=False), model(batch, padded=True), atol=1e-6, rtol=0)


def test_gradients_equal_torchtexts(tiny_encoder: Path) -> None:
    """In training mode with dropout 0, all parameters get the gradient of torchtext's forward pass."""
    ours = classifier(tiny_encoder)
    theirs = torchtext_model(ours)
    for model in (ours, theirs):
        model.train()(tokens(ours.shape.vocab_size)).square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_dropout_is_where_it_was_asked_for(tiny_encoder: Path) -> None:
    encoder = find_encoder(str(tiny_encoder))
    batch = tokens(encoder.shape.vocab_size)
    for dropout, head_dropout in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        model, _ = build_classifier(encoder, SST2_NAMES, Dropouts(dropout, dropout, head_dropout))
        model.train()
        assert torch.equal(model(batch), model(batch)) == (dropout == head_dropout == 0.0)


def test_frozen_encoder_has_no_gradient(tiny_encoder: Path) -> None:
    model, _ = build_classifier(find_encoder(str(tiny_encoder)), SST2_NAMES)
    model.train().encoder.requires_grad_(False)
    batch = tokens(model.shape.vocab_size)
    assert torch.equal(model(batch), model(batch))
    model(batch).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if name.startswith("head.")
    }


def test_bf16_runs_in_both_modes(tiny_encoder: Path) -> None:
    model = classifier(tiny_encoder)
    batch = tokens(model.shape.vocab_size)
    expected = model(batch)
    model.bfloat16()
    torch.testing.assert_close(model(batch).float(), expected, atol=0.1, rtol=0.1)
    assert model.train()(batch).dtype == torch.bfloat16
