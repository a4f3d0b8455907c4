"""The names of the same weights in torchtext 0.18, in torchtext's downloads, and in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from sst2_xlmr.util.files import Storable

Tensors = dict[str, torch.Tensor]

_BUNDLE_NAMES = {
    "attention.input_projection": "self_attn.in_proj",
    "attention.output_projection": "self_attn.out_proj",
    "residual_mlp.mlp.0": "linear1",
    "residual_mlp.mlp.3": "linear2",
    "attention_layer_norm": "norm1",
    "final_layer_norm": "norm2",
}
_HF_NAMES = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
_HF_EMBEDDINGS = {
    "embeddings.word_embeddings": "token_embedding",
    "embeddings.position_embeddings": "positional_embedding.embedding",
    "embeddings.LayerNorm": "embedding_layer_norm",
}
_HF_HEAD = {"classifier.dense": "head.dense", "classifier.out_proj": "head.out_proj"}


def layer_of(name: str) -> int | None:
    """Return the number of the encoder's layer that a tensor belongs to, by any of its names; None if to no layer."""
    match = re.search(r"\.layers?\.(\d+)\.", name)
    return int(match[1]) if match else None


def from_bundle(raw: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename the tensors of torchtext's downloads, which have an older torchtext's names."""
    renamed = {}
    for old_name in raw:
        name = old_name
        match = re.fullmatch(r"encoder\.transformer\.layers\.(\d+)\.(.+)\.?(weight|bias)", name)
        if match:
            inner = match[2].rstrip("._")
            new = _BUNDLE_NAMES.get(inner)
            joint = "_" if new == "self_attn.in_proj" else "."
            name = f"encoder.transformer.layers.layers.{match[1]}.{new}{joint}{match[3]}" if new else name
        renamed[name] = raw[old_name]
    return renamed


def from_hugging_face(raw: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename and join the tensors of transformers' XLM-R models (with or without the prefix `roberta.`).

    The one token type of XLM-R is added to every position, so it is folded into the position table. Tensors that
    belong to other heads (language model, pooler) are left out, unread.
    """
    result: Tensors = {}
    joined: dict[str, dict[str, str]] = {}
    token_type = torch.zeros(1, 1)
    for raw_name in raw:
        name = raw_name[8:] if raw_name.startswith("roberta.") else raw_name
        stem, kind = name.rsplit(".", 1) if "." in name else (name, "")
        if stem in _HF_EMBEDDINGS:
            result[f"encoder.transformer.{_HF_EMBEDDINGS[stem]}.{kind}"] = raw[raw_name]
        elif stem in _HF_HEAD:
            result[f"{_HF_HEAD[stem]}.{kind}"] = raw[raw_name]
        elif name == "embeddings.token_type_embeddings.weight":
            token_type = raw[raw_name]
        elif match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem):
            layer = f"encoder.transformer.layers.layers.{match[1]}."
            if part := re.fullmatch(r"attention\.self\.(query|key|value)", match[2]):
                joined.setdefault(f"{layer}self_attn.in_proj_{kind}", {})[part[1]] = raw_name
            else:
                result[f"{layer}{_HF_NAMES.get(match[2], match[2])}.{kind}"] = raw[raw_name]
    for name, parts in joined.items():
        result[name] = torch.cat([raw[parts[part]] for part in ("query", "key", "value") if part in parts])
    positions = "encoder.transformer.positional_embedding.embedding.weight"
    if positions in result and token_type.any():
        folded = result[positions] + token_type[0]
        folded[:2] = result[positions][:2]
        result[positions] = folded
    return result


def to_hugging_face(tensors: Mapping[str, Storable]) -> dict[str, Storable]:
    """Return the tensors of a classifier under the names of transformers' `XLMRobertaForSequenceClassification`."""
    names = {f"encoder.transformer.{ours}": f"roberta.{theirs}" for theirs, ours in _HF_EMBEDDINGS.items()}
    names.update({ours: theirs for theirs, ours in _HF_HEAD.items()})
    inner = {ours: theirs for theirs, ours in _HF_NAMES.items()}
    result: dict[str, Storable] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"encoder\.transformer\.layers\.layers\.(\d+)\.(.+)[._](weight|bias)", name)
        if match and match[2] == "self_attn.in_proj":
            pieces: Sequence[Storable] = tensor.chunk(3)
            for part, piece in zip(("query", "key", "value"), pieces):
                result[f"roberta.encoder.layer.{match[1]}.attention.self.{part}.{match[3]}"] = piece
        elif match:
            result[f"roberta.encoder.layer.{match[1]}.{inner[match[2]]}.{match[3]}"] = tensor
        else:
            stem, kind = name.rsplit(".", 1)
            result[f"{names[stem]}.{kind}"] = tensor
    word = result["roberta.embeddings.word_embeddings.weight"]
    result["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, word.shape[1], dtype=word.dtype)
    return result
