"""Pretrained weights: names, layers, rows, the compact table; the forward pass against torchtext's (see faults/)."""

import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    SMALL_ENCODER,
    SST2_NAMES,
    Patch,
    RunTrain,
    assert_equal,
    change_json,
    losses,
    metrics,
    needs_small_encoder,
    random_texts,
    refusal,
)
from safetensors.torch import load_file, save_file
from torch import nn

from sst2_xlmr.model import weights
from sst2_xlmr.model.classifier import build_classifier, load_tensors, pretrained_table
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, EncoderShape, find_encoder, lowest_layers
from sst2_xlmr.model.roberta import PAD_ID, SequenceClassifier
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util import downloads, versions
from sst2_xlmr.util.tensors import LazyTensor

WORDS = "roberta.embeddings.word_embeddings.weight"
SHAPE = EncoderShape(vocab_size=50, hidden=8, layers=2, heads=2, ffn=16, positions=20)


def our_name(theirs: str) -> str:
    names = {
        "encoder.transformer.layers.layers.": "encoder.layers.",
        "encoder.transformer.token_embedding.": "encoder.tokens.",
        "encoder.transformer.positional_embedding.embedding.": "encoder.positions.",
        "encoder.transformer.embedding_layer_norm.": "encoder.norm.",
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "head.out_proj": "head.out",
    }
    for old, new in names.items():
        theirs = theirs.replace(old, new)
    return theirs


def torchtext_model(classifier: SequenceClassifier) -> nn.Module:
    """Return the same model in torchtext's modules, with copies of the weights, in evaluation mode; no dropout."""
    if not versions.has_torchtext():
        pytest.skip(f"this is {versions.versions()}")
    from torchtext.models import RobertaClassificationHead, RobertaEncoderConf, RobertaModel

    shape = classifier.shape
    sizes = {"vocab_size": shape.vocab_size, "embedding_dim": shape.hidden, "ffn_dimension": shape.ffn}
    sizes.update(padding_idx=PAD_ID, max_seq_len=shape.positions, num_attention_heads=shape.heads)
    conf = RobertaEncoderConf(**sizes, num_encoder_layers=shape.layers, dropout=0.0)
    head = RobertaClassificationHead(classifier.head.out.out_features, shape.hidden, dropout=0.0, activation=nn.Tanh)
    model = RobertaModel(conf, head)
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = shape.layer_norm_eps
    ours = classifier.state_dict()
    model.load_state_dict({name: ours[our_name(name)] for name in model.state_dict()})
    return model.eval()


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_only_the_wanted_rows_of_the_table_are_read(folder: Path, kind: str, monkeypatch: Patch) -> None:
    """The whole table of XLM-R base would be three quarters of a gigabyte, read to be thrown away."""
    if kind != "safetensors":
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 1000)  # so that the file is mapped many times
    monkeypatch.setattr(weights, "_ROWS_AT_ONCE", 3)
    encoder = find_encoder(str(folder))
    whole = load_tensors(encoder)
    read_rows: list[int] = []
    read = weights.WeightReader.read

    def noted(self: weights.WeightReader, name: str, rows: Any) -> torch.Tensor:
        tensor = read(self, name, rows)
        read_rows.extend([len(tensor)] if "word_embeddings" in name else [])
        return tensor

    monkeypatch.setattr(weights.WeightReader, "read", noted)
    ids = torch.tensor([0, 1, 2, 3, 9, 40, encoder.shape.vocab_size - 1])
    assert_equal(load_tensors(encoder, ids), {**whole, EMBEDDING: whole[EMBEDDING][ids]})
    table = pretrained_table(encoder)
    assert read_rows == [3, 3, 1]
    assert torch.equal(table[:], whole[EMBEDDING])
    assert torch.equal(table[5:9], whole[EMBEDDING][5:9])
    assert read_rows[3:] == [len(whole[EMBEDDING]), 4]


def bundle_weights(model: SequenceClassifier) -> dict[str, torch.Tensor]:
    """Return the encoder's weights under the old names that torchtext's downloads have."""
    theirs = {ours: name.removeprefix("roberta.") for name, ours in weights._TORCHTEXT.items()}
    old = {}
    for name, tensor in model.encoder.state_dict(prefix="encoder.").items():
        stem, layer, kind = weights._split(name)
        old[f"{theirs[stem].replace('#', layer)}.{kind}"] = tensor
    return old


