"""The task: everything that differs between kinds of labels, from a file's cell to an exported model's answer.

There are three: one of several classes, any number of labels, a score. No other module says softmax, argmax or
accuracy, or knows a task's name; they ask `Task`, whichever a run or a model has. To add one, write a class with the
same methods here, and enter it in `TASKS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Callable, ClassVar, List, Tuple, Union  # noqa: UP035 (TorchScript knows these only)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sst2_xlmr import labels as reading
from sst2_xlmr.config import ABSTAINED, OPTIONS, Config, flag
from sst2_xlmr.evaluation import metrics as metric
from sst2_xlmr.labels import MISSING, LabelValues, is_fraction, is_number, label_text, listed
from sst2_xlmr.util.errors import UserError

SST2_NAMES = ["negative", "positive"]
_SMALLEST = float(np.finfo(np.float32).tiny)  # a probability that was rounded to 0
# See `collapse_reason`: a text's log-probabilities deviate less over the texts than this part of what they did before
# training. Six collapsed runs of the small encoder were at 0 to 0.16 of it.
_COLLAPSED_DEVIATION = 0.3
_USELESS_LOSS, _USELESS_ACCURACY = 0.98, 0.2
_NO_PROBABILITIES = "a score has no probabilities"
ERRORS = ("loss", "rmse", "mae")  # metrics of which the lower is better
Seen = Mapping[str, Sequence[int]]  # a file's labels, by `label_text` -> rows, and line of the first
Weights = Union[np.ndarray, None]  # float [rows], of the rows' losses; None for ones


@dataclass(frozen=True)
class SingleLabel:
    """Every text has one of several classes: softmax, cross-entropy, accuracy.

    Attributes:
        label_names: of the classes 0, 1, ...
        label_smoothing: probability mass that the loss spreads evenly over all classes.
        class_weights: fp32 [classes], factors on the loss of the rows of each class; None for ones.
        label_numbers: the classes' numbers by what stands for them in files besides their names; None for 0, 1, ...,
            unless names are integers themselves.
        is_soft: whether a row's label is the probabilities of all classes.
    """

    label_names: list[str]
    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None
    label_numbers: dict[str, int] | None = None
    is_soft: bool = False

    problem_type = "single_label_classification"  # transformers' word for it
    option = "single-label"  # of --task
    may_be_empty = False  # whether a row without a label is one
    best_metric = "accuracy"  # the one that chooses best/
    best_metrics = ("accuracy", "macro_f1", "loss")  # those that can; but for errors, higher is better
    scalars = ("loss", "accuracy", "macro_f1", "ece")  # the metrics with a curve
    # The metrics on a model card: their types and names on the Hub.
    hub_metrics: ClassVar = {"accuracy": ("accuracy", "accuracy"), "macro_f1": ("f1", "macro F1")}
    refused: ClassVar[dict[str, str]] = {  # options that make no sense here, and why
        "threshold_for": "the most probable class is the answer, without a threshold",
        "label_delimiter": "a row has one label",
    }
    thresholds: ClassVar[tuple[float, ...]] = ()
    folding = (1.0, 0.0)  # factor and offset that an exported head takes over
    initial_bias: ClassVar[tuple[float, ...]] = ()  # of a new head; without one, zeros

    @property
    def label_dtype(self) -> type:
        """Of a row's label in the token cache: the class's number, or fp32, the classes' probabilities."""
        return np.float32 if self.is_soft else np.int32

    @property
    def read_as(self) -> object:
        """What decides how labels are read, besides their names and numbers."""
        return self.is_soft

    # --- labels in files

    @classmethod
    def from_labels(cls, config: Config, labels: Seen, others: Seen, said: Names, path: object) -> SingleLabel:
        """Return the task with the classes of the options, or of the training files; see `find_task`."""
        values = [reading.split_labels(text) for text in labels if text.startswith(("[", "{"))]
        if is_soft := any(isinstance(each, dict) and len(each) > 1 for each in values):
            labels = dict.fromkeys((str(name) for each in values for name in each), (1, 1))
        if config.label_names:
            has_numbers = any(label.isdecimal() for label in labels)  # else they are in other files, if anywhere
            names, numbers = reading.numbers_for(config.label_names, labels if has_numbers else others, path)
        else:  # what the training file calls its numbers holds for the other files, too
            names = list(labels) if is_soft else reading.find_label_names(labels, path)
            numbers = {str(i): names.index(name) for each in said for i, name in enumerate(each) if name in names}
        return cls(names, label_numbers=numbers, is_soft=is_soft)

    @classmethod
    def is_for(cls, labels: Mapping[str, str | LabelValues]) -> bool:
        """Whether labels, and what `split_labels` makes of them, are certainly this task's; here, probabilities."""
        several = [list(each.values()) for each in labels.values() if not isinstance(each, str)]
        has_fractions = any(0 < value < 1 for row in several for value in row)
        return has_fractions and all(abs(sum(row) - 1) < 0.01 for row in several)

    def number_of(self, label: str) -> int:
        """Return the class's number for a label (see `label_text`); -1 for no label, -2 for none of the classes."""
        numbers = self._numbers
        if self.is_soft and label.startswith(("[", "{")):
            return 0
        label = label if label in numbers else reading.plain(label)
        return numbers.get(label, -1 if label in MISSING or label == "-1" else -2)

    def read_label(self, cell: object, where: str) -> int | np.ndarray | None:
        """Return a row's label for its cell, None for no label; UserError, beginning with `where`, for another."""
        text = label_text(cell)
        if self.is_soft and text.startswith(("[", "{")):
            row = _label_row(reading.split_labels(text), self._numbers, self.label_names, where)
            if abs(row.sum() - 1) > 0.01:
                raise UserError(f"{where}: the classes' probabilities add up to {row.sum():.4g}, not to 1; mend them")
            return row / row.sum()
        if (number := self.number_of(text)) == -2:
            raise UserError(f"{where}: {self.unknown([text])}")
        if number == -1:
            return None
        return np.eye(self.outputs, dtype=np.float32)[number] if self.is_soft else number

    def unknown(self, labels: Sequence[str]) -> str:
        """Return, for an error, what is wrong with labels that are none of the classes, and the cure."""
        return reading.unknown_labels(labels, self.label_names, self._numbers)

    def notes(self, labels: Seen) -> list[str]:
        """Return what looks wrong in a file's labels."""
        return [] if self.is_soft else reading.notes(labels)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return reading.numbers_by_label(self.label_names, self.label_numbers)

    def label_keys(self, labels: np.ndarray) -> np.ndarray:
        """Return int [rows], equal for rows with equal labels (of soft ones, with the same most probable class)."""
        return labels if labels.ndim == 1 else labels.argmax(1)

    strata = label_keys  # int [rows], of which dev gets its share each when it is cut off

    def label_cell(self, label: Any) -> str:
        """Return a row's label in words."""
        return self.label_names[int(label if np.ndim(label) == 0 else label.argmax())]

    def label_value(self, label: Any) -> Any:
        """Return a row's label as JSON, which `read_label` reads."""
        return dict(zip(self.label_names, label.tolist())) if self.is_soft else self.label_cell(label)

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        """Return how many rows each label has."""
        return dict(zip(self.label_names, np.bincount(self.label_keys(labels), minlength=self.outputs).tolist()))

    def describe_labels(self, labels: np.ndarray) -> str:
        """Return what a file's labels are, for the header."""
        kind = "probabilities of " if self.is_soft else ""
        return kind + listed([f"{label} {rows:,}" for label, rows in self.counts(labels).items()])

    # --- training

    @property
    def outputs(self) -> int:
        """How many logits the head has."""
        return len(self.label_names)

    def for_training(self, config: Config, labels: np.ndarray, weights: Weights, device: torch.device) -> SingleLabel:
        """Return the task with a run's label smoothing and class weights.

        `--class-weights balanced` is rows / (classes * rows of the class): every class has the same weight in all, and
        the mean over the training rows, which have these labels and weights, is 1. UserError if a class has no row.
        """
        factors = _numbers_in(config.class_weights)
        if config.class_weights == "balanced":
            counts = self._prior(labels, weights)
            if not counts.all():
                raise UserError(
                    "--class-weights balanced: the training file has no row of class"
                    f" {self.label_names[int(counts.argmin())]!r}; leave it out of --label-names, or give the weights"
                    " as numbers"
                )
            factors = torch.from_numpy(counts.sum() / (self.outputs * counts)).float()
        factors = None if factors is None else factors.to(device)
        return replace(self, label_smoothing=config.label_smoothing, class_weights=factors)

    def _prior(self, labels: np.ndarray, weights: Weights) -> np.ndarray:
        """Return fp64 [classes], rows of each class, counted by their weights."""
        if labels.ndim == 2:
            return np.asarray((labels if weights is None else labels * weights[:, None]).sum(0, dtype=np.float64))
        return np.bincount(labels, weights, minlength=self.outputs).astype(np.float64)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum over rows of the loss times the weights of the row and of its class, nats; no dimensions.

        Logits are fp32 [rows, classes], labels as in the token cache, weights fp32 [rows] or None. `F.cross_entropy`
        has class weights too, but applies every class's own weight to the smoothed part of a row.
        """
        labels, smoothing = labels if self.is_soft else labels.long(), self.label_smoothing
        if self.class_weights is None and weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if self.class_weights is not None:
            losses = losses * (labels @ self.class_weights if self.is_soft else self.class_weights[labels])
        return (losses if weights is None else losses * weights).sum()

    def baseline_loss(self, labels: np.ndarray, weights: Weights = None) -> float:
        """Return the class-prior baseline: the loss, nats a row, of the best answer that is the same for every text."""
        rows = self._prior(labels, weights)
        counted = rows if self.class_weights is None else rows * self.class_weights.cpu().numpy()
        answer = (1 - self.label_smoothing) * counted / counted.sum() + self.label_smoothing / self.outputs
        entropy = -float(sum(p * math.log(p) for p in answer if p > 0))
        return entropy * float(counted.sum() / rows.sum())

    # --- answers

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return fp32 [rows, classes]."""
        return logits.softmax(-1)

    def columns(self, all_probabilities: bool) -> list[str]:
        """Return the names of the columns that a prediction adds to a row."""
        return ["label", "probability"] + [f"probability_{name}" for name in self.label_names] * all_probabilities

    def cells(self, probabilities: Sequence[float], all_probabilities: bool, abstain_below: float = 0.0) -> list[Any]:
        """Return a row's cells in these columns: its label, or `ABSTAINED` if that is less probable, and numbers."""
        highest = max(probabilities)
        label = self.label_names[probabilities.index(highest)] if highest >= abstain_below else ABSTAINED
        return [label, highest, *(probabilities if all_probabilities else ())]

    def mistakes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Callable[[int], list[str]]]:
        """Return the numbers of the rows that are mistaken, the surest first, and a row's true and predicted answer."""
        found, highest, true = probabilities.argmax(-1), probabilities.max(-1), self.label_keys(labels)
        wrong = np.flatnonzero(found != true)
        order = wrong[np.argsort(-highest[wrong], kind="stable")]
        names = self.label_names
        return order, lambda row: [names[true[row]], names[found[row]], f"{highest[row]:.4f}"]

    def curves(self, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield name, bool [rows] and probability of every label that has a precision-recall curve."""
        true = self.label_keys(labels)
        for number in [1] if self.outputs == 2 else range(self.outputs):
            yield self.label_names[number], true == number, probabilities[:, number]

    def changed(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return bool [rows], whether the answer is another; both are probabilities, [rows, classes]."""
        return np.asarray(found.argmax(1) != expected.argmax(1))

    def near_ties(self, logits: torch.Tensor, distance: float) -> torch.Tensor:
        """Return bool [rows], whether a change of the logits by `distance` may change the answer."""
        best, second = logits.topk(2).values.unbind(1)
        return best - second < distance

    def doubt(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return how doubtful rows' labels are, from -1 to 1; the model that gave the probabilities has not seen them.

        Each class's probability is divided by its average over the rows with that label, as models are surer of some
        classes than of others (but not below chance), and all are scaled to add up to 1; the doubt is the largest of
        another class less that of the given one (after confident learning, Northcutt et al. 2021,
        https://arxiv.org/abs/1911.00068).
        """
        given, rows = self.label_keys(labels), np.arange(len(labels))
        averages = [probabilities[given == i, i].mean() if (given == i).any() else 1.0 for i in range(self.outputs)]
        shares = probabilities / np.maximum(averages, 1 / self.outputs)
        shares /= shares.sum(1, keepdims=True)
        of_given = shares[rows, given]
        shares[rows, given] = -np.inf
        return np.asarray(shares.max(1) - of_given)

    # --- evaluation

    def row_results(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 3], all that metrics need of a row: loss in nats, predicted class, its probability.

        Logits are float [rows, classes], labels as in the token cache.
        """
        labels = labels.to(logits.dtype) if labels.dim() == 2 else labels.long()
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidences, predictions = logits.softmax(-1).max(-1)
        return torch.stack([losses, predictions.to(losses.dtype), confidences], dim=1)

    def metrics(self, results: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return an evaluation's entry for `metrics.jsonl` from all rows' `row_results` and labels.

        Lists have one number per class.
        """
        labels = self.label_keys(labels)
        losses, confidences = results[:, 0].astype(np.float64), results[:, 2].astype(np.float64)
        confusion, rows = self.confusion(results, labels), len(labels)
        right, classes = int(confusion.trace()), metric.per_class(confusion)
        low, high = metric.accuracy_interval(right, rows)
        return {
            "loss": float(losses.sum()) / rows,
            "accuracy": right / rows,
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": metric.macro_f1(confusion),
            "ece": metric.expected_calibration_error(confidences, results[:, 1] == labels),
            "precision": classes["precision"].tolist(),
            "recall": classes["recall"].tolist(),
            "rows": rows,
        }

    def confusion(self, results: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return int64 [labels, predictions]: how many rows of each class got each prediction."""
        return metric.confusion_matrix(self.label_keys(labels), results[:, 1].astype(np.int64), self.outputs)

    def logits_of(self, probabilities: np.ndarray) -> np.ndarray:
        """Return fp64 logits, up to a constant for each row, finite for a probability of 0 too; [rows, classes]."""
        return np.asarray(np.log(probabilities.astype(np.float64).clip(min=_SMALLEST)))

    def results_of(self, probabilities: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return `row_results`, fp64, for probabilities whose logits are divided by a temperature."""
        logits = torch.from_numpy(self.logits_of(probabilities) / temperature)
        return self.row_results(logits, torch.tensor(labels)).numpy()

    def per_label(self, results: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Return precision, recall, f1 and support, [classes] each."""
        return metric.per_class(self.confusion(results, labels))

    def describe(self, metrics: dict[str, Any]) -> str:
        """Return the main metrics in a few words, for a line on the console."""
        return f"accuracy {metrics['accuracy']:.4f}  macro F1 {metrics['macro_f1']:.4f}  loss {metrics['loss']:.4f}"

    def table_cells(self, metrics: dict[str, Any]) -> dict[str, str]:
        """Return a file's cells in the table of evaluated files, by the columns' names."""
        cells = {"accuracy": f"{metrics['accuracy']:.4f}"}
        if "rows" in metrics:  # not a mean of several files
            cells["95 % interval"] = f"{metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f}"
        return {**cells, "macro F1": f"{metrics['macro_f1']:.4f}", "ECE": f"{metrics['ece']:.4f}"}

    # --- collapse (see training/guard)

    def collapse_reason(
        self, probabilities: np.ndarray, untrained: np.ndarray, labels: np.ndarray, has_learned: bool
    ) -> str:
        """Return what shows in the answers to dev that training has collapsed; nothing if it has not.

        Either all texts get the same label with all but the same probability, compared with how the model's answers to
        the same texts differed before training; or the run had learned, and its answers are hardly better than the
        most frequent label alone, in loss and in accuracy: an overfitted model has a high loss, too. Probabilities are
        fp32 [rows, classes], of the model as it is and before its first step; labels int [rows].
        """
        labels, found = self.label_keys(labels), probabilities.argmax(1)
        counts = np.bincount(found)
        label = self.label_names[int(counts.argmax())]
        is_constant = (counts > 0).sum() == 1 and len(np.unique(labels)) > 1
        if is_constant and _deviates_little(self.logits_of(probabilities), self.logits_of(untrained)):
            return f"same prediction for every text of dev, {label!r} with the same probability"
        loss = -float(self.logits_of(probabilities)[np.arange(len(labels)), labels].mean())
        baseline = SingleLabel(self.label_names).baseline_loss(labels)
        accuracy, most = float((found == labels).mean()), np.bincount(labels).max() / len(labels)
        is_useless = loss >= _USELESS_LOSS * baseline and accuracy - most < _USELESS_ACCURACY * (1 - most)
        if has_learned and is_useless:
            return f"the model had learned, but is now hardly better than {label!r} for every text of dev"
        return ""

    card_note = ""  # what a model card says besides

    # --- exported forms

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        """Append label and probabilities to an ONNX graph; returns values, types and sizes of a text by outputs' names.

        `add` adds an operator to the graph and returns its output (see export/onnx).
        """
        probabilities = add("Softmax", logits, axis=-1)
        best = add("ArgMax", probabilities, axis=-1, keepdims=0)
        label = add("Gather", np.array(self.label_names, dtype=object), best)
        return {"label": (label, "STRING", []), "probabilities": (probabilities, "FLOAT", [self.outputs])}

    def answers_of(self, outputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        """Return the answers that an exported form gives, as the first of `cells`, and the probabilities."""
        return list(outputs[0]), np.asarray(outputs[1])

    def torchscript_answer(self) -> nn.Module:
        """Return a scriptable module: logits, fp32 [texts, classes] -> labels, probabilities."""
        return _ScriptedAnswer(self.label_names)


class _ScriptedAnswer(nn.Module):
    """The most probable label of every text, and fp32 [texts, classes], the probabilities of all."""

    def __init__(self, label_names: list[str]) -> None:
        super().__init__()
        self.label_names: List[str] = label_names  # noqa: UP006

    def forward(self, logits: torch.Tensor) -> Tuple[List[str], torch.Tensor]:  # noqa: UP006
        probabilities = logits.softmax(-1)
        best: List[int] = probabilities.argmax(-1).tolist()  # noqa: UP006
        return [self.label_names[index] for index in best], probabilities


@dataclass(frozen=True)
class MultiLabel:
    """A text has any number of labels, also none: a sigmoid and binary cross-entropy each, micro and macro F1.

    What a method returns is said in `SingleLabel`.

    Attributes:
        label_names, label_numbers: as of `SingleLabel`.
        thresholds: of every label's probability, from which on the text has the label; 0.5 each without them.
        positive_weights: fp32 [labels], factors on the loss of the labels that a text has; None for ones.
        initial_bias: of a new head, the logits of the best constant answer. From zeros, the first steps move all texts'
            features in one direction, as most labels are rare: on GoEmotions' 28 labels, training collapsed.
    """

    label_names: list[str]
    label_numbers: dict[str, int] | None = None
    thresholds: tuple[float, ...] = ()
    positive_weights: torch.Tensor | None = None
    initial_bias: tuple[float, ...] = ()
    delimiter: str | None = None

    problem_type = "multi_label_classification"
    option = "multi-label"
    may_be_empty = True
    label_dtype = np.float32  # 1 for the labels of a row, or their probabilities
    best_metric = "macro_f1"
    best_metrics = ("macro_f1", "micro_f1", "exact_match", "mean_average_precision", "loss")
    scalars = ("loss", "macro_f1", "micro_f1", "exact_match", "mean_average_precision", "ece")
    hub_metrics: ClassVar = {"macro_f1": ("f1", "macro F1"), "micro_f1": ("f1", "micro F1")}
    refused: ClassVar[dict[str, str]] = {
        "label_smoothing": "a label is there or not",
        "abstain_below": "a text may have no label: raise the thresholds with --threshold-for in training",
        "glue_submission": "SST-2 has one label for a text",
    }
    folding = (1.0, 0.0)

    @property
    def read_as(self) -> object:
        return self.delimiter

    @property
    def outputs(self) -> int:
        return len(self.label_names)

    @classmethod
    def from_labels(cls, config: Config, labels: Seen, others: Seen, said: Names, path: object) -> MultiLabel:
        delimiter = config.label_delimiter
        parts: dict[str, Sequence[int]] = {}
        for text, seen in labels.items():
            for part in _split(text, delimiter, config.label_names or ()):
                parts.setdefault(str(part), seen)
        if config.label_names:
            names, numbers = reading.numbers_for(config.label_names, parts, path)
            return cls(names, numbers, delimiter=delimiter)
        names = list(parts) if all(text.startswith("{") for text in labels) else reading.find_label_names(parts, path)
        numbers = {str(i): names.index(name) for each in said for i, name in enumerate(each) if name in names}
        return cls(names, numbers, delimiter=delimiter)

    @classmethod
    def is_for(cls, labels: Mapping[str, str | LabelValues]) -> bool:
        """Here: lists or objects, or several labels in a cell each of which stands alone elsewhere."""
        several = {text: each for text, each in labels.items() if isinstance(each, dict) and len(each) > 1}
        alone = {str(name) for text, each in labels.items() if text not in several for name in _names(each)}
        is_written = any(text.startswith(("[", "{")) for text in several)
        return bool(several) and (is_written or {str(name) for each in several.values() for name in each} <= alone)

    def number_of(self, label: str) -> int:
        return -2 if self._unknown_in(label) else 0

    def read_label(self, cell: object, where: str) -> np.ndarray:
        return _label_row(
            _split(label_text(cell), self.delimiter, self._numbers), self._numbers, self.label_names, where
        )

    def unknown(self, labels: Sequence[str]) -> str:
        names = dict.fromkeys(name for label in labels for name in self._unknown_in(label))
        return reading.unknown_labels(list(names), self.label_names, self._numbers)

    def _unknown_in(self, label: str) -> list[str]:
        names = _split(label, self.delimiter, self._numbers)
        return [str(name) for name in names if _place(name, self._numbers, self.outputs) is None]

    def notes(self, labels: Seen) -> list[str]:
        parts: dict[str, list[int]] = {}
        for label, (count, line) in labels.items():
            for part in _split(label, self.delimiter, self._numbers):
                parts[str(part)] = [parts.get(str(part), [0, 0])[0] + count, line]
        return reading.notes(parts)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return reading.numbers_by_label(self.label_names, self.label_numbers)

    def label_keys(self, labels: np.ndarray) -> np.ndarray:
        factors = np.random.RandomState(0).randint(1, 2**62, labels.shape[1])
        return np.asarray((labels * 2**20).astype(np.int64) @ factors)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Return every row's rarest label, or -1."""
        order = np.argsort(labels.sum(0), kind="stable")
        has = labels[:, order] > 0.5
        return np.where(has.any(1), order[has.argmax(1)], -1)

    def label_cell(self, label: np.ndarray) -> str:
        return ", ".join(self._names_of(label > 0.5)) or "(none)"

    def _names_of(self, has: np.ndarray) -> list[str]:
        return [self.label_names[number] for number in np.flatnonzero(has)]

    def label_value(self, label: np.ndarray) -> dict[str, float]:
        return dict(zip(self.label_names, label.tolist()))

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        return dict(zip(self.label_names, (labels > 0.5).sum(0).tolist()))

    def describe_labels(self, labels: np.ndarray) -> str:
        has = labels > 0.5
        none = "" if has.any(1).all() else f", {int((~has.any(1)).sum()):,} rows have none"
        some = f"several labels a row, {has.sum(1).mean():.2f} on average{none}: "
        return some + listed([f"{label} {rows:,}" for label, rows in self.counts(labels).items()])

    # --- training

    def for_training(self, config: Config, labels: np.ndarray, weights: Weights, device: torch.device) -> MultiLabel:
        """`--class-weights balanced` is, of each label, the rows without it / the rows with it."""
        factors = _numbers_in(config.class_weights)
        if config.class_weights == "balanced":
            prior = self._prior(labels, weights)
            factors = torch.from_numpy(np.where(prior > 0, (1 - prior) / prior.clip(1e-9), 1.0)).float()
        task = replace(self, positive_weights=None if factors is None else factors.to(device))
        answer = task._best_constant(labels, weights)[-1].clip(1e-3, 1 - 1e-3)
        return replace(task, initial_bias=tuple(np.log(answer / (1 - answer)).tolist()))

    def _prior(self, labels: np.ndarray, weights: Weights) -> np.ndarray:
        """Return fp64 [labels], the share of the rows that have each label."""
        return np.average(labels.astype(np.float64), axis=0, weights=weights)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum over rows of the mean over labels, as transformers has it."""
        factors = self.positive_weights
        losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=factors, reduction="none").mean(1)
        return (losses if weights is None else losses * weights).sum()

    def baseline_loss(self, labels: np.ndarray, weights: Weights = None) -> float:
        prior, has, answer = self._best_constant(labels, weights)
        answer = answer.clip(_SMALLEST, 1 - 1e-12)
        return float(-(has * np.log(answer) + (1 - prior) * np.log1p(-answer)).mean())

    def _best_constant(self, labels: np.ndarray, weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return fp64 [labels]: shares of the rows, these times the label's weight, probabilities of least loss."""
        prior = self._prior(labels, weights)
        has = prior if self.positive_weights is None else prior * self.positive_weights.cpu().numpy()
        return prior, has, has / (has + 1 - prior)

    # --- answers

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    @property
    def cuts(self) -> list[float]:
        """The labels' thresholds, fitted or not."""
        return list(self.thresholds) or [0.5] * self.outputs

    def _has(self, probabilities: np.ndarray) -> np.ndarray:
        """Return bool [rows, labels], whether a label is predicted."""
        return np.asarray(probabilities >= np.array(self.cuts, np.float32))

    def columns(self, all_probabilities: bool) -> list[str]:
        return ["labels", "probabilities"] + [f"probability_{name}" for name in self.label_names] * all_probabilities

    def cells(self, probabilities: Sequence[float], all_probabilities: bool, abstain_below: float = 0.0) -> list[Any]:
        """Return two lists, the row's labels and their probabilities."""
        numbers = np.flatnonzero(self._has(np.asarray(probabilities, np.float32))).tolist()
        found = [[self.label_names[i] for i in numbers], [round(probabilities[i], 6) for i in numbers]]
        return [*found, *(probabilities if all_probabilities else ())]

    def mistakes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Callable[[int], list[str]]]:
        found, true = self._has(probabilities), labels > 0.5
        distance = np.where(found != true, np.abs(probabilities - true), 0).max(1)
        wrong = np.flatnonzero((found != true).any(1))
        order = wrong[np.argsort(-distance[wrong], kind="stable")]
        return order, lambda row: [
            *(", ".join(self._names_of(side[row])) for side in (true, found)),
            f"{1 - distance[row]:.4f}",
        ]

    def curves(self, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for number, name in enumerate(self.label_names):
            yield name, labels[:, number] > 0.5, probabilities[:, number]

    def changed(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        return np.asarray((self._has(found) != self._has(expected)).any(1))

    def near_ties(self, logits: torch.Tensor, distance: float) -> torch.Tensor:
        """A tie is between a label's logit and its threshold's, which does not change: half the distance is near."""
        cuts = torch.tensor(self.cuts, dtype=logits.dtype).logit()
        return (logits - cuts).abs().amin(1) < distance / 2

    def doubt(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the largest of the labels' doubts."""
        both = np.stack([1 - probabilities, probabilities], 2)
        sides = (
            SingleLabel(["no", "yes"]).doubt(both[:, i], (labels[:, i] > 0.5).astype(int)) for i in range(self.outputs)
        )
        return np.max(list(sides), axis=0)

    # --- evaluation

    def row_results(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 1 + labels]: loss in nats, the mean over labels, and the labels' probabilities."""
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)
        return torch.cat([losses[:, None], logits.sigmoid()], dim=1)

    def metrics(self, results: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Those `_at_0.5` are without fitted thresholds. The calibration error is over all labels of all rows."""
        probabilities, true = results[:, 1:].astype(np.float64), labels > 0.5
        found, each = self._has(results[:, 1:]), self.per_label(results, labels)
        plain = replace(self, thresholds=()).per_label(results, labels)
        confidences = np.maximum(probabilities, 1 - probabilities).reshape(-1)
        return {
            "loss": float(results[:, 0].astype(np.float64).mean()),
            "macro_f1": float(each["f1"].mean()),
            "micro_f1": _micro_f1(found, true),
            **({"macro_f1_at_0.5": float(plain["f1"].mean())} if self.thresholds else {}),
            **({"micro_f1_at_0.5": _micro_f1(probabilities >= 0.5, true)} if self.thresholds else {}),
            "exact_match": float((found == true).all(1).mean()),
            "mean_average_precision": metric.mean_average_precision(probabilities, true),
            "ece": metric.expected_calibration_error(confidences, ((probabilities >= 0.5) == true).reshape(-1)),
            **{key: each[key].tolist() for key in ("precision", "recall")},
            "rows": len(labels),
        }

    def per_label(self, results: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        found, true = self._has(results[:, 1:]), labels > 0.5
        return metric.per_label((found & true).sum(0), found.sum(0), true.sum(0))

    def confusion(self, results: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return int64 [labels, labels]: of the rows with each label, how many were given each."""
        return np.asarray((labels > 0.5).T.astype(np.int64) @ self._has(results[:, 1:]).astype(np.int64))

    def logits_of(self, probabilities: np.ndarray) -> np.ndarray:
        p = probabilities.astype(np.float64).clip(_SMALLEST, 1 - 2.0**-25)
        return np.asarray(np.log(p) - np.log1p(-p))

    def results_of(self, probabilities: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        logits = torch.from_numpy(self.logits_of(probabilities) / temperature)
        results = self.row_results(logits, torch.tensor(labels)).numpy()
        if temperature == 1:
            results[:, 1:] = probabilities  # not rounded once more, beside a threshold
        return results

    def describe(self, metrics: dict[str, Any]) -> str:
        f1 = [f"{kind} F1 {metrics[f'{kind}_f1']:.4f}" for kind in ("macro", "micro")]
        if "macro_f1_at_0.5" in metrics:
            f1 = [f"{text} ({metrics[f'{text[:5]}_f1_at_0.5']:.4f} at 0.5)" for text in f1]
        return f"{'  '.join(f1)}  loss {metrics['loss']:.4f}"

    def table_cells(self, metrics: dict[str, Any]) -> dict[str, str]:
        names = {"macro_f1": "macro F1", "micro_f1": "micro F1", "exact_match": "exact match"}
        names["mean_average_precision"] = "mean AP"
        return {name: f"{metrics[key]:.4f}" for key, name in names.items()}

    def collapse_reason(
        self, probabilities: np.ndarray, untrained: np.ndarray, labels: np.ndarray, has_learned: bool
    ) -> str:
        true = labels > 0.5
        is_constant = len(np.unique(self._has(probabilities), axis=0)) == 1 and len(np.unique(true, axis=0)) > 1
        if is_constant and _deviates_little(self.logits_of(probabilities), self.logits_of(untrained)):
            return "same prediction for every text of dev, with the same probabilities"
        results, baseline = self.results_of(probabilities, labels), MultiLabel(self.label_names).baseline_loss(labels)
        gain, prior = metric.mean_average_precision(probabilities, true), float(true.mean())
        if has_learned and results[:, 0].mean() >= _USELESS_LOSS * baseline and gain - prior < 0.1 * (1 - prior):
            return "the model had learned, but is now hardly better than the same answer for every text of dev"
        return ""

    @property
    def card_note(self) -> str:
        thresholds = ", ".join(f"{name} {cut:.3g}" for name, cut in zip(self.label_names, self.thresholds))
        return "A text has every label whose probability, a sigmoid, reaches the label's threshold" + (
            f": {thresholds}. They were fitted on dev, so its metrics are a little optimistic."
            if thresholds
            else " of 0.5."
        )

    # --- exported forms

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        """Append, of every label, whether the text has it, and its probability; `label_names` is in the metadata."""
        probabilities = add("Sigmoid", logits)
        has = add("GreaterOrEqual", probabilities, np.array(self.cuts, np.float32))
        return {"labels": (has, "BOOL", [self.outputs]), "probabilities": (probabilities, "FLOAT", [self.outputs])}

    def answers_of(self, outputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        found, probabilities = outputs
        return found if isinstance(found, list) else [self._names_of(row) for row in found], np.asarray(probabilities)

    def torchscript_answer(self) -> nn.Module:
        return _ScriptedLabels(self.label_names, self.cuts)


class _ScriptedLabels(nn.Module):
    """The labels of every text, and fp32 [texts, labels], the probabilities of all."""

    def __init__(self, label_names: list[str], thresholds: list[float]) -> None:
        super().__init__()
        self.label_names: List[str] = label_names  # noqa: UP006
        self.thresholds = torch.tensor(thresholds)

    def forward(self, logits: torch.Tensor) -> Tuple[List[List[str]], torch.Tensor]:  # noqa: UP006
        probabilities = logits.sigmoid()
        found: List[List[str]] = []  # noqa: UP006
        for row in probabilities >= self.thresholds:
            numbers: List[int] = torch.nonzero(row)[:, 0].tolist()  # noqa: UP006
            found.append([self.label_names[index] for index in numbers])
        return found, probabilities


@dataclass(frozen=True)
class Regression:
    """Every text has a score: one output, mean squared error, correlations.

    Training is on scores of mean 0 and deviation 1; an exported head gives the file's own. What a method returns is
    said in `SingleLabel`; what is called a probability there is a score here, [rows, 1].

    Attributes:
        mean, deviation: of the training rows' scores; 0 and 1 for a model that was exported.
    """

    label_names: list[str]
    mean: float = 0.0
    deviation: float = 1.0

    problem_type = "regression"
    option = "regression"
    may_be_empty = False
    label_dtype = np.float32
    best_metric = "spearman"
    best_metrics = ("spearman", "pearson", "rmse", "mae", "loss")
    scalars = ("loss", "rmse", "mae", "pearson", "spearman")
    hub_metrics: ClassVar = {"spearman": ("spearmanr", "spearman"), "pearson": ("pearsonr", "pearson")}
    refused: ClassVar[dict[str, str]] = {
        "label_names": "a score has no name",
        "label_smoothing": "a score has no classes",
        "class_weights": "a score has no classes; --weight-column weighs rows",
        "calibrate": _NO_PROBABILITIES,
        "temperature": _NO_PROBABILITIES,
        "abstain_below": _NO_PROBABILITIES,
        "all_probabilities": _NO_PROBABILITIES,
        "glue_submission": _NO_PROBABILITIES,
        "threshold_for": _NO_PROBABILITIES,
        "label_delimiter": "a row has one score",
    }
    thresholds: ClassVar[tuple[float, ...]] = ()
    initial_bias: ClassVar[tuple[float, ...]] = ()
    label_numbers: ClassVar[None] = None
    read_as: ClassVar[object] = None
    outputs = 1

    @property
    def folding(self) -> tuple[float, float]:
        return self.deviation, self.mean

    @classmethod
    def from_labels(cls, config: Config, labels: Seen, others: Seen, said: Names, path: object) -> Regression:
        task = cls(["score"])
        for label, (_, line) in labels.items():
            if task.number_of(label) == -2:
                raise UserError(f"{path}, line {line}: {task.unknown([label])}")
        if len(set(labels) - MISSING) < 2:
            raise UserError(f"{path}: all rows have the same score; name the column of scores with --label-column")
        return task

    @classmethod
    def is_for(cls, labels: Mapping[str, str | LabelValues]) -> bool:
        """Here: numbers, and some of them fractions."""
        return all(map(is_number, labels)) and any(map(is_fraction, labels))

    def number_of(self, label: str) -> int:
        return -1 if label in MISSING else -2 if _score(label) is None else 0

    def read_label(self, cell: object, where: str) -> float | None:
        text = label_text(cell)
        if text in MISSING:
            return None
        if (score := _score(text)) is None:
            raise UserError(f"{where}: {self.unknown([text])}")
        return score

    def notes(self, labels: Seen) -> list[str]:
        return []

    def unknown(self, labels: Sequence[str]) -> str:
        return f"label {labels[0][:40]!r} is no number, as a score is; mend it"

    def label_keys(self, labels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(labels, np.float32).view(np.int32)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Return in which tenth of the scores every row lies."""
        return np.searchsorted(np.quantile(labels, np.arange(1, 10) / 10), labels)

    def label_cell(self, label: float) -> str:
        return f"{label:g}"

    def label_value(self, label: float) -> float:
        return float(label)

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        return {}

    def describe_labels(self, labels: np.ndarray) -> str:
        return (
            f"scores from {labels.min():g} to {labels.max():g}, mean {labels.mean():.4g}, deviation {labels.std():.4g}"
        )

    # --- training

    def for_training(self, config: Config, labels: np.ndarray, weights: Weights, device: torch.device) -> Regression:
        mean = float(np.average(labels.astype(np.float64), weights=weights))
        deviation = math.sqrt(np.average((labels.astype(np.float64) - mean) ** 2, weights=weights))
        return replace(self, mean=mean, deviation=deviation or 1.0)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum over rows of the squared error of the scaled scores."""
        errors = (logits[:, 0] - (labels - self.mean) / self.deviation).square()
        return (errors if weights is None else errors * weights).sum()

    def baseline_loss(self, labels: np.ndarray, weights: Weights = None) -> float:
        errors = (labels.astype(np.float64) - np.average(labels, weights=weights)) / self.deviation
        return float(np.average(errors**2, weights=weights))

    # --- answers

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * self.deviation + self.mean

    def columns(self, all_probabilities: bool) -> list[str]:
        return ["score"]

    def cells(self, probabilities: Sequence[float], all_probabilities: bool, abstain_below: float = 0.0) -> list[Any]:
        return [round(probabilities[0], 6)]

    def mistakes(self, probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Callable[[int], list[str]]]:
        """All rows, the largest errors first."""
        errors = probabilities[:, 0] - labels
        order = np.argsort(-np.abs(errors), kind="stable")
        return order, lambda row: [f"{labels[row]:g}", f"{probabilities[row, 0]:.4g}", f"{errors[row]:+.4g}"]

    def curves(self, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        return iter(())

    def changed(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Whether a score differs by more than a twentieth of the scores' deviation."""
        return np.asarray(np.abs(found - expected)[:, 0] > 0.05 * expected.std())

    def near_ties(self, logits: torch.Tensor, distance: float) -> torch.Tensor:
        """None: a score changes by as much wherever it is."""
        return torch.zeros(len(logits), dtype=torch.bool)

    def doubt(self, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the errors, in deviations of the scores."""
        return np.abs(probabilities[:, 0] - labels) / (labels.std() or 1.0)

    # --- evaluation

    def row_results(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 2]: squared error in the file's units, and the score."""
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
        return probabilities.astype(np.float64)

    def results_of(self, probabilities: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        return np.stack([(probabilities[:, 0] - labels) ** 2, probabilities[:, 0]], 1)

    def describe(self, metrics: dict[str, Any]) -> str:
        return f"Spearman {metrics['spearman']:.4f}  Pearson {metrics['pearson']:.4f}  RMSE {metrics['rmse']:.4f}"

    def table_cells(self, metrics: dict[str, Any]) -> dict[str, str]:
        names = {"spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE", "mae": "MAE"}
        return {name: f"{metrics[key]:.4f}" for key, name in names.items()}

    def collapse_reason(
        self, probabilities: np.ndarray, untrained: np.ndarray, labels: np.ndarray, has_learned: bool
    ) -> str:
        if len(np.unique(labels)) > 1 and _deviates_little(probabilities, untrained):
            return f"same score for every text of dev, {probabilities.mean():.4g}"
        is_useless = ((probabilities[:, 0] - labels) ** 2).mean() >= _USELESS_LOSS * labels.var()
        if has_learned and is_useless and metric.pearson(probabilities[:, 0], labels) < 0.2:
            return "the model had learned, but is now hardly better than the same score for every text of dev"
        return ""

    card_note = (
        "The one output is a score in the training file's scale: in transformers' pipeline, `function_to_apply='none'`."
    )

    # --- exported forms

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        return {"score": (logits, "FLOAT", [1])}

    def answers_of(self, outputs: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        scores = np.asarray(outputs[0])
        return [round(score, 6) for score in scores[:, 0].tolist()], scores

    def torchscript_answer(self) -> nn.Module:
        return nn.Identity()


Task = Union[SingleLabel, MultiLabel, Regression]
TASKS: tuple[type[Task], ...] = (SingleLabel, MultiLabel, Regression)
BY_TYPE = {kind.problem_type: kind for kind in TASKS}
Names = Iterable[Sequence[str]]  # the label names that files themselves say


def find_task(config: Config, labels: Seen, others: Seen, said: Names, path: object) -> Task:
    """Return the task, with its labels; UserError if the labels do not go with it, or with the options.

    Args:
        labels: of the training files.
        others: of all files.
        said: the names of the labels 0, 1, ... where files themselves say them.
        path: of the training file, for errors.
    """
    task = task_kind(config, labels).from_labels(config, labels, others, said, path)
    check_options(task, config)
    return task


def task_kind(config: Config, labels: Iterable[str]) -> type[Task]:
    """Return the task that is asked for, or that is certain from the training files' labels; else a single label."""
    if config.task != "auto":
        return next(kind for kind in TASKS if kind.option == config.task)
    if config.label_delimiter:
        return MultiLabel
    known = config.label_names or ()
    values = {label: reading.split_labels(label, None, known) for label in labels if label not in MISSING}
    return next((kind for kind in TASKS if kind.is_for(values)), SingleLabel)


def stored_task(problem_type: str, label_names: list[str], thresholds: Sequence[float] = ()) -> Task:
    """Return the task of a model's folder; KeyError if there is none of that type."""
    return with_thresholds(BY_TYPE[problem_type](label_names), thresholds)


def with_numbers(task: Task, label_numbers: dict[str, int]) -> Task:
    """Return the task with what stands for its labels in files; see `SingleLabel`."""
    return task if isinstance(task, Regression) else replace(task, label_numbers=label_numbers)


def with_thresholds(task: Task, thresholds: Sequence[float]) -> Task:
    return replace(task, thresholds=tuple(thresholds)) if isinstance(task, MultiLabel) else task


def fit_thresholds(task: Task, probabilities: np.ndarray, labels: np.ndarray, threshold_for: str | None) -> list[float]:
    """Return the thresholds with the best F1 on dev, or with `precision=P` or `recall=R`; none if a task has none."""
    if not isinstance(task, MultiLabel):
        return []
    aim, _, floor = (threshold_for or "f1").partition("=")
    columns = zip(probabilities.T, (labels > 0.5).T)
    return [round(metric.fitted_threshold(scores, has, aim, float(floor or 0)), 6) for scores, has in columns]


def at_temperature(task: Task, temperature: float) -> Task:
    """Return the task whose thresholds cut logits that are divided by a temperature where these cut them."""
    if temperature == 1 or not isinstance(task, MultiLabel):
        return task
    logits = torch.tensor(task.thresholds, dtype=torch.float64).logit() / temperature
    return with_thresholds(task, logits.sigmoid().tolist())


def as_labels(task: Task, probabilities: np.ndarray, temperature: float = 1.0) -> tuple[Task, np.ndarray]:
    """Return the task whose labels may be a teacher's answers, and the answers, [rows, outputs], as such labels.

    The logits are divided by a temperature: below 1 the answers become more certain.
    """
    if isinstance(task, Regression):
        return task, probabilities[:, 0]
    logits = torch.from_numpy(task.logits_of(probabilities) / temperature)
    labels = task.probabilities(logits).double().numpy().round(6)
    return replace(task, is_soft=True) if isinstance(task, SingleLabel) else task, labels


def main_metric(metrics: Mapping[str, Any]) -> float:
    """Return the metric of an evaluation by which its task is judged."""
    return float(next(metrics[kind.best_metric] for kind in TASKS if kind.best_metric in metrics))


def problem_type_of(stated: str | None, outputs: int) -> str:
    """Return the type of a folder's head: one output is a score, whatever `config.json` says."""
    return Regression.problem_type if outputs == 1 else stated or SingleLabel.problem_type


def can_answer(problem_type: str, label_names: Sequence[str]) -> bool:
    """Whether a head of this type, with these outputs, is one of a task here."""
    return problem_type in BY_TYPE and (BY_TYPE[problem_type] is Regression) == (len(label_names) == 1)


def check_options(task: Task, options: object) -> None:
    """Raise UserError for an option, of a run or of a program, that does not go with the task."""
    for name, why in task.refused.items():
        default = OPTIONS[name].default if name in OPTIONS else None
        if (value := getattr(options, name, default)) and value != default:
            raise UserError(f"{flag(name)} does not go with this task ({task.problem_type}): {why}")
    if isinstance(options, Config):
        given, names = options.class_weights, [*task.best_metrics, "mean", *options.eval_splits[1:]]
        if given not in (None, "balanced") and (weights := str(given).count(",") + 1) != task.outputs:
            raise UserError(f"--class-weights has {weights} numbers, but there are {task.outputs} classes")
        if options.best_by not in (None, *names):
            raise UserError(f"--best-by is one of {', '.join(names)}, not {options.best_by}")


def _numbers_in(weights: str | None) -> torch.Tensor | None:
    """Return fp32 numbers of `--class-weights`, if they are given as such."""
    given = weights not in (None, "balanced")
    return torch.tensor([float(weight) for weight in str(weights).split(",")]) if given else None


def _names(values: LabelValues | str) -> Iterable[str | int]:
    return [values] if isinstance(values, str) else values


def _split(text: str, delimiter: str | None, known: Iterable[str]) -> LabelValues:
    values = reading.split_labels(text, delimiter, known)
    return values if isinstance(values, dict) else {reading.plain(values): 1.0} if values not in MISSING else {}


def _place(name: str | int, numbers: Mapping[str, int], count: int) -> int | None:
    """Return the number of one of `count` labels, given by name or by position; None if it is none of them."""
    place = name if isinstance(name, int) else numbers.get(name)
    return place if place is not None and place < count else None


def _label_row(values: LabelValues | str, numbers: Mapping[str, int], names: Sequence[str], where: str) -> np.ndarray:
    """Return fp32 [labels] for what a cell says; UserError, beginning with `where`, if that is none of the labels."""
    row = np.zeros(len(names), np.float32)
    if isinstance(values, dict) and 0 in values.values() and len(values) < len(names):
        absent = [name for name in names if name not in values]
        raise UserError(f"{where}: the label has numbers, but none for {listed(absent)}; give one for every label")
    for name, value in values.items() if isinstance(values, dict) else ((values, 1.0),):
        if (place := _place(name, numbers, len(names))) is None:
            raise UserError(f"{where}: {reading.unknown_labels([str(name)], names, numbers)}")
        if not 0 <= value <= 1:
            raise UserError(f"{where}: label {name!r} has {value:g}, which is neither 0, 1 nor a probability; mend it")
        row[place] = value
    return row


def _score(text: str) -> float | None:
    """Return a number, which may be written with a decimal comma; None for anything else."""
    text = text.replace(",", ".") if text.count(",") == 1 and "." not in text else text
    return float(text) if is_number(text) else None


def _micro_f1(found: np.ndarray, true: np.ndarray) -> float:
    return float(2 * (found & true).sum() / max(1, found.sum() + true.sum()))


def _deviates_little(now: np.ndarray, untrained: np.ndarray) -> bool:
    """Whether logits, [rows, outputs], differ over the rows much less than those before training."""
    return float(now.std(0).max()) <= _COLLAPSED_DEVIATION * float(untrained.std(0).max())
