"""Pretrained encoders: torchtext's XLM-R bundles, and models in Hugging Face layout, local or on the Hub."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sst2_xlmr.model.tokenizer import CUT, LongTexts
from sst2_xlmr.model.tokenizer_files import JSON_NAME, SETTINGS_NAME, checked_settings
from sst2_xlmr.model.weights import head_outputs, weight_shards
from sst2_xlmr.task import SingleLabel, can_predict, problem_type_of
from sst2_xlmr.util import downloads
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.files import read_json

TOKENIZER_NAME = "sentencepiece.bpe.model"
_TOKENIZER_NAMES = [TOKENIZER_NAME, *(f"{name}.model" for name in ("sentencepiece", "spiece", "spm", "tokenizer"))]
_TOKENIZER_NAMES += [f"tokenizer/{TOKENIZER_NAME}", JSON_NAME, f"tokenizer/{JSON_NAME}"]
WEIGHTS_NAMES = ["model.safetensors", "pytorch_model.bin"]
_SETTINGS_NAMES = ["config.json", SETTINGS_NAME, "added_tokens.json", "adapter_config.json"]
# Keys of config.json, in the order of EncoderShape's fields.
SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
SIZES += ["max_position_embeddings"]
# The supported values of other keys, the default first.
_SUPPORTED = {"hidden_act": ("gelu", "gelu_python"), "position_embedding_type": ("absolute",), "pad_token_id": (1,)}
_SUPPORTED |= {"is_decoder": (False,)}
_DROPOUT_KEYS = ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
_LAYOUT = "a model folder in Hugging Face layout is needed"


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of an XLM-R encoder."""

    vocab_size: int = 250_002
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    positions: int = 514  # rows of the position table, including the unused rows 0 and 1
    layer_norm_eps: float = 1e-5


# As in torchtext.models.XLMR_BASE_ENCODER and XLMR_LARGE_ENCODER.
BUNDLE_SHAPES = {"xlmr.base": EncoderShape(), "xlmr.large": EncoderShape(hidden=1024, layers=24, heads=16, ffn=4096)}


@dataclass(frozen=True)
class EncoderFolder:
    """A pretrained encoder's, or a trained model's, files and the settings in its config.json."""

    name: str  # as given by the user
    shape: EncoderShape  # stored layers above shape.layers are not read
    weights_file: Path
    tokenizer_file: Path
    label_names: list[str] | None = None  # of the head's outputs; None without a head
    max_length: int = 512  # longest input in tokens, at most shape.positions - 2
    dropouts: dict[str, float] = field(default_factory=dict)  # by their keys in config.json
    cut_from: int = 0  # number of layers before `lowest_layers`; 0 if it has all of them
    is_bert: bool = False  # BERT's names for weights; positions begin at 0, and the head starts with the pooler
    problem_type: str = SingleLabel.problem_type  # of the head, as in transformers
    text_pairs: bool | None = None  # whether it was trained on pairs of texts; None if unknown
    long_texts: LongTexts = CUT
    thresholds: tuple[float, ...] = ()  # see `MultiLabel`

    @property
    def weights_files(self) -> list[Path]:
        """The weights' file, or its shards."""
        return weight_shards(self.weights_file)


def lowest_layers(encoder: EncoderFolder, layers: int) -> EncoderFolder:
    """Return the encoder with only its lowest layers (0: all), and without its head, which needs the last layer."""
    if layers in (0, encoder.shape.layers):
        return encoder
    shape = replace(encoder.shape, layers=layers)
    return replace(encoder, shape=shape, label_names=None, cut_from=encoder.shape.layers)


def find_encoder(name: str) -> EncoderFolder:
    """Find torchtext's bundle, the folder, or else the model on the Hub of this name; UserError if it is unusable."""
    if name in BUNDLE_SHAPES:
        return EncoderFolder(name, BUNDLE_SHAPES[name], *downloads.fetch_bundle(name))
    folder = Path(name)
    if is_on_hub := not folder.is_dir():
        if not is_hub_id(name):
            known = f"neither a folder, nor {', '.join(BUNDLE_SHAPES)}, nor owner/name on the Hub"
            raise UserError(f"encoder or model {name}: {known}; check the path")
        folder = downloads.fetch_folder(name, [*_SETTINGS_NAMES, *(f"tokenizer/{file}" for file in _SETTINGS_NAMES)])
    elif not (folder / "config.json").exists() and (folder / "0_Transformer" / "config.json").is_file():
        folder = folder / "0_Transformer"  # the layout of sentence-transformers

    def find(names: list[str], quiet: bool = True) -> Path | None:
        found = next((folder / file for file in names if (folder / file).is_file()), None)
        return downloads.fetch_first(name, folder, names, quiet) if is_on_hub and found is None else found

    file = _settings_file(folder)
    settings = read_json(file, _LAYOUT)
    shape = _shape(settings, file)
    tokenizer_file = find(_TOKENIZER_NAMES)
    if tokenizer_file is None:
        bert = " (BERT's vocab.txt is another tokenizer)" if find(["vocab.txt"]) else ""
        fix = "copy one from the model that it was trained from, e.g. FacebookAI/xlm-roberta-base on the Hub"
        raise UserError(f"{folder} has neither {TOKENIZER_NAME} nor {JSON_NAME}{bert}; {fix}")
    stated = checked_settings(tokenizer_file).get("model_max_length")
    weights_file = find([*WEIGHTS_NAMES, *(f"{name}.index.json" for name in WEIGHTS_NAMES)], quiet=False)
    if weights_file is None:
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS_NAMES)}; is it a model folder?")
    for shard in weight_shards(weights_file):
        if find([shard.name], quiet=False) is None:
            raise UserError(f"{folder} has no {shard.name}, which {weights_file.name} names; fetch it again")
    max_length = min(shape.positions - 2, stated if isinstance(stated, int) and stated > 2 else shape.positions)
    is_bert = settings["model_type"] == "bert"
    outputs = head_outputs(weights_file, is_bert)
    return EncoderFolder(
        name,
        shape,
        weights_file,
        tokenizer_file,
        _label_names(settings, outputs, file) if outputs else None,
        max_length,
        dropouts={key: settings[key] for key in _DROPOUT_KEYS if key in settings},
        is_bert=is_bert,
        problem_type=problem_type_of(settings.get("problem_type"), outputs),
        text_pairs=settings.get("text_pairs"),
        long_texts=LongTexts(settings.get("long_texts", "cut"), settings.get("stride", 0)),
        thresholds=tuple(settings.get("thresholds", ())),
    )