def test_bundle_with_torchtexts_old_names(tmp_path: Path, monkeypatch: Patch, tiny_encoder: Path) -> None:
    source = SequenceClassifier(SHAPE, 2)
    torch.save(bundle_weights(source), tmp_path / "tiny.pt")
    monkeypatch.setitem(BUNDLE_SHAPES, "xlmr.base", SHAPE)
    tokenizer_file = tiny_encoder / "sentencepiece.bpe.model"
    monkeypatch.setattr(downloads, "fetch_bundle", lambda *_, **__: (tmp_path / "tiny.pt", tokenizer_file))
    model, head_is_new = build_classifier(find_encoder("xlmr.base"), SingleLabel(["a", "b"]))
    assert head_is_new
    assert_equal(model.encoder.state_dict(), source.encoder.state_dict())
    reference = torchtext_model(SequenceClassifier(SHAPE, 2))
    missing = reference.load_state_dict(bundle_weights(source), strict=False).missing_keys
    assert all(name.startswith("head.") for name in missing)
    ours = source.state_dict()
    for name, tensor in reference.encoder.state_dict(prefix="encoder.").items():
        assert torch.equal(ours[our_name(name)], tensor), name


def test_own_head_is_kept_for_the_same_labels_task_and_last_layer_only(model: Path) -> None:
    own, encoder = load_file(model / "model.safetensors")["classifier.dense.weight"], find_encoder(str(model))
    assert lowest_layers(encoder, 3) == encoder
    of_several = replace(encoder, problem_type="multi_label_classification")
    for each, labels, is_own in ((encoder, "ab", True), (encoder, "ba", False), (of_several, "ab", False)):
        found, is_new = build_classifier(each, SingleLabel([*labels]))
        assert (torch.equal(found.head.dense.weight, own), is_new) == (is_own, not is_own)
    assert build_classifier(lowest_layers(encoder, 2), SingleLabel(["a", "b"]))[1]


def test_names_without_prefix_and_a_table_of_another_size(folder: Path) -> None:
    expected = load_tensors(find_encoder(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("roberta.", ""): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert_equal(load_tensors(find_encoder(str(folder))), expected)
    change_json(folder / "config.json", vocab_size=7)
    for read in (pretrained_table, functools.partial(load_tensors, ids=torch.arange(4))):
        assert ", 32], expected [7, 32]" in refusal(read, find_encoder(str(folder)))


def test_expand_decays_what_was_not_trained() -> None:
    table, rows = torch.arange(12.0).view(6, 2), torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    before = LazyTensor((6, 2), table.dtype, lambda start, stop: table[start:stop])
    vocabulary = Vocabulary(torch.tensor([0, 4]), 6, unused_rows_factor=0.5)
    expected = [[-1, -1], [1, 1.5], [2, 2.5], [3, 3.5], [-2, -2], [5, 5.5]]
    for after in (rows, LazyTensor((2, 2), rows.dtype, lambda start, stop: rows[start:stop])):
        expanded = vocabulary.expand(before, after)
        for start, stop in itertools.combinations(range(7), 2):
            assert expanded.rows(start, stop).tolist() == expected[start:stop]


@pytest.mark.parametrize("max_norm", [0, 0.05])
@pytest.mark.parametrize("how", ["--compile", "--no-compile"])
def test_equals_whole_table(
    run_train: RunTrain, tiny_encoder: Path, tmp_path: Path, monkeypatch: Patch, how: str, max_norm: float
) -> None:
    """To the bit, but for rows that only decay; with clipping, whose norm is summed in another order, within 1e-6."""
    options = [how, "--max-steps", 20, "--max-grad-norm", max_norm, "--weight-decay", 0.1]
    compact = run_train(tmp_path / "a", *options)
    monkeypatch.setattr("sst2_xlmr.run.used_vocabulary", lambda _, size: Vocabulary(torch.arange(size), size))
    whole = run_train(tmp_path / "b", *options)
    assert losses(compact) == (pytest.approx(losses(whole), rel=1e-6) if max_norm else losses(whole))
    assert min(line["grad_norm"] for line in metrics(compact) if "split" not in line) > max_norm, "all are clipped"
    kept = load_file(next((compact / "checkpoints").glob("step-*")) / "vocabulary.safetensors")["ids"]
    folders = (compact / "model", whole / "model", tiny_encoder)
    ours, theirs, before = (load_file(folder / "model.safetensors") for folder in folders)
    is_untouched = torch.ones(len(before[WORDS]), dtype=torch.bool)
    is_untouched[kept] = False
    assert int(is_untouched.sum()) > 100 and len(kept) > 4
    assert float((ours[WORDS] - before[WORDS])[is_untouched].abs().max()) > 1e-4, "decay would be missed"
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6 if max_norm else 1e-7, rtol=0 if max_norm else 1e-5)
        rows = kept if name == WORDS else ...
        assert max_norm or torch.equal(ours[name][rows], tensor[rows]), name


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
