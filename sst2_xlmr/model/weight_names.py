"""The names of the same weights: ours, torchtext's, and transformers'; one table for each source.

Ours are `encoder.tokens`, `encoder.positions`, `encoder.norm`, `encoder.layers.N.{qkv,out,norm1,up,down,norm2}` and
`head.{dense,out}`, each with `.weight` and most with `.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from sst2_xlmr.util.tensors import Storable

Tensors = dict[str, torch.Tensor]

# Of the downloads, which have an older torchtext's names, and of torchtext 0.18 itself.
_TORCHTEXT = {
    "encoder.transformer.token_embedding": "encoder.tokens",
    "encoder.transformer.positional_embedding.embedding": "encoder.positions",
    "encoder.transformer.embedding_layer_norm": "encoder.norm",
}
_TORCHTEXT_LAYER = {
    "attention.input_projection": "qkv",
    "attention.output_projection": "out",
    "residual_mlp.mlp.0": "up",
    "residual_mlp.mlp.3": "down",
    "attention_layer_norm": "norm1",
    "final_layer_norm": "norm2",
    "self_attn.in_proj": "qkv",
    "self_attn.out_proj": "out",
    "linear1": "up",
    "linear2": "down",
    "norm1": "norm1",
    "norm2": "norm2",
}
_HUGGING_FACE = {
    "embeddings.word_embeddings": "encoder.tokens",
    "embeddings.position_embeddings": "encoder.positions",
    "embeddings.LayerNorm": "encoder.norm",
    "classifier.dense": "head.dense",
    "classifier.out_proj": "head.out",
}
_HUGGING_FACE_LAYER = {
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}
_QKV = ("query", "key", "value")  # transformers has three matrices
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
TABLE_SOURCES = tuple(
    f"{name}.weight"
    for name in (
        "encoder.transformer.token_embedding",
        "roberta.embeddings.word_embeddings",
        "embeddings.word_embeddings",
    )
)


def layer_of(name: str) -> int:
    """Return the number of the encoder's layer that a tensor belongs to, by any of its names; -1 if to no layer."""
    match = re.search(r"\.layers?\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _our_name(name: str, tops: Mapping[str, str], layer: str, inner: Mapping[str, str]) -> str:
    """Return our name for a source's, by its tables; empty if it has none. `layer` is a pattern."""
    match = re.fullmatch(r"(.+)[._](weight|bias)", name)
    if match is None:
        return ""
    stem, kind = match.groups()
    if stem in tops:
        return f"{tops[stem]}.{kind}"
    if (place := re.fullmatch(layer, stem)) and place[2] in inner:
        return f"encoder.layers.{place[1]}.{inner[place[2]]}.{kind}"
    return ""


def from_torchtext(raw: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename the tensors of torchtext's downloads; unknown ones keep their names."""
    layer = r"encoder\.transformer\.layers\.(?:layers\.)?(\d+)\.(.+)"  # once in the downloads, twice since
    return {_our_name(name, _TORCHTEXT, layer, _TORCHTEXT_LAYER) or name: raw[name] for name in raw}


def from_hugging_face(raw: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename and join the tensors of transformers' XLM-R models (with or without the prefix `roberta.`).

    The one token type of XLM-R is added to every position, so it is folded into the position table. Tensors that
    belong to other heads (language model, pooler) are left out, unread.
    """
    result: Tensors = {}
    layer = r"encoder\.layer\.(\d+)\.(.+)"
    token_type = torch.zeros(1, 1)
    for raw_name in raw:
        name = raw_name.removeprefix("roberta.")
        if match := re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.self\.query\.(weight|bias)", name):
            others = [raw_name.replace(".query.", f".{part}.") for part in _QKV]
            parts = [raw[other] for other in others if other in raw]
            result[f"encoder.layers.{match[1]}.qkv.{match[2]}"] = torch.cat(parts)
        elif name == _TOKEN_TYPES:
            token_type = raw[raw_name]
        elif ours := _our_name(name, _HUGGING_FACE, layer, _HUGGING_FACE_LAYER):
            result[ours] = raw[raw_name]
        elif name.startswith("encoder.layer.") and ".attention.self." not in name:
            result[name] = raw[raw_name]  # that belongs to no XLM-R, and is refused
    if "encoder.positions.weight" in result and token_type.any():
        positions = result["encoder.positions.weight"]
        result["encoder.positions.weight"] = torch.cat([positions[:2], positions[2:] + token_type[0]])
    return result


def to_hugging_face(tensors: Mapping[str, Storable]) -> dict[str, Storable]:
    """Return a classifier's tensors under the names of transformers' `XLMRobertaForSequenceClassification`."""
    inner = _inverted(_HUGGING_FACE_LAYER.items())
    tops = _inverted(
        (theirs if theirs.startswith("classifier") else f"roberta.{theirs}", ours)
        for theirs, ours in _HUGGING_FACE.items()
    )
    result: dict[str, Storable] = {}
    for name, tensor in tensors.items():
        pieces: Sequence[Storable] = tensor.chunk(3) if ".qkv." in name else ()
        stem, kind = name.rsplit(".", 1)
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", stem)
        if match and match[2] == "qkv":
            for part, piece in zip(_QKV, pieces):
                result[f"roberta.encoder.layer.{match[1]}.attention.self.{part}.{kind}"] = piece
        elif match:
            result[f"roberta.encoder.layer.{match[1]}.{inner[match[2]]}.{kind}"] = tensor
        else:
            result[f"{tops[stem]}.{kind}"] = tensor
    word = tensors["encoder.tokens.weight"]
    result[f"roberta.{_TOKEN_TYPES}"] = torch.zeros(1, word.shape[1], dtype=word.dtype)
    return result


def _inverted(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names}
