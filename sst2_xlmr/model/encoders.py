"""Pretrained encoders: torchtext's XLM-R bundles, and models in Hugging Face layout, in a folder or on the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_json

TOKENIZER_NAME = "sentencepiece.bpe.model"
WEIGHTS_NAMES = ["model.safetensors", "pytorch_model.bin"]
_SIZE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "positions": "max_position_embeddings",
}  # field of EncoderShape -> key of config.json
# Of config.json, kept as they are; `text_pairs` says whether the model was trained on pairs of texts.
DROPOUT_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "text_pairs")


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of an XLM-R encoder; `positions` counts the two rows that are never used (0 and padding)."""

    vocab_size: int = 250_002
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    positions: int = 514
    layer_norm_eps: float = 1e-5


# As in torchtext.models.XLMR_BASE_ENCODER and XLMR_LARGE_ENCODER.
BUNDLE_SHAPES = {"xlmr.base": EncoderShape(), "xlmr.large": EncoderShape(hidden=1024, layers=24, heads=16, ffn=4096)}


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder on disk.

    Attributes:
        name: as the user gave it.
        shape: its sizes; of the weights, layers above shape.layers are not read.
        max_length: longest input in tokens that it was made for, at most shape.positions - 2.
        dropouts: dropout probabilities in the folder's `config.json`, under their names there.
        label_names: the classes of the folder's classification head; None if it has none.
        cut_from: how many layers it had before `lowest_layers`; 0 if it is whole.
    """

    name: str
    shape: EncoderShape
    weights_file: Path
    tokenizer_file: Path
    label_names: list[str] | None = None
    max_length: int = 512
    dropouts: dict[str, Any] = field(default_factory=dict)
    cut_from: int = 0


def lowest_layers(encoder: Encoder, layers: int) -> Encoder:
    """Return the encoder with only its lowest layers; its head, made for the last one's output, is left out too."""
    if layers == encoder.shape.layers:
        return encoder
    shape = replace(encoder.shape, layers=layers)
    return replace(encoder, shape=shape, label_names=None, cut_from=encoder.shape.layers)


def find_encoder(name: str, quiet: bool = False) -> Encoder:
    """Find an encoder by bundle name or Hub id (downloading it once), or folder; a folder wins over a Hub id.

    A UserError if it is none of these, or incomplete, or not an XLM-R model.
    """
    if name in BUNDLE_SHAPES:
        return Encoder(name, BUNDLE_SHAPES[name], *downloads.fetch_bundle(name, quiet=quiet))
    folder = Path(name)
    is_on_hub = not folder.is_dir()
    if is_on_hub and not is_hub_id(name):
        known = f"neither a folder, nor {', '.join(BUNDLE_SHAPES)}, nor owner/name on the Hub"
        raise UserError(f"encoder or model {name}: {known}; check the path")
    if is_on_hub:
        folder = downloads.fetch_folder(name, ["config.json", "tokenizer_config.json"])

    def find(names: list[str], quiet: bool = True) -> Path | None:
        if is_on_hub:
            return downloads.fetch_first(name, folder, names, quiet=quiet)
        return next((folder / file for file in names if (folder / file).is_file()), None)

    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is the folder of a run; give the model in it, {folder / 'model'}")
    if (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is a checkpoint, for --resume; give best or model in the run's folder")
    file, layout = folder / "config.json", "a model's folder in Hugging Face layout is needed"
    if not file.is_file():
        raise UserError(f"{folder} has no config.json; {layout}")
    settings = read_json(file, layout)
    shape, label_names = _shape(settings, file), _label_names(settings, file)
    tokenizer_file = find([TOKENIZER_NAME])
    if tokenizer_file is None:
        converted = " (newer transformers save tokenizer.json only)" if find(["tokenizer.json"]) else ""
        raise UserError(
            f"{folder} has no {TOKENIZER_NAME}{converted}; copy it from the model that this one was trained from,"
            " e.g. FacebookAI/xlm-roberta-base on the Hugging Face Hub"
        )
    weights_file = find(WEIGHTS_NAMES, quiet)
    if weights_file is None:
        if find([f"{file}.index.json" for file in WEIGHTS_NAMES]):
            raise UserError(f"{folder} has its weights in parts; save it again with max_shard_size='100GB'")
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS_NAMES)}; is it a model's folder?")
    longest = shape.positions - 2
    if (folder / "tokenizer_config.json").is_file():
        stated = read_json(folder / "tokenizer_config.json", "copy it again").get("model_max_length")
        longest = min(longest, stated) if isinstance(stated, int) and stated > 2 else longest
    dropouts = {key: settings[key] for key in DROPOUT_KEYS if key in settings}
    return Encoder(name, shape, weights_file, tokenizer_file, label_names, longest, dropouts)


