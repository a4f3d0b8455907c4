"""Write a trained classifier as a folder in Hugging Face layout, which `transformers` and this project open."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch

from sst2_xlmr.data.prepare import Prepared, long_texts_of
from sst2_xlmr.export.model_card import Metrics, card_text
from sst2_xlmr.export.tokenizer_json import tokenizer_json
from sst2_xlmr.model.encoders import TOKENIZER_NAME, EncoderFolder
from sst2_xlmr.model.tokenizer_files import JSON_NAME, SETTINGS_NAME, sentencepiece_model
from sst2_xlmr.model.weight_names import to_hugging_face
from sst2_xlmr.task import Task
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util.files import BackgroundWriter, disk_errors, put_in_place, scratch_name
from sst2_xlmr.util.tensors import TensorLike, write_tensors

CARD_NAME = "README.md"
Weights = Mapping[str, TensorLike]  # by the classifier's parameter names
LAST_LAYER = ("head.out.weight", "head.out.bias")
TOKENS = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}


def read_card(folder: Path) -> str:
    """Return a model folder's card; empty if it has none."""
    card = folder / CARD_NAME
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def with_note(card: str, note: str, former: str = "") -> str:
    """Return a card with a note appended, without its line that begins with `former`; an empty card stays empty."""
    if former:
        card = re.sub(rf"\n*^{re.escape(former)}.*$", "", card, flags=re.MULTILINE)
    return f"{card.rstrip()}\n\n{note}\n" if card else ""


def write_folder(
    folder: Path,
    weights: Weights,
    encoder: EncoderFolder,
    card: str = "",
    temperature: float = 1.0,
    offset: float = 0.0,
    finish: Callable[[Callable[[], None]], None] = lambda work: work(),
) -> None:
    """Write `config.json`, `model.safetensors`, the tokenizer's files and the model card; atomically.

    Args:
        folder: replaced if it exists; UserError if it cannot be written.
        weights: under the classifier's names, all fp32 or all bf16; a lazy tensor is never in memory as a whole.
        encoder: gives shape, label names, longest input, tokenizer and dropouts; its own weights are not read.
        card: content of `README.md`; if it is empty, none is written.
        temperature, offset: folded into the last layer: logits are divided by the first (see evaluation/calibration),
            then the second is added.
        finish: runs the last part, syncing and renaming, now or later (`BackgroundWriter.submit`).
    """
    unfinished, last = scratch_name(folder), {}

    def rename() -> None:
        with disk_errors(f"the model to {folder}", unfinished):
            put_in_place(unfinished, folder)

    with disk_errors(f"the model to {folder}", unfinished):
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        write_all_but_weights(unfinished, encoder, card, dtype)
        if (temperature, offset) != (1, 0):
            for name, added in zip(LAST_LAYER, (0.0, offset)):
                whole = weights[name]
                whole = whole if isinstance(whole, torch.Tensor) else whole.rows(0, whole.shape[0])
                last[name] = whole / temperature + added
        write_tensors(to_hugging_face({**weights, **last}), unfinished / "model.safetensors")
    finish(rename)


def write_all_but_weights(folder: Path, encoder: EncoderFolder, card: str, dtype: str = "float32") -> None:
    """Create a folder with `config.json`, the tokenizer's files and the model card; see `write_folder`."""
    folder.mkdir(parents=True)
    tokenizer: dict[str, Any] = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": encoder.max_length}
    if fast_tokenizer := tokenizer_json(encoder.tokenizer_file):
        (folder / JSON_NAME).write_bytes(fast_tokenizer)
        # XLMRobertaTokenizer of transformers 5.0 to 5.2 ignores most of tokenizer.json; the base class reads all of it.
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
        tokenizer.update({f"{name}_token": token for name, token in TOKENS.items()}, clean_up_tokenization_spaces=False)
    for name, content in (("config.json", _settings(encoder, dtype)), (SETTINGS_NAME, tokenizer)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    (folder / TOKENIZER_NAME).write_bytes(sentencepiece_model(encoder.tokenizer_file))
    if card:
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _settings(encoder: EncoderFolder, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    shape, names = encoder.shape, encoder.label_names
    assert names is not None
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
        **encoder.settings,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": encoder.problem_type,
        "torch_dtype": dtype,
        # Without it, or with 4.57.3 to 4.57.6, versions 4.57.2 to 5.9 mistake the tokenizer for a faulty one of another
        # model, and recommend an option that would break it.
        "transformers_version": "4.48.3",
    }


def export_run(
    folder: Path,
    weights: Weights,
    inputs: Prepared,
    task: Task,
    state: TrainState,
    evaluations: Metrics,
    finisher: BackgroundWriter,
) -> None:
    """Write a run's current weights, with the whole vocabulary, and a model card; on rank 0.

    The folder gets its final name on the thread of `finisher`. With --calibrate, the logits are divided by the state's
    temperature. Evaluations of `best/NAME` do not belong to these weights, and are left out of the card.
    """
    finisher.wait()  # so that a slow disk has one model to write at a time
    config = inputs.config
    described = replace(
        inputs.encoder,
        label_names=task.label_names,
        problem_type=task.problem_type,
        max_length=config.max_length,
        dropouts={  # also of a frozen encoder, which had none: for training it further
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
            "classifier_dropout": config.head_dropout,
        },
        text_pairs=config.text_pair_column is not None,
        long_texts=long_texts_of(config),
        thresholds=task.thresholds,
    )
    rows = {**{split: len(cache) for split, cache in inputs.caches.items()}, "train": len(inputs.train_labels)}
    for name, split in inputs.splits.items():
        rows |= {f"{kind} left out of {name}": count for kind, count in split.dropped.items()}
    own = {name: metrics for name, metrics in evaluations.items() if name in rows}
    card = card_text(config, task, state, rows, own, is_best=folder.name == "best")
    factor, offset = task.folding
    temperature = (state.temperature if config.calibrate else 1.0) / factor
    write_folder(folder, weights, described, card, temperature, offset, finisher.submit)
