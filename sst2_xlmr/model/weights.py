"""Weights: their names, and reading them a few at a time from safetensors or torch.save files, possibly sharded.

Ours are `encoder.tokens`, `encoder.positions`, `encoder.norm`, `encoder.layers.N.{qkv,out,norm1,up,down,norm2}` and
`head.{dense,out}`, all with `.weight` and most with `.bias`. In the tables, `#` is a layer index.
"""

import contextlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_errors, read_json
from sst2_xlmr.util.tensors import TensorLike

Tensors = dict[str, torch.Tensor]

_LAYER = "encoder.layers.#"
# Ours -> transformers' after `roberta.`, torchtext's after `roberta.encoder.transformer.`. torchtext's are those in its
# downloads, which an older version wrote; `_xlmr_name` adds the prefix `roberta.`.
_NAMES = {
    "encoder.tokens": ("embeddings.word_embeddings", "token_embedding"),
    "encoder.positions": ("embeddings.position_embeddings", "positional_embedding.embedding"),
    "encoder.norm": ("embeddings.LayerNorm", "embedding_layer_norm"),
    f"{_LAYER}.out": ("encoder.layer.#.attention.output.dense", "layers.#.attention.output_projection"),
    f"{_LAYER}.norm1": ("encoder.layer.#.attention.output.LayerNorm", "layers.#.attention_layer_norm"),
    f"{_LAYER}.up": ("encoder.layer.#.intermediate.dense", "layers.#.residual_mlp.mlp.0"),
    f"{_LAYER}.down": ("encoder.layer.#.output.dense", "layers.#.residual_mlp.mlp.3"),
    f"{_LAYER}.norm2": ("encoder.layer.#.output.LayerNorm", "layers.#.final_layer_norm"),
}
_HUGGING_FACE = {f"roberta.{name}": ours for ours, (name, _) in _NAMES.items()}
_HUGGING_FACE |= {"classifier.dense": "head.dense", "classifier.out_proj": "head.out"}
_TORCHTEXT = {f"roberta.encoder.transformer.{name}": ours for ours, (_, name) in _NAMES.items()}
_TORCHTEXT["roberta.encoder.transformer.layers.#.attention.input_projection"] = f"{_LAYER}.qkv"
_QKV = [f"roberta.encoder.layer.#.attention.self.{part}" for part in ("query", "key", "value")]  # our `qkv`
_POSITIONS = "encoder.positions.weight"
_TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"
EMBEDDING_SOURCES = ["encoder.transformer.token_embedding.weight"]
EMBEDDING_SOURCES += [f"{prefix}embeddings.word_embeddings.weight" for prefix in ("roberta.", "bert.", "")]
_ROWS_AT_ONCE = 512
_MAPPED_BYTES = 1 << 26
_FAULT_BYTES = 1 << 16  # mapped by Linux per page fault