def model_folder(name: str | os.PathLike[str]) -> Path:
    """Return a model's folder: the one that is named, or where a model of the Hub has been fetched to."""
    folder = Path(name)
    is_on_hub = is_hub_id(str(name)) and not folder.is_dir()
    return find_encoder(str(name)).weights_file.parent if is_on_hub else folder


def is_hub_id(name: str) -> bool:
    """Whether a name is owner/name or owner/name@revision; whether there is such a model, only the Hub knows."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@.+)?", name) is not None


def _label_names(settings: dict[str, Any], file: Path) -> list[str] | None:
    """Return the names of the classes 0, 1, ... of the head; None if there is no head."""
    if "SequenceClassification" not in str(settings.get("architectures")):
        return None
    names = settings.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves its defaults out
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{file}: id2label must name the labels 0, 1, ... of the head")
    return [str(names[str(i)]) for i in range(len(names))]


def find_model(folder: Path) -> tuple[Encoder, list[str]]:
    """Find a trained model's folder, which has a classification head; returns its parts and the names of its labels."""
    encoder = None if str(folder) in BUNDLE_SHAPES else find_encoder(str(folder))
    if encoder is None or encoder.label_names is None:
        raise UserError(f"{folder} has no classification head; give a model folder that train.py wrote")
    return encoder, encoder.label_names


def check_tokenizer(encoder: Encoder, vocab_size: int) -> None:
    """Check that there is an embedding for every id of the encoder's tokenizer, all of which are below `vocab_size`."""
    if vocab_size > encoder.shape.vocab_size:
        raise UserError(
            f"{encoder.tokenizer_file} gives ids up to {vocab_size - 1}, but {encoder.name} has"
            f" {encoder.shape.vocab_size} embedding rows; they do not belong to the same model"
        )


def _shape(settings: dict[str, Any], file: Path) -> EncoderShape:
    """Return the sizes of the encoder that `config.json` describes; a UserError if they are wrong, or not XLM-R's."""
    wanted = {"hidden_act": "gelu", "position_embedding_type": "absolute", "pad_token_id": 1}
    for key, value in {"model_type": "xlm-roberta", **wanted}.items():
        if settings.get(key, wanted.get(key)) != value:
            raise UserError(f"{file}: {key} is {settings.get(key)!r}, but only {value!r} (XLM-R) can be trained here")
    sizes: dict[str, Any] = {}
    for size, key in _SIZE_KEYS.items():
        sizes[size] = settings.get(key)
        # Beyond this: a typing error, or an attack on memory.
        largest = 1_000 if size in ("layers", "heads") else 10_000_000
        if type(sizes[size]) is not int or not 1 <= sizes[size] <= largest:
            raise UserError(f"{file}: {key} is {sizes[size]!r}; a number from 1 to {largest:,} is needed")
    if sizes["hidden"] % sizes["heads"]:
        raise UserError(f"{file}: hidden_size {sizes['hidden']} is no multiple of num_attention_heads {sizes['heads']}")
    epsilon = settings.get("layer_norm_eps", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(f"{file}: layer_norm_eps is {epsilon!r}; a number between 0 and 1 is needed")
    return EncoderShape(**sizes, layer_norm_eps=epsilon)
