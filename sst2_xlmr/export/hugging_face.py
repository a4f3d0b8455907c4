"""Write a trained classifier as a folder in Hugging Face layout, which `transformers` and this project open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Callable

import torch

from sst2_xlmr.config import Config
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.distributed import World, on_main
from sst2_xlmr.export.model_card import last_evaluations, write_card
from sst2_xlmr.export.tokenizer_json import tokenizer_json
from sst2_xlmr.files import Finisher, Storable, disk_errors, replace_folder, sync_files, write_tensors
from sst2_xlmr.model.compact_vocab import TABLE_NAME, expand_table
from sst2_xlmr.model.encoders import TOKENIZER_NAME, Encoder, EncoderShape, pretrained_table
from sst2_xlmr.model.weight_names import to_hugging_face
from sst2_xlmr.training.optimizer import AdamW

CARD_NAME = "README.md"


def export_hugging_face(
    folder: Path,
    masters: Mapping[str, Storable],
    shape: EncoderShape,
    label_names: list[str],
    max_length: int,
    tokenizer_file: Path,
    card: str = "",
    finish: Callable[[Callable[[], None]], None] = lambda work: work(),
) -> None:
    """Write `config.json`, `model.safetensors`, the tokenizer's files and the model card; atomically.

    Args:
        folder: where; is replaced if it is there.
        masters: weights under the classifier's names, all fp32 or all bf16; those that are deferred are never in memory
            whole.
        max_length: longest input in tokens.
        card: what `README.md` shall say (see model_card); none is written if it is empty.
        finish: does what remains after the weights were read and written, at once or later (see `files.Finisher`).

    Raises:
        UserError: if it cannot be written.
    """
    settings = {
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
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "torch_dtype": str(next(iter(masters.values())).dtype).removeprefix("torch."),
    }
    tokenizer = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": max_length}
    beside = folder.with_name(folder.name + ".tmp")

    def put_in_place() -> None:
        with disk_errors(f"the model to {folder}", beside):
            sync_files(beside)
            replace_folder(beside, folder)

    with disk_errors(f"the model to {folder}", beside):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, content in (("config.json", settings), ("tokenizer_config.json", tokenizer)):
            (beside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer_file, beside / TOKENIZER_NAME)
        if converted := tokenizer_json(tokenizer_file):
            (beside / "tokenizer.json").write_bytes(converted)
        if card:
            (beside / CARD_NAME).write_text(card, encoding="utf-8")
        write_tensors(to_hugging_face(masters), beside / "model.safetensors")
    finish(put_in_place)


def export_run(
    folder: Path,
    optimizer: AdamW,
    encoder: Encoder,
    kept_ids: torch.Tensor,
    caches: dict[str, TokenCache],
    step: int,
    config: Config,
    world: World,
    finisher: Finisher,
) -> None:
    """Write a run's weights as they are now, with the whole vocabulary and a model card, from rank 0.

    Args:
        folder: in the run's folder; takes its name once `finisher` has come to it.
        kept_ids: int64 [rows], the ids of the embedding table's rows.
        caches: the rows that the run reads, by split.
        step: how many were made.
    """

    def write() -> None:
        masters = optimizer.masters()
        if not config.full_vocabulary:
            pretrained = pretrained_table(encoder)
            masters[TABLE_NAME] = expand_table(pretrained, kept_ids, masters[TABLE_NAME], optimizer.table_decay)
        rows = {split: len(cache) for split, cache in caches.items()}
        evaluations = last_evaluations(folder.parent / "metrics.jsonl", step)
        card = write_card(config, config.classes, rows, evaluations, step)
        export_hugging_face(
            folder,
            masters,
            encoder.shape,
            config.classes,
            config.max_length,
            encoder.tokenizer_file,
            card,
            finisher.submit,
        )

    on_main(world, write)
