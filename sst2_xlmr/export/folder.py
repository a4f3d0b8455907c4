"""Write a trained classifier as a folder in Hugging Face layout, which `transformers` and this project open."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable

import torch

from sst2_xlmr.data.prepare import Prepared
from sst2_xlmr.export.model_card import card_text, last_evaluations
from sst2_xlmr.export.tokenizer_json import tokenizer_json
from sst2_xlmr.model.classifier import dropouts_of
from sst2_xlmr.model.encoders import INT8_NAME, TOKENIZER_NAME, Encoder, EncoderShape
from sst2_xlmr.model.quantized import quantize_weights
from sst2_xlmr.model.vocabulary import TABLE_NAME, expand_table
from sst2_xlmr.model.weight_names import to_hugging_face
from sst2_xlmr.model.weights import SCALE_SUFFIX, pretrained_table
from sst2_xlmr.training.checkpoint import RunState
from sst2_xlmr.util.files import Deferred, Finisher, Storable, disk_errors, replace_folder, sync_files, write_tensors

CARD_NAME = "README.md"
IN_8_BITS = "The encoder's matrices are stored in 8 bits."


@dataclass(frozen=True)
class Description:
    """What a model's folder says of it besides its weights.

    Attributes:
        label_names: of the classes 0, 1, ...
        max_length: longest input in tokens.
        tokenizer_file: its SentencePiece model.
        dropouts: the probabilities that it was trained with, under the names of `config.json`.
        card: what `README.md` says (see model_card); none is written if it is empty.
    """

    shape: EncoderShape
    label_names: list[str]
    max_length: int
    tokenizer_file: Path
    dropouts: dict[str, Any] = field(default_factory=dict)
    card: str = ""


def description_of(encoder: Encoder) -> Description:
    """Return the description of a model's folder that is there, with its card; `encoder` has label names.

    The card says no more that the weights are in 8 bits: whoever writes them again knows in what.
    """
    assert encoder.label_names is not None
    card = Path(encoder.name, CARD_NAME)
    return Description(
        encoder.shape,
        encoder.label_names,
        encoder.max_length,
        encoder.tokenizer_file,
        encoder.dropouts,
        _without_note(card.read_text(encoding="utf-8", errors="replace"), IN_8_BITS) if card.is_file() else "",
    )


def with_note(described: Description, note: str, former: str = "") -> Description:
    """Return the description with a line more at the end of its card, if it has one.

    Args:
        former: how a line begins that the new one replaces.
    """
    if not described.card:
        return described
    card = _without_note(described.card, former) if former else described.card
    return replace(described, card=f"{card.rstrip()}\n\n{note}\n")


def _without_note(card: str, begin: str) -> str:
    return re.sub(rf"\n*^{re.escape(begin)}.*$", "", card, flags=re.MULTILINE)


def _settings(described: Description, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    shape, names = described.shape, described.label_names
    return {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
        "layer_norm_eps": shape.layer_norm_eps,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        **described.dropouts,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "torch_dtype": dtype,
    }


def export_hugging_face(
    folder: Path,
    masters: Mapping[str, Storable],
    described: Description,
    finish: Callable[[Callable[[], None]], None] = lambda work: work(),
    int8: bool = False,
) -> None:
    """Write `config.json`, `model.safetensors`, the tokenizer's files and the model card; atomically.

    Args:
        folder: where; is replaced if it is there.
        masters: weights under the classifier's names, all fp32 or all bf16; those that are deferred are never in memory
            whole.
        finish: does what remains after the weights were read and written, at once or later (see `files.Finisher`).
        int8: whether to write matrices in 8 bits (see `in_8_bits`), into a file that transformers does not take for a
            model's weights.

    Raises:
        UserError: if it cannot be written.
    """
    settings = _settings(described, str(next(iter(masters.values())).dtype).removeprefix("torch."))
    tokenizer = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": described.max_length}
    unfinished = folder.with_name(folder.name + ".tmp")

    def put_in_place() -> None:
        with disk_errors(f"the model to {folder}", unfinished):
            sync_files(unfinished)
            replace_folder(unfinished, folder)

    with disk_errors(f"the model to {folder}", unfinished):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, content in (("config.json", settings), ("tokenizer_config.json", tokenizer)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        shutil.copyfile(described.tokenizer_file, unfinished / TOKENIZER_NAME)
        if converted := tokenizer_json(described.tokenizer_file):
            (unfinished / "tokenizer.json").write_bytes(converted)
        if described.card:
            (unfinished / CARD_NAME).write_text(described.card, encoding="utf-8")
        tensors = to_hugging_face(masters)
        write_tensors(
            in_8_bits(tensors) if int8 else tensors, unfinished / (INT8_NAME if int8 else "model.safetensors")
        )
    finish(put_in_place)


def in_8_bits(tensors: Mapping[str, Storable]) -> dict[str, Storable]:
    """Return the weights with the matrices of embeddings and layers as int8, each with its scales beside it.

    Args:
        tensors: under transformers' names, fp32 and in memory; position table, norms, biases and head stay as they are.
    """
    result: dict[str, Storable] = {}
    for name, tensor in tensors.items():
        is_layer = name.startswith("roberta.encoder.layer.") and len(tensor.shape) == 2
        if is_layer or name == "roberta.embeddings.word_embeddings.weight":
            assert isinstance(tensor, torch.Tensor)
            result[name], result[name + SCALE_SUFFIX] = quantize_weights(tensor)
        else:
            result[name] = tensor
    return result


def with_temperature(masters: Mapping[str, Storable], temperature: float) -> dict[str, Storable]:
    """Return the weights with the head's last layer divided by a temperature (see evaluation/calibration)."""

    def divided(tensor: Storable) -> Storable:
        if isinstance(tensor, torch.Tensor):
            return tensor / temperature
        rows = tensor.rows
        return Deferred(tensor.shape, tensor.dtype, lambda start, stop: rows(start, stop) / temperature)

    names = ("head.out_proj.weight", "head.out_proj.bias")
    return {**masters, **{name: divided(masters[name]) for name in names}}