def _settings_file(folder: Path) -> Path:
    """Return a model folder's config.json; UserError, saying what kind of folder it is, if it has none."""
    if (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is the folder of a run; give the model in it, {folder / 'model'}")
    if (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is a checkpoint, for --resume; give best or model in the run's folder")
    if (folder / "adapter_config.json").is_file() and not any((folder / name).is_file() for name in WEIGHTS_NAMES):
        raise UserError(f"{folder} is an adapter (LoRA); merge it with merge_and_unload() of peft, and save the model")
    if not (folder / "config.json").is_file():
        inner = sorted(folder.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        fix = f"give the model in it, {inner[-1].parent}" if inner else _LAYOUT
        raise UserError(f"{folder} has no config.json; {fix}")
    return folder / "config.json"


def model_folder(name: str | os.PathLike[str]) -> Path:
    """Return a local model folder, or the local copy of a model on the Hub."""
    folder = Path(name)
    is_on_hub = is_hub_id(str(name)) and not folder.is_dir()
    return find_encoder(str(name)).weights_file.parent if is_on_hub else folder


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name or owner/name@revision."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@.+)?", name) is not None


def _label_names(settings: dict[str, Any], outputs: int, file: Path) -> list[str]:
    names = settings.get("id2label") or {str(index): f"LABEL_{index}" for index in range(outputs)}
    if not isinstance(names, dict) or names.keys() != {str(index) for index in range(outputs)}:
        raise UserError(f"{file}: id2label must name the {outputs} labels of the head, from 0")
    return [str(names[str(index)]) for index in range(outputs)]


def find_model(folder: Path) -> EncoderFolder:
    """Find a trained model's folder; UserError if it has no head, or one for none of the tasks here."""
    encoder = None if str(folder) in BUNDLE_SHAPES else find_encoder(str(folder))
    if encoder is None or encoder.label_names is None:
        raise UserError(f"{folder} has no classification head; give a model folder that train.py wrote")
    if not can_predict(encoder.problem_type, encoder.label_names):
        head = f"a head with {len(encoder.label_names)} outputs for {encoder.problem_type} is not supported"
        raise UserError(f"{folder}: {head}; with --encoder, its body can be fine-tuned")
    return encoder


def check_tokenizer(encoder: EncoderFolder, vocab_size: int) -> None:
    """Raise UserError if the encoder lacks an embedding for an id of its tokenizer, which are below `vocab_size`."""
    if vocab_size > encoder.shape.vocab_size:
        rows = f"{encoder.name} has {encoder.shape.vocab_size} embedding rows; they do not belong to the same model"
        raise UserError(f"{encoder.tokenizer_file} gives ids up to {vocab_size - 1}, but {rows}")


def _shape(settings: dict[str, Any], file: Path) -> EncoderShape:
    """Return the sizes in config.json; UserError if they are invalid, or the model is not an XLM-R."""
    kind = settings.get("model_type")
    if kind not in ("xlm-roberta", "bert"):
        raise UserError(f"{file}: model_type is {kind!r}; only XLM-R (xlm-roberta, or bert with its tokenizer) works")
    for key, values in _SUPPORTED.items():
        if (value := settings.get(key, values[0])) not in values and (kind, key) != ("bert", "pad_token_id"):
            raise UserError(f"{file}: {key} is {value!r}, but only {values[0]!r}, as in XLM-R, is supported")
    if settings.get("quantization_config"):
        raise UserError(f"{file}: the weights are quantized (quantization_config); use the model in fp32 or bf16")
    for key in SIZES:
        size, largest = settings.get(key), 1_000 if key.startswith("num") else 10_000_000
        if type(size) is not int or not 1 <= size <= largest:  # a larger one is a typo, or an attack on memory
            raise UserError(f"{file}: {key} is {size!r}; a number from 1 to {largest:,} is needed")
    vocab_size, hidden, layers, heads, ffn, positions = (settings[key] for key in SIZES)
    if hidden % heads:
        raise UserError(f"{file}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    epsilon = settings.get("layer_norm_eps", 1e-12)  # transformers' default
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(f"{file}: layer_norm_eps is {epsilon!r}; a number between 0 and 1 is needed")
    return EncoderShape(vocab_size, hidden, layers, heads, ffn, positions + 2 * (kind == "bert"), epsilon)
