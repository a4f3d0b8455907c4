"""Pretrained weights: names, folds, and what is said of those that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import our_name, torchtext_model
from safetensors.torch import load_file, save_file

from sst2_xlmr.model import weight_files
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import BUNDLE_SHAPES, Encoder, EncoderShape, find_encoder, lowest_layers
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.model.weight_names import from_hugging_face, to_hugging_face
from sst2_xlmr.model.weights import load_tensors, pretrained_table
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import write_tensors

TASK = SingleLabel(["negative", "positive"])
SHAPE = EncoderShape(vocab_size=50, hidden=8, layers=2, heads=2, ffn=16, positions=20)


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def change_settings(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_there_and_back(tmp_path: Path) -> None:
    tensors = dict(SequenceClassifier(SHAPE, 3).named_parameters())
    write_tensors(to_hugging_face(tensors), tmp_path / "x.safetensors")
    written = load_file(tmp_path / "x.safetensors")
    assert same(from_hugging_face(list(written), written.__getitem__), tensors)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["roberta.", ""])
def test_files_with_and_without_prefix(folder: Path, file: str, prefix: str) -> None:
    expected = load_tensors(find_encoder(str(folder)))
    raw = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {name.replace("roberta.", prefix): tensor.half() for name, tensor in raw.items()}
    renamed["lm_head.bias"] = torch.zeros(5)
    renamed["pooler.dense.weight"] = torch.zeros(5)
    if file == "model.safetensors":
        save_file(renamed, folder / file)
    else:
        torch.save(renamed, folder / file)
    found = load_tensors(find_encoder(str(folder)))
    assert found.keys() == expected.keys()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    build_classifier(find_encoder(str(folder)), TASK)


def test_a_head_belongs_to_the_last_layer(model: Path) -> None:
    encoder = find_encoder(str(model))
    assert lowest_layers(encoder, 3) == encoder
    _, head_is_new = build_classifier(lowest_layers(encoder, 2), SingleLabel(["a", "b"]))
    assert head_is_new


@pytest.mark.parametrize("is_bundle", [False, True])
def test_layers_that_are_not_wanted_are_left_out(
    folder: Path, is_bundle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By config.json, or by --layers, also of a downloaded bundle."""
    whole = load_tensors(find_encoder(str(folder)))
    change_settings(folder, num_hidden_layers=2)
    encoder = find_encoder(str(folder))
    if is_bundle:
        monkeypatch.setitem(BUNDLE_SHAPES, "xlmr.base", SHAPE)
        whole = dict(SequenceClassifier(SHAPE, 2).encoder.named_parameters(prefix="encoder"))
        torch.save({name: tensor.data for name, tensor in whole.items()}, tmp_path / "xlmr.pt")
        encoder = lowest_layers(Encoder("xlmr.base", SHAPE, tmp_path / "xlmr.pt", tmp_path / "none"), 1)
    left_out = f".layers.{encoder.shape.layers}."
    assert load_tensors(encoder).keys() == {name for name in whole if left_out not in name}
    build_classifier(encoder, TASK)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_parts_of_the_table_are_those_of_the_whole(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "safetensors":
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    monkeypatch.setattr(weight_files, "_MAPPED_BYTES", 1000)  # so that the file is mapped many times
    monkeypatch.setattr(weight_files, "_ROWS_AT_ONCE", 3)
    encoder = find_encoder(str(folder))
    whole = load_tensors(encoder)
    ids = torch.tensor([0, 1, 2, 3, 9, 40, encoder.shape.vocab_size - 1])
    assert same(load_tensors(encoder, ids), {**whole, EMBEDDING: whole[EMBEDDING][ids]})
    table = pretrained_table(encoder)
    assert table.shape == whole[EMBEDDING].shape
    assert torch.equal(table.rows(0, table.shape[0]), whole[EMBEDDING])
    assert torch.equal(table.rows(5, 9), whole[EMBEDDING][5:9])


def test_weights_do_not_change_with_their_file(folder: Path) -> None:
    tensors = load_tensors(find_encoder(str(folder)))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x11" * ((folder / "model.safetensors").stat().st_size - 5000))
    assert same(tensors, before)


def test_only_those_rows_of_the_table_are_read_that_are_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole table of XLM-R base would be three quarters of a gigabyte, read to be thrown away."""
    whole, _ = build_classifier(find_encoder(str(folder)), TASK)
    read_rows: list[int] = []
    read = weight_files.Weights.read

    def noted(self: weight_files.Weights, name: str, rows: Any) -> torch.Tensor:
        tensor = read(self, name, rows)
        if name == "roberta.embeddings.word_embeddings.weight":
            read_rows.append(len(tensor))
        return tensor

    monkeypatch.setattr(weight_files.Weights, "read", noted)
    encoder, ids = find_encoder(str(folder)), torch.tensor([0, 1, 2, 3, 9, 40])
    compact, _ = build_classifier(encoder, TASK, vocabulary=Vocabulary(ids, encoder.shape.vocab_size))
    assert sum(read_rows) == len(ids)
    expected = whole.state_dict()
    assert same(compact.state_dict(), {**expected, EMBEDDING: expected[EMBEDDING][ids]})
    read_rows.clear()
    table = pretrained_table(encoder)
    assert read_rows == []
    table.rows(3, 5)
    assert read_rows == [2]


def test_token_type_is_folded_into_positions(folder: Path) -> None:
    name = "encoder.positions.weight"
    before = load_tensors(find_encoder(str(folder)))[name]
    change_weights(folder, lambda t: t["roberta.embeddings.token_type_embeddings.weight"].fill_(0.5))
    after = load_tensors(find_encoder(str(folder)))[name]
    torch.testing.assert_close(after[2:], before[2:] + 0.5)
    assert torch.equal(after[:2], before[:2])


def bundle_weights(model: SequenceClassifier) -> dict[str, torch.Tensor]:
    """Return the encoder's weights under the old names that torchtext's downloads have."""
    old_names = {
        "tokens": "token_embedding",
        "positions": "positional_embedding.embedding",
        "norm": "embedding_layer_norm",
        "qkv": "attention.input_projection",
        "out": "attention.output_projection",
        "up": "residual_mlp.mlp.0",
        "down": "residual_mlp.mlp.3",
        "norm1": "attention_layer_norm",
        "norm2": "final_layer_norm",
    }
    old = {}
    for name, tensor in model.encoder.state_dict().items():
        *layer, part, kind = name.split(".")
        old[".".join(["encoder.transformer", *layer, old_names[part], kind])] = tensor
    assert "encoder.transformer.layers.1.attention.input_projection.weight" in old
    return old


def test_bundle_with_torchtexts_old_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path) -> None:
    """torchtext's own loading code takes them to be the same."""
    source = SequenceClassifier(SHAPE, 2)
    torch.save(bundle_weights(source), tmp_path / "tiny.pt")
    monkeypatch.setitem(BUNDLE_SHAPES, "xlmr.base", SHAPE)
    tokenizer_file = tiny_encoder / "sentencepiece.bpe.model"
    monkeypatch.setattr(downloads, "fetch_bundle", lambda *_, **__: (tmp_path / "tiny.pt", tokenizer_file))
    model, head_is_new = build_classifier(find_encoder("xlmr.base"), TASK)
    assert head_is_new
    assert same(model.encoder.state_dict(), source.encoder.state_dict())
    reference = torchtext_model(SequenceClassifier(SHAPE, 2))
    missing = reference.load_state_dict(bundle_weights(source), strict=False).missing_keys
    assert all(name.startswith("head.") for name in missing)
    ours = source.state_dict()
    for name, tensor in reference.encoder.state_dict(prefix="encoder.").items():
        assert torch.equal(ours[our_name(name)], tensor), name


def test_own_head_is_kept_for_the_same_labels_only(model: Path) -> None:
    own = load_file(model / "model.safetensors")["classifier.dense.weight"]
    same, is_new = build_classifier(find_encoder(str(model)), SingleLabel(["a", "b"]))
    assert not is_new
    assert torch.equal(same.head.dense.weight, own)
    of_several = replace(find_encoder(str(model)), problem_type="multi_label_classification")
    assert build_classifier(of_several, SingleLabel(["a", "b"]))[1], "it was trained for another task"
    other, is_new = build_classifier(find_encoder(str(model)), SingleLabel(["b", "a"]))
    assert is_new
    assert not torch.equal(other.head.dense.weight, own)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_hidden_layers": 4}, "layers.3.* is missing"),
        ({"intermediate_size": 128}, r"up.weight has shape \[64, 32\], expected \[128, 32\]"),
        ({"vocab_size": 7}, r"tokens.weight has shape \[\d+, 32\], expected \[7, 32\]"),
        ({"model_type": "camembert"}, "model_type is 'camembert'; only XLM-R"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
    ],
)
def test_what_does_not_fit_the_configuration_is_named(folder: Path, settings: dict[str, Any], says: str) -> None:
    change_settings(folder, **settings)
    with pytest.raises(UserError, match=says):
        build_classifier(find_encoder(str(folder)), TASK)
    if "vocab_size" in settings:
        with pytest.raises(UserError, match=says):
            pretrained_table(find_encoder(str(folder)))
        with pytest.raises(UserError, match=says):
            load_tensors(find_encoder(str(folder)), torch.arange(4))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "cannot read .* as JSON"),
        ("config.json", b"[]", "JSON object"),
        ("model.safetensors", None, "neither model.safetensors nor pytorch_model.bin"),
        ("model.safetensors", b"", "cannot read weights"),
        ("model.safetensors", b"\x00" * 1000, "cannot read weights"),
    ],
)
def test_incomplete_and_damaged_folders_are_named(folder: Path, file: str, content: bytes | None, says: str) -> None:
    """What transformers leaves out, in parts or converted, is told in test_hub.py."""
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_tensors(find_encoder(str(folder)))


@pytest.mark.parametrize("cut", [10, 1000, -10])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_weights_are_named(folder: Path, file: str, cut: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / file)
    (folder / file).write_bytes((folder / file).read_bytes()[:cut])
    with pytest.raises(UserError, match=file):
        load_tensors(find_encoder(str(folder)))


def test_pickles_with_code_are_not_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was_run",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        load_tensors(find_encoder(str(folder)))
    assert not (tmp_path / "was_run").exists()


def test_weights_that_go_away_during_a_run(folder: Path) -> None:
    encoder = find_encoder(str(folder))
    encoder.weights_file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: it no longer exists; put it back"):
        pretrained_table(encoder)
