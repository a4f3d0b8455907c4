"""The task: everything that depends on the kind of label, from a file's cell to an exported model's prediction.

There are three: one of several classes, any number of labels, a score. No other module computes softmax, argmax or
accuracy, or knows a task by name; they call methods of `Task`. To add a task, write a class with the same methods and
add it to `Task` and `TASKS`, to the functions below that choose one, and its name to `config.TASK_NAMES`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from sst2_xlmr.config import ABSTAINED, OPTIONS, Config, flag
from sst2_xlmr.evaluation import metrics as metric
from sst2_xlmr.labels import (
    MISSING,
    LabelValues,
    are_positional,
    canonical,
    check_decimal_commas,
    describe_unknown,
    find_label_names,
    ids_by_label,
    is_number,
    label_notes,
    label_text,
    listed,
    resolve_label_names,
    split_labels,
)
from sst2_xlmr.util.errors import UserError

_SMALLEST = float(np.finfo(np.float32).tiny)  # stands in for a probability that was rounded to 0
_NO_PROBABILITIES = "a score has no probabilities"
# Metrics' titles where they differ from their keys.
_TITLES = {"macro_f1": "macro F1", "micro_f1": "micro F1", "exact_match": "exact match", "ece": "ECE", "rmse": "RMSE"}
_TITLES |= {"mean_average_precision": "mean AP", "spearman": "Spearman", "pearson": "Pearson", "mae": "MAE"}
LOWER_IS_BETTER = ("loss", "rmse", "mae")  # metrics for which lower is better
LabelCounts = Mapping[str, Sequence[int]]  # a file's labels: `label_text` -> number of rows, line of the first
Weights = np.ndarray | None  # float [rows], factors on the rows' losses; None for ones


@dataclass(frozen=True)
class _Common:
    """Fields and defaults that tasks share; `SingleLabel` documents the interface."""

    label_names: list[str]  # of classes 0, 1, ...
    # Class ids by the integers that stand for them in files; None for 0, 1, ..., unless the names are integers.
    label_ids: dict[str, int] | None = None
    thresholds: tuple[float, ...] = ()  # a text has the labels whose probability reaches theirs; empty for 0.5
    initial_bias: tuple[float, ...] = ()  # of a new head; empty for zeros
    are_positional: bool = False  # whether a file's lists have one number per label (see `labels.are_positional`)

    may_be_empty = False  # whether "no label" is a valid label
    is_output_fp32 = False  # whether the head's last layer predicts in fp32, whatever the precision of the others

    @property
    def output_scale(self) -> tuple[float, float]:
        """(scale, offset) that the exported head applies to its logit."""
        return 1.0, 0.0

    @property
    def outputs(self) -> int:
        """The number of logits."""
        return len(self.label_names)

    @property
    def thresholds_in_use(self) -> list[float]:
        """The fitted thresholds, or 0.5 for every label; only `MultiLabel` uses them."""
        return list(self.thresholds) or [0.5] * self.outputs

    @cached_property
    def _ids_by_label(self) -> dict[str, int]:
        return ids_by_label(self.label_names, self.label_ids)

    def _label_row(self, values: LabelValues | str, where: str) -> np.ndarray:
        """Return fp32 [labels] of a cell's `split_labels`; UserError, beginning with `where`, for an unknown label."""
        row = np.zeros(self.outputs, np.float32)
        values = {values: 1.0} if isinstance(values, str) else values
        if 0 in values.values() and len(values) < self.outputs:
            absent = [name for name in self.label_names if name not in values]
            raise UserError(f"{where}: the label has numbers, but none for {listed(absent)}; give one for every label")
        for label, value in values.items():
            index = label if isinstance(label, int) else self._ids_by_label.get(label, self.outputs)
            if index >= self.outputs:
                raise UserError(f"{where}: {describe_unknown(str(label), self.label_names, self._ids_by_label)}")
            if not 0 <= value <= 1:
                has = "a value that is no number" if math.isnan(value) else f"{value:g}"
                fix = "it must be 0, 1 or a probability; if rows are nested, write flat ones"
                raise UserError(f"{where}: label {label!r} has {has}; {fix}")
            row[index] = value
        return row

    def fit_thresholds(self, probabilities: np.ndarray, labels: np.ndarray, threshold_for: str | None) -> list[float]:
        """Return thresholds for `--threshold-for`, fitted on dev; empty if the task has no thresholds."""
        return []

    def align_classes(self: Any, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Shift the logits so that the mean of the probabilities, [rows, outputs], has the class shares of `labels`."""
        # Distribution alignment (Berthelot et al. 2020, https://arxiv.org/abs/1911.09785).
        logits, wanted = self.logits_of(probabilities), self.logits_of(self.prior(labels, None)[None])
        for _ in range(50 if len(probabilities) else 0):
            mean = self.probabilities(torch.from_numpy(logits)).mean(0, keepdim=True).numpy()
            logits += wanted - self.logits_of(mean)
        return self.probabilities(torch.from_numpy(logits)).numpy()

    def soft_labels(self: Any, probabilities: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return probabilities as soft labels, sharper at temperatures below 1."""
        logits = torch.from_numpy(self.logits_of(probabilities) / temperature)
        return np.asarray(self.probabilities(logits).double().numpy().round(6))

    def results_of(self: Any, probabilities: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return `row_results`, fp64, of probabilities after dividing their logits by a temperature."""
        logits = torch.from_numpy(self.logits_of(probabilities) / temperature)
        return np.asarray(self.row_results(logits, torch.tensor(labels)).numpy())

    def label_to_json(self: Any, label: Any) -> Any:
        """Return a label as a JSON value that `read_label` reads."""
        return dict(zip(self.label_names, label.tolist())) if np.ndim(label) else self.format_label(label)

    def describe(self: Any, metrics: dict[str, Any]) -> str:
        """Summarize the main metrics for a line on the console."""
        texts = []
        for key in self.console_metrics:
            at_half = f" ({metrics[f'{key}_at_0.5']:.4f} at 0.5)" if f"{key}_at_0.5" in metrics else ""
            texts.append(f"{_TITLES.get(key, key)} {metrics[key]:.4f}{at_half}")
        return "  ".join(texts)

    def table_cells(self: Any, metrics: dict[str, Any]) -> dict[str, str]:
        """Return a file's row in the table of evaluated files: column name -> cell."""
        cells = {}
        for key in self.table_metrics:
            cells[_TITLES.get(key, key)] = f"{metrics[key]:.4f}"
            if key == "accuracy" and "rows" in metrics:  # of one file, not the mean of several
                cells["95 % interval"] = f"{metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f}"
        return cells


@dataclass(frozen=True)
class SingleLabel(_Common):
    """Every text has one of several classes: softmax, cross-entropy, accuracy."""

    label_smoothing: float = 0.0  # probability mass that the loss spreads evenly over all classes
    class_weights: torch.Tensor | None = None  # fp32 [classes], factors on the loss of each class's rows; None for ones
    is_soft: bool = False  # whether a label is a distribution over the classes

    problem_type = "single_label_classification"  # transformers' word for it
    option = "single-label"  # of --task
    best_metric = "accuracy"  # chooses best/ by default
    best_by_choices = ("accuracy", "macro_f1", "loss")  # the choices of --best-by
    tensorboard_metrics = ("loss", "accuracy", "macro_f1", "ece")  # plotted in TensorBoard
    console_metrics = ("accuracy", "macro_f1", "loss")  # in a line on the console
    table_metrics = ("accuracy", "macro_f1", "ece")  # columns of tables
    # The metrics on a model card: their types and names on the Hub.
    hub_metrics: ClassVar = {"accuracy": ("accuracy", "accuracy"), "macro_f1": ("f1", "macro F1")}
    unsupported_options: ClassVar[dict[str, str]] = {  # option -> why this task does not support it
        "threshold_for": "the most probable class is the answer, without a threshold",
        "label_delimiter": "a row has one label",
    }

    @property
    def label_dtype(self) -> type:
        """The dtype of labels in the token cache: int32 class ids, or fp32 probabilities."""
        return np.float32 if self.is_soft else np.int32

    # --- labels in files

    @classmethod
    def from_labels(
        cls, config: Config, labels: LabelCounts, all_labels: LabelCounts, names_in_files: NamesInFiles, path: object
    ) -> Task:
        """Return the task for the training files' labels, given `all_labels` of all files; errors name the `path`."""
        positional = are_positional(labels)
        values = [split_labels(text, are_positional=positional) for text in labels if text.startswith(("[", "{"))]
        if is_soft := any(isinstance(value, dict) and len(value) > 1 for value in values):
            labels = dict.fromkeys((str(name) for value in values for name in value), (1, 1))
        if config.label_names and not any(label.isdecimal() for label in labels):
            labels = all_labels  # integers, if any, are in the other files
        names, label_ids = _find_classes(config, labels, names_in_files, path, is_complete=is_soft)
        return cls(names, label_ids=label_ids, is_soft=is_soft, are_positional=positional)

    @classmethod
    def matches_labels(cls, labels: Mapping[str, str | LabelValues]) -> bool:
        """Whether the labels, given with their `split_labels`, can only belong to this task: here, probabilities."""
        several = [list(value.values()) for value in labels.values() if not isinstance(value, str)]
        has_fractions = any(0 < value < 1 for row in several for value in row)
        return has_fractions and all(abs(sum(row) - 1) < 0.01 for row in several)

    def read_label(self, cell: object, where: str) -> int | np.ndarray | None:
        """Return the label in a cell, None for a missing one; UserError, beginning with `where`, for an invalid one."""
        text = label_text(cell)
        if self.is_soft and text.startswith(("[", "{")):
            row = self._label_row(split_labels(text, are_positional=self.are_positional), where)
            if abs(row.sum() - 1) > 0.01:
                raise UserError(f"{where}: the classes' probabilities add up to {row.sum():.4g}, not to 1; fix them")
            return row / row.sum()
        ids = self._ids_by_label
        text = text if text in ids else canonical(text)
        if text not in ids:
            if text in MISSING or text == "-1":
                return None
            raise UserError(f"{where}: {describe_unknown(text, self.label_names, ids)}")
        return np.eye(self.outputs, dtype=np.float32)[ids[text]] if self.is_soft else ids[text]

    def label_warnings(self, labels: LabelCounts) -> list[str]:
        """Return warnings about a file's labels."""
        return [] if self.is_soft else label_notes({label: rows for label, (rows, _) in labels.items()})

    def label_keys(self, labels: np.ndarray) -> np.ndarray:
        """Return int [rows], equal for equal labels (for soft labels: for the same most probable class)."""
        return labels if labels.ndim == 1 else labels.argmax(1)

    strata = label_keys  # int [rows]; a dev split takes the same share of every stratum

    def format_label(self, label: Any) -> str:
        """Return a label in words."""
        return self.label_names[int(label if np.ndim(label) == 0 else label.argmax())]

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        """Return the number of rows with each label."""
        return dict(zip(self.label_names, np.bincount(self.label_keys(labels), minlength=self.outputs).tolist()))

    def describe_labels(self, labels: np.ndarray) -> str:
        """Summarize a file's labels for the header."""
        kind = "probabilities of " if self.is_soft else ""
        return kind + listed([f"{label} {rows:,}" for label, rows in self.counts(labels).items()])

    # --- training

    def for_training(self, config: Config, labels: np.ndarray, weights: Weights, device: torch.device) -> SingleLabel:
        """Return the task with a run's label smoothing and class weights.

        `--class-weights balanced` is rows / (classes * rows of the class): every class has the same total weight, and
        the mean over the training rows (given by `labels` and `weights`) is 1. UserError if a class has no row.
        """
        factors = _explicit_weights(config.class_weights)
        if config.class_weights == "balanced":
            counts = self.prior(labels, weights)
            if not counts.all():
                absent, fix = self.label_names[int(counts.argmin())], "or give the weights as numbers"
                problem = f"the training file has no row of class {absent!r}; leave it out of --label-names, {fix}"
                raise UserError(f"--class-weights balanced: {problem}")
            factors = torch.from_numpy(counts.sum() / (self.outputs * counts)).float()
        factors = None if factors is None else factors.to(device)
        return replace(self, label_smoothing=config.label_smoothing, class_weights=factors)

    def prior(self, labels: np.ndarray, weights: Weights) -> np.ndarray:
        """Return fp64 [classes], the total weight of each class's rows."""
        if labels.ndim == 2:
            return np.asarray((labels if weights is None else labels * weights[:, None]).sum(0, dtype=np.float64))
        return np.bincount(labels, weights, minlength=self.outputs).astype(np.float64)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum over rows of loss (nats) * row weight * class weight, a scalar.

        Logits are fp32 [rows, classes], labels as in the token cache, weights fp32 [rows] or None. The class weights of
        `F.cross_entropy` would also apply the other classes' weights to the smoothed part of a row.
        """
        labels, smoothing = labels if self.is_soft else labels.long(), self.label_smoothing
        if self.class_weights is None and weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if self.class_weights is not None:
            losses = losses * (labels @ self.class_weights if self.is_soft else self.class_weights[labels])
        return (losses if weights is None else losses * weights).sum()

    def baseline_loss(self, labels: np.ndarray, weights: Weights = None) -> float:
        """Return the class-prior baseline: the loss, in nats per row, of the best constant prediction."""
        rows = self.prior(labels, weights)
        counted = rows if self.class_weights is None else rows * self.class_weights.cpu().numpy()
        prediction = (1 - self.label_smoothing) * counted / counted.sum() + self.label_smoothing / self.outputs
        entropy = -float(sum(p * math.log(p) for p in prediction if p > 0))
        return entropy * float(counted.sum() / rows.sum())

    # --- predictions

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return fp32 [rows, classes]."""
        return logits.softmax(-1)

    def columns(self, all_probabilities: bool) -> list[str]:
        return ["label", "probability"] + [f"probability_{name}" for name in self.label_names] * all_probabilities

    def prediction_cells(self, row: Sequence[float], all_probabilities: bool, abstain_below: float = 0.0) -> list[Any]:
        """Return the cells for `columns` of a row of probabilities; a label less likely than `abstain_below` is `?`."""
        highest = max(row)
        label = self.label_names[row.index(highest)] if highest >= abstain_below else ABSTAINED
        return [label, highest, *(row if all_probabilities else ())]

    def mistakes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Callable[[int], list[str]]]:
        """Return the misclassified rows, most confident first, and a function: row -> true and predicted label."""
        predicted, confidence, true = probabilities.argmax(-1), probabilities.max(-1), self.label_keys(labels)
        wrong = np.flatnonzero(predicted != true)
        order = wrong[np.argsort(-confidence[wrong], kind="stable")]
        names = self.label_names
        return order, lambda row: [names[true[row]], names[predicted[row]], f"{confidence[row]:.4f}"]

    def curves(self, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield, for every precision-recall curve, a label's name, bool [rows] (has it) and probabilities [rows]."""
        true = self.label_keys(labels)
        for index in [1] if self.outputs == 2 else range(self.outputs):
            yield self.label_names[index], true == index, probabilities[:, index]

    def is_prediction_changed(self, probabilities: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return bool [rows], whether the prediction differs; both arguments are probabilities, [rows, classes]."""
        return np.asarray(probabilities.argmax(1) != expected.argmax(1))

    def near_ties(self, logits: torch.Tensor, distance: float) -> torch.Tensor:
        """Return bool [rows], whether changing the logits by `distance` may change the prediction."""
        best, second = logits.topk(2).values.unbind(1)
        return best - second < distance

    def label_error_scores(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return how doubtful each label is, from -1 to 1, by the probabilities of a model not trained on these rows.

        Models are more confident of some classes than of others, so each class's probability is divided by its average
        over the rows with that label (at least chance), and each row rescaled to sum to 1. The doubt is the largest
        value of another class minus that of the label (after confident learning, Northcutt et al. 2021,
        https://arxiv.org/abs/1911.00068).
        """
        given, rows = self.label_keys(labels), np.arange(len(labels))
        averages = [probabilities[given == i, i].mean() if (given == i).any() else 1.0 for i in range(self.outputs)]
        scaled = probabilities / np.maximum(averages, 1 / self.outputs)
        scaled /= scaled.sum(1, keepdims=True)
        of_given = scaled[rows, given]
        scaled[rows, given] = -np.inf
        return np.asarray(scaled.max(1) - of_given)

    # --- evaluation

    def row_results(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 3], the input of `metrics`: loss in nats, predicted class id, its probability."""
        labels = labels.to(logits.dtype) if labels.dim() == 2 else labels.long()
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidences, predictions = logits.softmax(-1).max(-1)
        return torch.stack([losses, predictions.to(losses.dtype), confidences], dim=1)

    def metrics(self, results: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return an evaluation's entry for `metrics.jsonl` from `row_results` and labels; lists are per class."""
        labels = self.label_keys(labels)
        losses, confidences = results[:, 0].astype(np.float64), results[:, 2].astype(np.float64)
        confusion, rows = self.confusion(results, labels), len(labels)
        correct, classes = int(confusion.trace()), metric.per_class(confusion)
        low, high = metric.accuracy_interval(correct, rows)
        return {
            "loss": float(losses.sum()) / rows,
            "accuracy": correct / rows,
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": metric.macro_f1(confusion),
            "ece": metric.expected_calibration_error(confidences, results[:, 1] == labels),
            **{key: classes[key].tolist() for key in ("precision", "recall")},
            "rows": rows,
        }

    def confusion(self, results: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return int64 [labels, predictions], numbers of rows."""
        return metric.confusion_matrix(self.label_keys(labels), results[:, 1].astype(np.int64), self.outputs)

    def logits_of(self, probabilities: np.ndarray) -> np.ndarray:
        """Return fp64 [rows, classes], logits up to a constant per row; finite even for probabilities of 0."""
        return np.asarray(np.log(probabilities.astype(np.float64).clip(min=_SMALLEST)))

    def per_label(self, results: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Return precision, recall, f1 and support, [classes] each."""
        return metric.per_class(self.confusion(results, labels))

    # --- collapse (see training/guard)

    def constant_prediction(self, probabilities: np.ndarray) -> str:
        """Return the prediction, as text, if every text gets the same one; else an empty string."""
        predicted = probabilities.argmax(1)
        return repr(self.label_names[predicted[0]]) if (predicted == predicted[0]).all() else ""

    def is_near_constant_baseline(self, probabilities: np.ndarray, labels: np.ndarray) -> bool:
        """Whether accuracy closes less than a fifth of the gap between a constant prediction's accuracy and 1."""
        labels = self.label_keys(labels)
        accuracy, constant = (probabilities.argmax(1) == labels).mean(), np.bincount(labels).max() / len(labels)
        return bool((accuracy - constant) / (1 - constant) < 0.2)

    card_note = ""  # added to the model card

    # --- exported forms

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        """Append label and probabilities to an ONNX graph; returns output name -> value, type, shape of one text's.

        `add` adds an operator to the graph and returns its output (see export/onnx).
        """
        probabilities = add("Softmax", logits, axis=-1)
        best = add("ArgMax", probabilities, axis=-1, keepdims=0)
        label = add("Gather", np.array(self.label_names, dtype=object), best)
        return {"label": (label, "STRING", []), "probabilities": (probabilities, "FLOAT", [self.outputs])}

    def parse_exported_outputs(self, outputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        """Return an exported model's predictions, like the first of `prediction_cells`, and its probabilities."""
        return list(outputs[0]), np.asarray(outputs[1])

    @staticmethod
    def torchscript_prediction(logits: torch.Tensor, names: list[str], thresholds: torch.Tensor) -> Any:
        """Return labels and probabilities, fp32 [texts, classes], of fp32 logits; compiled by TorchScript."""
        probabilities = logits.softmax(-1)
        best: list[int] = probabilities.argmax(-1).tolist()
        return [names[index] for index in best], probabilities


@dataclass(frozen=True)
class MultiLabel(_Common):
    """A text has any number of labels, even none: sigmoid and binary cross-entropy per label, micro and macro F1.

    `SingleLabel` documents the methods. A new head's biases are the logits of the best constant prediction: with zeros,
    the first steps move all texts' features in one direction, because most labels are rare. On GoEmotions' 28 labels,
    training collapsed.
    """

    positive_weights: torch.Tensor | None = None  # fp32 [labels], factors on the loss of a text's own labels
    delimiter: str | None = None  # separates the labels in a cell; None for `,`, `;` and `|`

    problem_type = "multi_label_classification"
    option = "multi-label"
    may_be_empty = True
    label_dtype = np.float32  # 1 for each label that a row has, or its probability
    best_metric = "macro_f1"
    best_by_choices = ("macro_f1", "micro_f1", "exact_match", "mean_average_precision", "loss")
    tensorboard_metrics = ("loss", "macro_f1", "micro_f1", "exact_match", "mean_average_precision", "ece")
    console_metrics = ("macro_f1", "micro_f1", "loss")
    table_metrics = ("macro_f1", "micro_f1", "exact_match", "mean_average_precision")
    hub_metrics: ClassVar = {"macro_f1": ("f1", "macro F1"), "micro_f1": ("f1", "micro F1")}
    unsupported_options: ClassVar[dict[str, str]] = {
        "label_smoothing": "it is for one class per text",
        "abstain_below": "a text may have no label: raise the thresholds with --threshold-for in training",
        "glue_submission": "SST-2 has one label per text",
    }

    @classmethod
    def from_labels(
        cls, config: Config, labels: LabelCounts, all_labels: LabelCounts, names_in_files: NamesInFiles, path: object
    ) -> Task:
        delimiter = config.label_delimiter
        single, positional = dict[str, Sequence[int]](), are_positional(labels)
        for text, counts in labels.items():
            for label in _split(text, delimiter, config.label_names or (), positional):
                single.setdefault(str(label), counts)
        is_complete = positional or all(text.startswith("{") for text in labels)
        found = _find_classes(config, single, names_in_files, path, is_complete)
        return cls(*found, delimiter=delimiter, are_positional=positional)

    @classmethod
    def matches_labels(cls, labels: Mapping[str, str | LabelValues]) -> bool:
        """Here: lists or objects; or cells with several labels, each of which is alone in another cell."""
        several = {text: values for text, values in labels.items() if isinstance(values, dict) and len(values) > 1}
        rest = [values for text, values in labels.items() if text not in several]
        alone = {str(name) for values in rest for name in ([values] if isinstance(values, str) else values)}
        is_json = any(text.startswith(("[", "{")) for text in several)
        return bool(several) and (is_json or {str(name) for values in several.values() for name in values} <= alone)

    def read_label(self, cell: object, where: str) -> np.ndarray | None:
        values = _split(label_text(cell), self.delimiter, self._ids_by_label, self.are_positional)
        is_scored = set(values.values()) != {-1.0}
        return self._label_row(values, where) if is_scored else None

    def label_warnings(self, labels: LabelCounts) -> list[str]:
        counts: Counter[str] = Counter()
        is_one_hot = bool(labels)
        for text, (rows, _) in labels.items():
            values = _split(text, self.delimiter, self._ids_by_label, self.are_positional)
            counts.update({str(label): rows for label in values})
            is_one_hot &= len(values) > 1 and sum(values.values()) == 1
        one = "every row has exactly one label: if that is always so, give --task single-label"
        return label_notes(counts) + ([one] if is_one_hot else [])

    def label_keys(self, labels: np.ndarray) -> np.ndarray:
        factors = np.random.RandomState(0).randint(1, 2**62, labels.shape[1])
        return np.asarray((labels * 2**20).astype(np.int64) @ factors)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Return the id of each row's rarest label, or -1."""
        order = np.argsort(labels.sum(0), kind="stable")
        has = labels[:, order] > 0.5
        return np.where(has.any(1), order[has.argmax(1)], -1)

    def format_label(self, label: np.ndarray) -> str:
        return ", ".join(self._names_of(label > 0.5)) or "(none)"

    def _names_of(self, has: np.ndarray) -> list[str]:
        return [self.label_names[index] for index in np.flatnonzero(has)]

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        return dict(zip(self.label_names, (labels > 0.5).sum(0).tolist()))

    def describe_labels(self, labels: np.ndarray) -> str:
        has = labels > 0.5
        none = "" if has.any(1).all() else f", {int((~has.any(1)).sum()):,} rows have none"
        some = f"several labels a row, {has.sum(1).mean():.2f} on average{none}: "
        return some + listed([f"{label} {rows:,}" for label, rows in self.counts(labels).items()])

    def for_training(self, config: Config, labels: np.ndarray, weights: Weights, device: torch.device) -> MultiLabel:
        """`--class-weights balanced` is, for each label, the rows without it / the rows with it."""
        factors = _explicit_weights(config.class_weights)
        if config.class_weights == "balanced":
            prior = self.prior(labels, weights)
            factors = torch.from_numpy(np.where(prior > 0, (1 - prior) / prior.clip(1e-9), 1.0)).float()
        task = replace(self, positive_weights=None if factors is None else factors.to(device))
        prediction = task._best_constant(labels, weights)[-1].clip(1e-3, 1 - 1e-3)
        return replace(task, initial_bias=tuple(np.log(prediction / (1 - prediction)).tolist()))

    def prior(self, labels: np.ndarray, weights: Weights) -> np.ndarray:
        """Return fp64 [labels], the fraction of the rows with each label."""
        return np.average(labels.astype(np.float64), axis=0, weights=weights)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum over rows of the mean over labels, as in transformers."""
        factors = self.positive_weights
        losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=factors, reduction="none").mean(1)
        return (losses if weights is None else losses * weights).sum()

    def baseline_loss(self, labels: np.ndarray, weights: Weights = None) -> float:
        prior, positive, prediction = self._best_constant(labels, weights)
        prediction = prediction.clip(_SMALLEST, 1 - 1e-12)
        return float(-(positive * np.log(prediction) + (1 - prior) * np.log1p(-prediction)).mean())

    def _best_constant(self, labels: np.ndarray, weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return fp64 [labels] each: the prior, prior * positive weight, and the probabilities of minimal loss."""
        prior = self.prior(labels, weights)
        positive = prior if self.positive_weights is None else prior * self.positive_weights.cpu().numpy()
        return prior, positive, positive / (positive + 1 - prior)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def _has(self, probabilities: np.ndarray) -> np.ndarray:
        """Return bool [rows, labels], whether each label is predicted."""
        return np.asarray(probabilities >= np.array(self.thresholds_in_use, np.float32))

    def columns(self, all_probabilities: bool) -> list[str]:
        return ["labels", "probabilities"] + [f"probability_{name}" for name in self.label_names] * all_probabilities

    def prediction_cells(self, row: Sequence[float], all_probabilities: bool, abstain_below: float = 0.0) -> list[Any]:
        """The first two cells are lists: the row's labels and their probabilities."""
        predicted = np.flatnonzero(self._has(np.asarray(row, np.float32))).tolist()
        names, values = [self.label_names[i] for i in predicted], [round(row[i], 6) for i in predicted]
        return [names, values, *(row if all_probabilities else ())]

    def mistakes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Callable[[int], list[str]]]:
        predicted, true = self._has(probabilities), labels > 0.5
        error = np.where(predicted != true, np.abs(probabilities - true), 0).max(1)
        wrong = np.flatnonzero((predicted != true).any(1))
        order = wrong[np.argsort(-error[wrong], kind="stable")]
        cell = self.format_label
        return order, lambda row: [cell(true[row]), cell(predicted[row]), f"{1 - error[row]:.4f}"]

    def curves(self, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        yield from zip(self.label_names, labels.T > 0.5, probabilities.T)

    def is_prediction_changed(self, probabilities: np.ndarray, expected: np.ndarray) -> np.ndarray:
        return np.asarray((self._has(probabilities) != self._has(expected)).any(1))

    def near_ties(self, logits: torch.Tensor, distance: float) -> torch.Tensor:
        """A tie is between a logit and a fixed threshold, not between two logits: half the distance is enough."""
        thresholds = torch.tensor(self.thresholds_in_use, dtype=logits.dtype).logit()
        return (logits - thresholds).abs().amin(1) < distance / 2

    def label_error_scores(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the doubt of the most doubtful label."""
        both, has = np.stack([1 - probabilities, probabilities], 2), (labels > 0.5).astype(int)
        binary = SingleLabel(["no", "yes"])
        return np.max([binary.label_error_scores(both[:, i], has[:, i]) for i in range(self.outputs)], axis=0)

    def row_results(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 1 + labels]: loss in nats (mean over labels), probabilities."""
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)
        return torch.cat([losses[:, None], logits.sigmoid()], dim=1)

    def metrics(self, results: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """`_at_0.5` means without fitted thresholds. The calibration error is over all labels of all rows."""
        probabilities, true = results[:, 1:].astype(np.float64), labels > 0.5
        predicted, per_label = self._has(results[:, 1:]), self.per_label(results, labels)
        macro_f1_at_half = float(replace(self, thresholds=()).per_label(results, labels)["f1"].mean())
        at_half = {"macro_f1_at_0.5": macro_f1_at_half, "micro_f1_at_0.5": _micro_f1(probabilities >= 0.5, true)}
        confidences = np.maximum(probabilities, 1 - probabilities).reshape(-1)
        return {
            "loss": float(results[:, 0].astype(np.float64).mean()),
            "macro_f1": float(per_label["f1"].mean()),
            "micro_f1": _micro_f1(predicted, true),
            **(at_half if self.thresholds else {}),
            "exact_match": float((predicted == true).all(1).mean()),
            "mean_average_precision": metric.mean_average_precision(probabilities, true),
            "ece": metric.expected_calibration_error(confidences, ((probabilities >= 0.5) == true).reshape(-1)),
            **{key: per_label[key].tolist() for key in ("precision", "recall")},
            "rows": len(labels),
        }

    def per_label(self, results: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        predicted, true = self._has(results[:, 1:]), labels > 0.5
        return metric.per_label((predicted & true).sum(0), predicted.sum(0), true.sum(0))

    def confusion(self, results: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return int64 [labels, labels]: the number of rows with label i for which label j is predicted."""
        return np.asarray((labels > 0.5).T.astype(np.int64) @ self._has(results[:, 1:]).astype(np.int64))

    def logits_of(self, probabilities: np.ndarray) -> np.ndarray:
        p = probabilities.astype(np.float64).clip(_SMALLEST, 1 - 2.0**-25)
        return np.asarray(np.log(p) - np.log1p(-p))

    def fit_thresholds(self, probabilities: np.ndarray, labels: np.ndarray, threshold_for: str | None) -> list[float]:
        aim, _, floor = (threshold_for or "f1").partition("=")
        columns = zip(probabilities.T, (labels > 0.5).T)
        return [round(metric.fitted_threshold(scores, has, aim, float(floor or 0)), 6) for scores, has in columns]

    def results_of(self, probabilities: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        results = super().results_of(probabilities, labels, temperature)
        if temperature == 1:
            results[:, 1:] = probabilities  # rounding again could move one across a threshold
        return results

    def constant_prediction(self, probabilities: np.ndarray) -> str:
        has = self._has(probabilities)
        return self.format_label(has[0]) if (has == has[0]).all() else ""

    def is_near_constant_baseline(self, probabilities: np.ndarray, labels: np.ndarray) -> bool:
        true = labels > 0.5
        gain = (metric.mean_average_precision(probabilities, true) - true.mean()) / max(1e-9, 1 - true.mean())
        return bool(gain < 0.1)

    @property
    def card_note(self) -> str:
        cuts = ", ".join(f"{name} {cut:.3g}" for name, cut in zip(self.label_names, self.thresholds))
        which = f": {cuts}. They were fitted on dev, so its metrics are a little optimistic." if cuts else " of 0.5."
        return f"A text has every label whose probability, a sigmoid, reaches the label's threshold{which}"

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        """Append a bool and a probability per label; `label_names` is in the metadata."""
        probabilities = add("Sigmoid", logits)
        has = add("GreaterOrEqual", probabilities, np.array(self.thresholds_in_use, np.float32))
        return {"labels": (has, "BOOL", [self.outputs]), "probabilities": (probabilities, "FLOAT", [self.outputs])}

    def parse_exported_outputs(self, outputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        labels, probabilities = outputs
        names = labels if isinstance(labels, list) else [self._names_of(row) for row in labels]
        return names, np.asarray(probabilities)

    @staticmethod
    def torchscript_prediction(logits: torch.Tensor, names: list[str], thresholds: torch.Tensor) -> Any:
        probabilities = logits.sigmoid()
        labels: list[list[str]] = []
        for row in probabilities >= thresholds:
            indices: list[int] = torch.nonzero(row)[:, 0].tolist()
            labels.append([names[index] for index in indices])
        return labels, probabilities


@dataclass(frozen=True)
class Regression(_Common):
    """Every text has a score: one output, mean squared error, correlations.

    Training uses scores scaled to mean 0 and std 1; an exported head gives scores on the file's scale. `SingleLabel`
    documents the methods; its probabilities are scores here, [rows, 1].
    """

    label_mean: float = 0.0  # of the training scores, like their std; 0 and 1 for an exported model
    label_std: float = 1.0

    problem_type = "regression"
    option = "regression"
    is_output_fp32 = True  # in bf16, a score of 2,000 would be a multiple of 8
    label_dtype = np.float32
    best_metric = "spearman"
    best_by_choices = ("spearman", "pearson", "rmse", "mae", "loss")
    tensorboard_metrics = ("loss", "rmse", "mae", "pearson", "spearman")
    console_metrics = ("spearman", "pearson", "rmse")
    table_metrics = ("spearman", "pearson", "rmse", "mae")
    hub_metrics: ClassVar = {"spearman": ("spearmanr", "spearman"), "pearson": ("pearsonr", "pearson")}
    unsupported_options: ClassVar[dict[str, str]] = {
        "label_names": "a score has no name",
        "label_smoothing": "a score has no classes",
        "align_classes": "a score has no classes",
        "class_weights": "a score has no classes; --weight-column weighs rows",
        **dict.fromkeys(("calibrate", "temperature", "abstain_below", "all_probabilities"), _NO_PROBABILITIES),
        **dict.fromkeys(("glue_submission", "threshold_for"), _NO_PROBABILITIES),
        "label_delimiter": "a row has one score",
    }

    @property
    def output_scale(self) -> tuple[float, float]:
        return self.label_std, self.label_mean

    @classmethod
    def from_labels(
        cls, config: Config, labels: LabelCounts, all_labels: LabelCounts, names_in_files: NamesInFiles, path: object
    ) -> Task:
        task = cls(["score"])
        check_decimal_commas(labels, path)
        for label, (_, line) in labels.items():
            task.read_label(label, f"{path}, line {line}")
        if len(set(labels) - MISSING) < 2:
            raise UserError(f"{path}: all rows have the same score; name the column of scores with --label-column")
        return task

    @classmethod
    def matches_labels(cls, labels: Mapping[str, str | LabelValues]) -> bool:
        """Here: numbers, and some of them fractions."""
        return all(map(is_number, labels)) and any("." in canonical(label) for label in labels)

    def read_label(self, cell: object, where: str) -> float | None:
        text = label_text(cell)
        if text in MISSING:
            return None
        number = text.replace(",", ".") if text.count(",") == 1 and "." not in text else text  # from a decimal comma
        if not is_number(number):
            raise UserError(f"{where}: label {text[:40]!r} is not a number, as a score must be; fix it")
        return float(number)

    def label_warnings(self, labels: LabelCounts) -> list[str]:
        return []

    def label_keys(self, labels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(labels, np.float32).view(np.int32)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Return the decile of each score, 0 to 9."""
        return np.searchsorted(np.quantile(labels, np.arange(1, 10) / 10), labels)

    def format_label(self, label: float) -> str:
        return f"{label:g}"

    def label_to_json(self, label: float) -> float:
        return float(label)

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        return {}

    def describe_labels(self, labels: np.ndarray) -> str:
        return f"scores from {labels.min():g} to {labels.max():g}, mean {labels.mean():.4g}, std {labels.std():.4g}"

    def for_training(self, config: Config, labels: np.ndarray, weights: Weights, device: torch.device) -> Regression:
        mean = float(np.average(labels.astype(np.float64), weights=weights))
        std = math.sqrt(np.average((labels.astype(np.float64) - mean) ** 2, weights=weights))
        return replace(self, label_mean=mean, label_std=std or 1.0)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum over rows of the squared errors of scaled scores."""
        errors = (logits[:, 0] - (labels - self.label_mean) / self.label_std).square()
        return (errors if weights is None else errors * weights).sum()

    def baseline_loss(self, labels: np.ndarray, weights: Weights = None) -> float:
        errors = (labels.astype(np.float64) - np.average(labels, weights=weights)) / self.label_std
        return float(np.average(errors**2, weights=weights))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * self.label_std + self.label_mean

    def columns(self, all_probabilities: bool) -> list[str]:
        return ["score"]

    def prediction_cells(self, row: Sequence[float], all_probabilities: bool, abstain_below: float = 0.0) -> list[Any]:
        return [round(row[0], 6)]

    def mistakes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Callable[[int], list[str]]]:
        """All rows, the largest errors first."""
        errors = probabilities[:, 0] - labels
        order = np.argsort(-np.abs(errors), kind="stable")
        return order, lambda row: [f"{labels[row]:g}", f"{probabilities[row, 0]:.4g}", f"{errors[row]:+.4g}"]

    def curves(self, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        return iter(())

    def is_prediction_changed(self, probabilities: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Whether a score differs by more than 0.05 std of the scores."""
        return np.asarray(np.abs(probabilities - expected)[:, 0] > 0.05 * expected.std())

    def near_ties(self, logits: torch.Tensor, distance: float) -> torch.Tensor:
        """Return False for every row: a score has no decision boundary."""
        return torch.zeros(len(logits), dtype=torch.bool)

    def label_error_scores(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the absolute errors, in units of the labels' std."""
        return np.abs(probabilities[:, 0] - labels) / (labels.std() or 1.0)

    def row_results(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 2]: squared error on the file's scale, predicted score."""
        scores = self.probabilities(logits)
        return torch.cat([(scores - labels.to(scores.dtype)[:, None]).square(), scores], dim=1)

    def metrics(self, results: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        squares, scores = results.astype(np.float64).T
        return {
            "loss": float(squares.mean()),
            "rmse": math.sqrt(squares.mean()),
            "mae": float(np.abs(scores - labels).mean()),
            "pearson": metric.pearson(scores, labels.astype(np.float64)),
            "spearman": metric.spearman(scores, labels.astype(np.float64)),
            "rows": len(labels),
        }

    def per_label(self, results: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def confusion(self, results: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.empty((0, 0), np.int64)

    def logits_of(self, probabilities: np.ndarray) -> np.ndarray:
        return np.asarray((probabilities.astype(np.float64) - self.label_mean) / self.label_std)

    def soft_labels(self, probabilities: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        return probabilities[:, 0]

    def constant_prediction(self, probabilities: np.ndarray) -> str:
        """Return the mean score: whether scores are the same is a matter of their std alone."""
        return f"{probabilities.mean():.4g}"

    def is_near_constant_baseline(self, probabilities: np.ndarray, labels: np.ndarray) -> bool:
        return metric.pearson(probabilities[:, 0], labels) < 0.2

    card_note = "The output is a score in the file's scale; transformers' pipeline needs `function_to_apply='none'`."

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        return {"score": (logits, "FLOAT", [1])}

    def parse_exported_outputs(self, outputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        scores = np.asarray(outputs[0])
        return [round(score, 6) for score in scores[:, 0].tolist()], scores

    @staticmethod
    def torchscript_prediction(logits: torch.Tensor, names: list[str], thresholds: torch.Tensor) -> Any:
        return logits


Task = SingleLabel | MultiLabel | Regression
TASKS: tuple[type[Task], ...] = (SingleLabel, MultiLabel, Regression)
BY_TYPE = {kind.problem_type: kind for kind in TASKS}
NamesInFiles = Iterable[Sequence[str]]  # the names of labels 0, 1, ... that files themselves contain


def task_kind(config: Config, labels: Iterable[str]) -> type[Task]:
    """Return the class of --task, or for `auto`, the one whose `matches_labels` accepts the training labels."""
    if config.task != "auto":
        return next(kind for kind in TASKS if kind.option == config.task)
    if config.label_delimiter:
        return MultiLabel
    known, positional = config.label_names or (), are_positional(labels := list(labels))
    values = {label: split_labels(label, None, known, positional) for label in labels if label not in MISSING}
    ids = {*known, *map(str, range(len(known)))}  # that cells may list if --label-names names them
    if any(type(values[label]) is dict and {*values[label]} <= ids for label in values if label[0] not in "[{"):
        return MultiLabel
    return next((kind for kind in TASKS if kind.matches_labels(values)), SingleLabel)


def stored_task(problem_type: str, label_names: list[str], thresholds: Sequence[float] = ()) -> Task:
    """Return the task of a model folder; KeyError for an unknown problem type."""
    return BY_TYPE[problem_type](label_names, thresholds=tuple(thresholds))


def at_temperature(task: Task, temperature: float) -> Task:
    """Return the task with thresholds that give the same labels once logits are divided by the temperature."""
    if temperature == 1:
        return task
    logits = torch.tensor(task.thresholds, dtype=torch.float64).logit() / temperature
    return replace(task, thresholds=tuple(logits.sigmoid().tolist()))


def main_metric(metrics: Mapping[str, Any]) -> float:
    """Return the metric that chooses best/ by default."""
    return float(next(metrics[kind.best_metric] for kind in TASKS if kind.best_metric in metrics))


def problem_type_of(stated: str | None, outputs: int) -> str:
    """Return the problem type of a stored head: one output means regression, whatever `config.json` says."""
    return Regression.problem_type if outputs == 1 else stated or SingleLabel.problem_type


def can_predict(problem_type: str, label_names: Sequence[str]) -> bool:
    """Whether a task here has heads of this type, with so many outputs."""
    return problem_type in BY_TYPE and (BY_TYPE[problem_type] is Regression) == (len(label_names) == 1)


def check_options(task: Task, options: object) -> None:
    """Raise UserError for an option, of a run or of a program, that makes no sense for the task."""
    for name, why in task.unsupported_options.items():
        default = OPTIONS[name].default if name in OPTIONS else None
        if (value := getattr(options, name, default)) and value != default:
            raise UserError(f"{flag(name)} does not go with this task ({task.problem_type}): {why}")
    if isinstance(options, Config):
        weights = _explicit_weights(options.class_weights)
        choices = [*task.best_by_choices, "mean", *options.eval_splits[1:]]
        if weights is not None and len(weights) != task.outputs:
            raise UserError(f"--class-weights has {len(weights)} numbers, but there are {task.outputs} classes")
        if options.best_by not in (None, *choices):
            raise UserError(f"--best-by is one of {', '.join(choices)}, not {options.best_by}")


def _explicit_weights(weights: str | None) -> torch.Tensor | None:
    """Return the numbers of `--class-weights`, fp32; None if it has none."""
    if weights is None or weights == "balanced":
        return None
    return torch.tensor([float(weight) for weight in weights.split(",")])


def _find_classes(
    config: Config, labels: LabelCounts, names_in_files: NamesInFiles, path: object, is_complete: bool
) -> tuple[list[str], dict[str, int]]:
    """Return label names and `label_ids`; if `is_complete`, every row lists all labels in the order of their ids."""
    if config.label_names:
        return resolve_label_names(config.label_names, labels, path)
    names = list(labels) if is_complete else find_label_names(labels, path)
    for named in (each for each in names_in_files if {*names} < {*each}):  # the training rows lack some
        names = find_label_names(dict.fromkeys(named, (0, 1)), path)
    return names, {str(i): names.index(name) for each in names_in_files for i, name in enumerate(each) if name in names}


def _split(text: str, delimiter: str | None, known: Iterable[str], positional: bool) -> LabelValues:
    values = split_labels(text, delimiter, known, positional)
    return values if isinstance(values, dict) else {canonical(values): 1.0} if values not in MISSING else {}


def _micro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(2 * (predicted & true).sum() / max(1, predicted.sum() + true.sum()))