def export_run(folder: Path, inputs: Prepared, state: RunState, finisher: Finisher) -> None:
    """Write a run's weights as they are now, with the whole vocabulary and a model card; on rank 0.

    Args:
        folder: in the run's folder; gets its name once `finisher` has come to it.
    """
    finisher.wait()  # an export to the same folder may not have its name yet
    dropouts = dropouts_of(inputs.config)  # also of a frozen encoder, which had none: for training it further
    config, encoder, step = inputs.config, inputs.encoder, state.progress.step
    masters: dict[str, Storable] = {**state.optimizer.masters()}
    if not config.full_vocabulary:
        rows = state.optimizer.masters()[TABLE_NAME]
        pretrained, decay = pretrained_table(encoder), state.optimizer.table_decay
        masters[TABLE_NAME] = expand_table(pretrained, state.kept_ids, rows, decay)
    if state.progress.calibration:
        masters = with_temperature(masters, state.progress.calibration[0])
    row_counts = {split: len(cache) for split, cache in inputs.caches.items()}
    row_counts["train"] = len(inputs.train_labels)
    evaluations = last_evaluations(folder.parent / "metrics.jsonl", step)
    described = Description(
        encoder.shape,
        config.classes,
        config.max_length,
        encoder.tokenizer_file,
        {
            "hidden_dropout_prob": dropouts.hidden,
            "attention_probs_dropout_prob": dropouts.attention,
            "classifier_dropout": dropouts.head,
        },
        card_text(config, config.classes, row_counts, evaluations, state.progress, is_chosen=folder.name == "best"),
    )
    export_hugging_face(folder, masters, described, finisher.submit)
