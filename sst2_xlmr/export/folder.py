"""Write a trained classifier as a folder in Hugging Face layout, which `transformers` and this project open.

The model card has data, metrics, settings and versions, but no paths of this machine; its template is `model_card.md`,
Markdown with the header that the Hugging Face Hub reads.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from string import Template
from typing import Any

from sst2_xlmr.config import GROUPS, OPTIONS, Config, flag, named_file, shown
from sst2_xlmr.data.prepare import Inputs, long_texts_of
from sst2_xlmr.data.rows import PHRASES
from sst2_xlmr.evaluation.metrics import describe_calibration
from sst2_xlmr.model.encoders import SIZES, TOKENIZER_NAME, EncoderFolder
from sst2_xlmr.model.tokenizer import CUT
from sst2_xlmr.model.tokenizer_files import JSON_NAME, SETTINGS_NAME, sentencepiece_model, tokenizer_json
from sst2_xlmr.model.weights import to_hugging_face
from sst2_xlmr.task import Task
from sst2_xlmr.training.state import TrainState
from sst2_xlmr.util import versions
from sst2_xlmr.util.files import BackgroundWriter, put_in_place, scratch_name, write_errors
from sst2_xlmr.util.tensors import TensorLike, write_tensors

CARD_NAME = "README.md"
CALIBRATED = "The probabilities are calibrated on"  # begins a card's note on it; followed by a file's name
Weights = Mapping[str, TensorLike]  # by the classifier's parameter names
LAST_LAYER = ("head.out.weight", "head.out.bias")
TOKENS = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
Metrics = Mapping[str, dict[str, Any]]  # by split
_HUB_NAMES = {"xlmr.base": "FacebookAI/xlm-roberta-base", "xlmr.large": "FacebookAI/xlm-roberta-large"}
_CHOSEN = "\nThese weights were chosen by their {} on dev, which is therefore slightly optimistic.\n"
_LONG = {
    "head-tail": "\nOf texts that are too long, it was trained on the beginning and the end; the pipeline takes only"
    " the beginning.\n",
    "windows": "\nLong texts were read in windows, whose features are averaged; the pipeline takes only the first one."
    " sst2_xlmr and its ONNX export read all of them, as in training.\n",
}


def read_card(folder: Path) -> str:
    """Return a model folder's card; empty if it has none."""
    card = folder / CARD_NAME
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def with_note(card: str, note: str, previous: str = "") -> str:
    """Return a card with a note appended, without its line that begins with `previous`; an empty card stays empty."""
    if previous:
        card = re.sub(rf"\n*^{re.escape(previous)}.*$", "", card, flags=re.MULTILINE)
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
    """Write a model's folder, which is replaced if it exists, atomically; UserError if it cannot be written.

    The weights are all fp32 or all bf16; a lazy tensor is never in memory as a whole. The encoder gives shape, label
    names, longest input, tokenizer and dropouts; its own weights are not read. An empty card is not written. Logits are
    divided by the temperature (see evaluation/calibration), then the offset is added, both in the last layer. `finish`
    runs the last part, syncing and renaming, now or later (`BackgroundWriter.submit`).
    """
    unfinished = scratch_name(folder)

    def rename() -> None:
        with write_errors(f"the model to {folder}", unfinished, is_resumable=True):
            put_in_place(unfinished, folder)

    with write_errors(f"the model to {folder}", unfinished, is_resumable=True):
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        write_all_but_weights(unfinished, encoder, card, dtype)
        weight, bias = (weights[name][:] / temperature for name in LAST_LAYER)
        scaled = {**weights, **dict(zip(LAST_LAYER, (weight, bias + offset)))}
        write_tensors(to_hugging_face(scaled), unfinished / "model.safetensors")
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
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TOKENIZER_NAME).write_bytes(sentencepiece_model(encoder.tokenizer_file))
    if card:
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _settings(encoder: EncoderFolder, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    names = encoder.label_names or []
    return {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        **dict(zip(SIZES, astuple(encoder.shape))),
        "layer_norm_eps": encoder.shape.layer_norm_eps,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        **encoder.dropouts,
        **({} if encoder.text_pairs is None else {"text_pairs": encoder.text_pairs}),
        **({"thresholds": list(encoder.thresholds)} if encoder.thresholds else {}),
        **({} if encoder.long_texts == CUT else dict(zip(("long_texts", "stride"), encoder.long_texts))),
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


def card_text(
    config: Config, task: Task, state: TrainState, rows: Iterable[str], evaluations: Metrics, is_best: bool = False
) -> str:
    """Return a model card; `rows` says how many there are, and `is_best` that dev chose these weights."""
    encoder, names, results = _HUB_NAMES.get(config.encoder, Path(config.encoder).name), task.label_names, []
    eval_files = [str(named_file(value)[1]) for value in config.eval_file]
    files = [config.data_dir, *config.train_file, config.dev_file, *eval_files, *config.test_file]
    table: list[Iterable[str]] = []
    for split, metrics in evaluations.items():
        row = {"file": Path(split).name, "rows": f"{metrics['rows']:,}", **task.table_cells(metrics)}
        table = table or [[*row, "loss"], ["---"] * (len(row) + 1)]
        table.append([*row.values(), f"{metrics['loss']:.4f}"])
        dataset = dict.fromkeys(("name", "type", "split"), Path(split).name)
        scores = [{"type": kind, "name": name, "value": metrics[key]} for key, (kind, name) in task.hub_metrics.items()]
        results.append({"task": {"type": "text-classification"}, "dataset": dataset, "metrics": scores})
    # From this line of the header (JSON is also YAML), the Hub shows the metrics.
    index = json.dumps([{"name": f"{encoder}-classifier", "results": results}], ensure_ascii=False)
    settings = []  # only those that affect the result, which are those that --resume may not change
    for name in (*GROUPS["data"], *GROUPS["model"], *GROUPS["training"], "precision"):
        value = getattr(config, name)
        if value is not None and not OPTIONS[name].metadata["changeable"]:
            text = ("off", "on")[value] if isinstance(value, bool) else shown(value)
            settings.append([f"`{flag(name)}`", text.replace("|", "\\|").replace("\n", " ")])
    remarks = _CHOSEN.format(config.best_by or task.best_metric) if is_best else ""
    remarks += f"\n{task.card_note}\n" if task.card_note else ""
    remarks += _LONG.get(config.long_texts, "")
    if config.calibrate:
        calibration = describe_calibration(state.temperature, state.ece_before, state.ece_after)
        remarks += f"\n{CALIBRATED} dev: {calibration}.\n"
    return Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")).substitute(
        metric_types=", ".join(dict.fromkeys(kind for kind, _ in task.hub_metrics.values())),
        base_model=f"base_model: {encoder}\n" if config.encoder in _HUB_NAMES else "",
        model_index=f"model-index: {index}\n" if results else "",
        classes=", ".join(names) if len(names) <= 10 else f"{len(names):,} classes",
        encoder=encoder,
        steps=f"{state.step:,}",
        rows=", ".join(rows),
        files=", ".join(Path(file).name for file in files if file) or "SST-2 of the GLUE benchmark",
        metrics=_lines(table),
        remarks=remarks,
        settings=_lines(settings),
        versions=versions.versions(),
    )


def _lines(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def export_run(
    folder: Path,
    weights: Weights,
    inputs: Inputs,
    task: Task,
    state: TrainState,
    evaluations: Metrics,
    background_writer: BackgroundWriter,
) -> None:
    """Write a run's current weights, with the whole vocabulary, and a model card; on rank 0.

    The folder gets its name on the thread of `background_writer`. The card has no metrics of `best/`, other weights.
    """
    background_writer.wait()  # so that a slow disk has one model to write at a time
    config = inputs.config
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout)
    described = replace(
        inputs.encoder,
        label_names=task.label_names,
        problem_type=task.problem_type,
        max_length=config.max_length,
        # Also of a frozen encoder, which had none: for training it further.
        dropouts={**dropout, "classifier_dropout": config.head_dropout},
        text_pairs=config.text_pair_column is not None,
        long_texts=long_texts_of(config),
        thresholds=task.thresholds,
    )
    rows = [f"{len(cache):,} {Path(name).name} rows" for name, cache in inputs.caches.items()]
    for name, split in inputs.splits.items():
        rows += [f"{count:,} {PHRASES[kind]} left out of {name}" for kind, count in split.dropped.items()]
    own = {name: metrics for name, metrics in evaluations.items() if name in inputs.caches}
    card = card_text(config, task, state, rows, own, is_best=folder.name == "best")
    factor, offset = task.output_scale
    temperature = (state.temperature if config.calibrate else 1.0) / factor
    write_folder(folder, weights, described, card, temperature, offset, background_writer.submit)
