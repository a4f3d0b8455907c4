"""The model of a run: its weights at some step, and the folder that they become."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sst2_xlmr.data.prepare import Prepared
from sst2_xlmr.export.hugging_face import Description, export_hugging_face, with_temperature
from sst2_xlmr.export.model_card import card_text, last_evaluations
from sst2_xlmr.files import Deferred, Finisher, Storable
from sst2_xlmr.model.classifier import dropouts_of
from sst2_xlmr.model.compact_vocab import TABLE_NAME, expand_table
from sst2_xlmr.model.weights import pretrained_table
from sst2_xlmr.training.checkpoint import RunState
from sst2_xlmr.training.progress import Progress


@dataclass(frozen=True)
class Snapshot:
    """What is written of a run as a model.

    Attributes:
        masters: fp32 weights under the classifier's names.
        kept_ids, table_decay: of the embedding table (see compact_vocab).
    """

    progress: Progress
    masters: dict[str, Deferred]
    kept_ids: torch.Tensor
    table_decay: float


def current(state: RunState) -> Snapshot:
    """Return the run as it is until the next step."""
    return Snapshot(state.progress, state.optimizer.masters(), state.kept_ids, state.optimizer.table_decay)


def remembered(state: RunState) -> Snapshot:
    """Return the run as it is now, for later: a copy, in the CPU's memory."""
    now = current(state)

    def copied(master: Deferred) -> Deferred:
        weights = master.rows(0, master.shape[0]).to("cpu", copy=True)
        return Deferred(master.shape, master.dtype, lambda start, stop: weights[start:stop])

    masters = {name: copied(master) for name, master in now.masters.items()}
    return replace(now, progress=replace(now.progress), masters=masters)


def export_run(folder: Path, inputs: Prepared, run: Snapshot, finisher: Finisher) -> None:
    """Write a run's weights, with the whole vocabulary and a model card; on rank 0.

    Args:
        folder: in the run's folder; gets its name once `finisher` has come to it.
    """
    finisher.wait()  # an export to the same folder may not have its name yet
    dropouts = dropouts_of(inputs.config)  # also of a frozen encoder, which had none: for training it further
    config, encoder, progress = inputs.config, inputs.encoder, run.progress
    masters: dict[str, Storable] = {**run.masters}
    if not config.full_vocabulary:
        pretrained, rows = pretrained_table(encoder), run.masters[TABLE_NAME]
        masters[TABLE_NAME] = expand_table(pretrained, run.kept_ids, rows, run.table_decay)
    if progress.calibration:
        masters = with_temperature(masters, progress.calibration[0])
    row_counts = {split: len(cache) for split, cache in inputs.caches.items()}
    row_counts["train"] = len(inputs.train_labels)
    evaluations = last_evaluations(folder.parent / "metrics.jsonl", progress.step)
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
        card_text(config, config.classes, row_counts, evaluations, progress, is_chosen=folder.name == "best"),
    )
    export_hugging_face(folder, masters, described, finisher.submit)