def layer_of(name: str) -> int:
    """Return the index of the encoder layer in a tensor's name (ours or another), -1 if it belongs to none."""
    match = re.search(r"\.layers?\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _split(name: str) -> tuple[str, str, str]:
    """Split a tensor's name into the stem, with `#` for the layer index, the index, and `weight` or `bias`."""
    match = re.fullmatch(r"(.+)[._](weight|bias)", name)
    stem, kind = match.groups() if match else (name, "")
    return re.sub(r"(\.layers?\.)\d+\.", r"\1#.", stem), str(layer_of(name)), kind


def _xlmr_name(name: str, is_bert: bool) -> str:
    """Return a tensor's name in transformers' `XLMRobertaForSequenceClassification`."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if is_bert:  # its head (pooler, tanh, classifier) is the same under other names
        name = name.removeprefix("bert.")
        name = re.sub(r"^classifier\.(weight|bias)$", r"classifier.out_proj.\1", name)
        name = name.replace("pooler.dense.", "classifier.dense.")
    return name if name.startswith(("roberta.", "classifier.")) else f"roberta.{name}"


def head_outputs(file: Path, is_bert: bool) -> int:
    """Return the number of the head's outputs, 0 without a head; UserError for the weights of a wrapper."""
    shapes = {}
    for name, tensor in WeightReader(file).raw.items():
        prefix, table, _ = name.partition("embeddings.word_embeddings.weight")
        if table and name not in EMBEDDING_SOURCES:
            fix = "so it is a wrapper or another model; save the model inside the wrapper with save_pretrained()"
            raise UserError(f"{file}: its tensors are named {prefix}..., {fix}")
        shapes[_xlmr_name(name, is_bert)] = tensor.shape
    has_head = "classifier.dense.weight" in shapes
    return next(iter(shapes.get("classifier.out_proj.weight", ())), 0) if has_head else 0


def from_hugging_face(names: Sequence[str], read: Callable[[str], torch.Tensor], is_bert: bool = False) -> Tensors:
    """Read tensors with the names of transformers (with or without `roberta.`) or torchtext, and convert them to ours.

    The only token type is added to the position table, which starts with two rows that XLM-R never uses and BERT lacks.
    Tensors of other heads are not read; unknown ones of the encoder keep their names.
    """
    result: Tensors = {}
    ours, token_type = {**_TORCHTEXT, **_HUGGING_FACE}, torch.zeros(1, 1)
    for raw_name in names:
        name = _xlmr_name(raw_name, is_bert)
        stem, layer, kind = _split(name)
        if stem in ours:
            result[f"{ours[stem].replace('#', layer)}.{kind}"] = read(raw_name)
        elif stem == _QKV[0]:
            raw_names = [raw_name.replace(".query.", f".{part.rsplit('.', 1)[1]}.") for part in _QKV]
            result[f"encoder.layers.{layer}.qkv.{kind}"] = torch.cat([read(raw) for raw in raw_names if raw in names])
        elif name == _TOKEN_TYPES:
            token_type = read(raw_name)
        elif stem.startswith("roberta.encoder.") and stem not in _QKV:
            result[name.removeprefix("roberta.")] = read(raw_name)
    if (positions := result.get(_POSITIONS)) is not None and (is_bert or token_type.any()):
        unused = torch.zeros(2, positions.shape[1]) if is_bert else positions[:2]
        used = positions if is_bert else positions[2:]
        result[_POSITIONS] = torch.cat([unused, used + token_type[0]])
    return result


def to_hugging_face(tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
    """Return a classifier's tensors under the names of transformers' `XLMRobertaForSequenceClassification`."""
    theirs = {ours: name for name, ours in _HUGGING_FACE.items()}
    result: dict[str, TensorLike] = {}
    for name, tensor in tensors.items():
        stem, layer, kind = _split(name)
        is_joined = stem == f"{_LAYER}.qkv"
        parts: Sequence[TensorLike] = tensor.chunk(3) if is_joined else [tensor]
        for new, part in zip(_QKV if is_joined else [theirs[stem]], parts):
            result[f"{new.replace('#', layer)}.{kind}"] = part
    word = tensors["encoder.tokens.weight"]
    result[_TOKEN_TYPES] = torch.zeros(1, word.shape[1], dtype=word.dtype)
    return result


def weight_errors(file: Path) -> contextlib.AbstractContextManager[None]:
    return read_errors(f"weights from {file}", "fetch the file again, or convert it to model.safetensors")


def _is_plain_zip(file: Path) -> bool:
    """Whether a torch.save file is a zip file, not a bare pickle; UserError for tar files and TorchScript."""
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"  # torch's own test
    if is_zip:
        with zipfile.ZipFile(file) as zipped:
            is_unsafe = any(Path(name).name == "constants.pkl" for name in zipped.namelist())
    else:
        is_unsafe = tarfile.is_tarfile(file)
    if is_unsafe:  # even with torch.load's `weights_only` (CVE-2025-32434)
        raise UserError(f"{file} is TorchScript or a tar file, which may run code; convert it to model.safetensors")
    return is_zip


def weight_shards(file: Path) -> list[Path]:
    """Return the shards listed in an index file, or the file itself."""
    if not file.name.endswith(".index.json"):
        return [file]
    with weight_errors(file):
        names = read_json(file, "copy it again").get("weight_map", {}).values()
        return [file.with_name(Path(name).name) for name in sorted(set(names))]


class WeightReader:
    """The floating-point tensors of a file or of its shards, read on demand as fp32.

    Files are memory-mapped. Pages that have been read count as the process's memory until the mapping is closed, so
    files are mapped anew after every 64 MiB read. Tensors are copied, because a mapping would change with the file;
    without `copy_weights`, the caller copies what it keeps. Only torch's old format, a bare pickle, cannot be mapped
    and is loaded whole.
    """

    def __init__(self, file: Path, copy_weights: bool = True) -> None:
        self._file, self._files, self._copy_weights = file, weight_shards(file), copy_weights
        with weight_errors(file):
            self._is_mapped = all(shard.suffix == ".safetensors" or _is_plain_zip(shard) for shard in self._files)
            self._map()

    def _map(self) -> None:
        raw: dict[str, Any] = {}
        for file in self._files:
            if file.suffix == ".safetensors":
                tensors = load_file(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=self._is_mapped)
                if not isinstance(tensors, dict) or isinstance(tensors.get("state_dict"), dict):
                    raise UserError(f"{file} is not a state_dict(); save only that, with transformers' names")
            raw.update(tensors)
        self.raw = {name: raw[name] for name in raw if torch.is_tensor(raw[name]) and raw[name].is_floating_point()}
        self._read_bytes = 0

    def tensor(self, name: str, ids: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor; only the rows `ids`, int64 [rows], if it is the embedding table and they are given."""
        if ids is None or name not in EMBEDDING_SOURCES:
            return self.read(name, ...)
        return torch.cat([self.read(name, chunk) for chunk in ids.split(_ROWS_AT_ONCE)])

    def read(self, name: str, rows: Any) -> torch.Tensor:
        """Return `tensor[rows]`."""
        with weight_errors(self._file):
            result = self.raw[name][rows].to(torch.float32, copy=self._is_mapped and self._copy_weights)
            scattered = len(rows) * _FAULT_BYTES if isinstance(rows, torch.Tensor) else 0
            self._read_bytes += max(result.nbytes, scattered)
            if self._is_mapped and self._read_bytes > _MAPPED_BYTES:
                self._map()
            return result
