"""The task: everything that differs between kinds of labels, from a file's cell to an exported model's answer.

There is one so far, `SingleLabel`. No other module says softmax, argmax or accuracy; they ask `Task`, which stands for
whichever task a run or a model has. To add one, write a class with the same methods here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Callable, List, Tuple  # noqa: UP035 (TorchScript knows these only)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sst2_xlmr.config import MAX_CLASSES, Config
from sst2_xlmr.evaluation import metrics as metric
from sst2_xlmr.util.errors import UserError

SST2_NAMES = ["negative", "positive"]
ABSTAINED = "?"  # in place of a label whose probability is too low
_INTEGER = re.compile("0|-?[1-9][0-9]{0,17}")
_FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")
_PARTS = re.compile(r"[,;|]")
_INVISIBLE = re.compile(r"[\W_]")  # what labels that mean the same may differ by
# What files have for no label, as pandas, R, MySQL, SNLI, ... write it. `none` and `NONE` are classes in some.
MISSING = {*("", "-", "?", "NULL", "null", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "None", "\\N")}
_SMALLEST = float(np.finfo(np.float32).tiny)  # a probability that was rounded to 0
# See `collapse_reason`: a text's log-probabilities deviate less over the texts than this part of what they did before
# training. Six collapsed runs of the small encoder were at 0 to 0.16 of it.
_COLLAPSED_DEVIATION = 0.3
_USELESS_LOSS, _USELESS_ACCURACY = 0.98, 0.2


@dataclass(frozen=True)
class SingleLabel:
    """Every text has one of several classes: softmax, cross-entropy, accuracy.

    Attributes:
        label_names: of the classes 0, 1, ...
        label_smoothing: probability mass that the loss spreads evenly over all classes.
        class_weights: fp32 [classes], factors on the loss of the rows of each class; None for ones.
        label_numbers: the classes' numbers by what stands for them in files besides their names; None for 0, 1, ...,
            unless names are integers themselves.
    """

    label_names: list[str]
    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None
    label_numbers: dict[str, int] | None = None

    problem_type = "single_label_classification"  # transformers' word for it
    label_dtype, label_shape = np.int32, ()  # of a row's label in the token cache: the class's number
    best_metric = "accuracy"  # the one that chooses best/; higher is better
    scalars = ("loss", "accuracy", "macro_f1", "ece")  # the metrics with a curve

    # --- labels in files

    @staticmethod
    def find_label_names(found: Mapping[str, Sequence[int]], path: object) -> list[str]:
        """Return the names of a training file's classes, in the order of their numbers.

        Integers are in numerical, words in alphabetical order. `found` has rows and first line of every label, by
        `label_text`. UserError, with the file's path, if there are fewer than two or more than `MAX_CLASSES`, or if
        they are not classes.
        """
        first_lines: dict[str, int] = {}
        for raw, (_, line) in found.items():
            if raw not in MISSING:
                first_lines.setdefault(_plain(raw), line)
        integers = [int(label) for label in first_lines if _INTEGER.fullmatch(label)]
        is_from_0 = sorted(integers)[:2] == [-1, 0] or (sorted(integers)[:2] == [-1, 1] and len(integers) > 3)
        if integers == [-1] or (is_from_0 and len(integers) == len(first_lines)):  # beside words, or labels from 0
            del first_lines["-1"]
        _check_one_each(first_lines, path)
        return _in_order(first_lines, path)

    def number_of(self, label: str) -> int:
        """Return the class's number for a label (see `label_text`); -1 for no label, -2 for none of the classes."""
        numbers = self._numbers
        label = label if label in numbers else _plain(label)
        return numbers.get(label, -1 if label in MISSING or label == "-1" else -2)

    def read_label(self, cell: object, where: str) -> int | None:
        """Return the class's number for a cell, None for no label; UserError, beginning with `where`, for another."""
        number = self._numbers.get(cell) if isinstance(cell, str) else None
        if number is None and (number := self.number_of(label_text(cell))) == -2:
            raise UserError(f"{where}: {self.unknown([label_text(cell)])}")
        return None if number == -1 else number

    def unknown(self, labels: Sequence[str]) -> str:
        """Return, for an error, what is wrong with labels that are none of the classes, and the cure."""
        shown, known = ", ".join(_quoted(label) for label in labels[:10]), f"of {listed(self.label_names)}"
        if len(self._numbers) > self.outputs:
            known += f" nor a number from {min(self._counted)} to {max(self._counted)}"
        cure = ""
        if all(_INTEGER.fullmatch(_plain(label)) for label in labels):
            cure = "; numbers stand for names only with --label-names, the names in the order of the numbers"
        elif set(map(_key, labels)) <= set(map(_key, self.label_names)):
            cure = "; they differ by case, spaces or signs only: write them alike"
        is_one = ("is" if len(labels) == 1 else "are") + (" neither" if len(self._numbers) > self.outputs else " not")
        of_what = "the classes of the training file or of --label-names"
        return f"label{'s' * (len(labels) > 1)} {shown} {is_one} one {known}, {of_what}{cure}"

    @property
    def _counted(self) -> list[int]:
        return [int(label) for label in self._numbers if label not in self.label_names]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers = {name: number for number, name in enumerate(self.label_names)}
        standing = self.label_numbers
        if standing is None and not any(_INTEGER.fullmatch(name) for name in self.label_names):
            standing = {str(number): number for number in range(len(self.label_names))}
        return {**(standing or {}), **numbers}

    @staticmethod
    def label_keys(labels: np.ndarray) -> np.ndarray:
        """Return int [rows], equal for rows with equal labels."""
        return labels

    # --- training

    @property
    def outputs(self) -> int:
        """How many logits the head has."""
        return len(self.label_names)

    def check(self, config: Config) -> None:
        """Check the options that depend on the classes; UserError if `--class-weights` has another number of them."""
        given = config.class_weights
        if given not in (None, "balanced") and (weights := str(given).count(",") + 1) != self.outputs:
            raise UserError(f"--class-weights has {weights} numbers, but there are {self.outputs} classes")

    def for_training(self, config: Config, labels: np.ndarray, device: torch.device) -> SingleLabel:
        """Return the task with a run's label smoothing and class weights.

        `--class-weights balanced` is rows / (classes * rows of the class): every class has the same weight in all, and
        the mean over the training rows, which have these labels, int [rows], is 1. UserError if a class has no row.
        """
        weights = None
        if config.class_weights == "balanced":
            counts = np.bincount(labels, minlength=self.outputs)
            if not counts.all():
                raise UserError(
                    "--class-weights balanced: the training file has no row of class"
                    f" {self.label_names[int(counts.argmin())]!r}; leave it out of --label-names, or give the weights"
                    " as numbers"
                )
            weights = torch.from_numpy(len(labels) / (self.outputs * counts)).float().to(device)
        elif config.class_weights is not None:
            weights = torch.tensor([float(weight) for weight in config.class_weights.split(",")], device=device)
        return replace(self, label_smoothing=config.label_smoothing, class_weights=weights)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the sum over rows of the loss times the weight of the row's class, nats; no dimensions.

        Logits are fp32 [rows, classes], labels int [rows]. `F.cross_entropy` has weights too, but applies every
        class's own weight to the smoothed part of a row.
        """
        labels, smoothing = labels.long(), self.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (losses * self.class_weights[labels]).sum()

    def baseline_loss(self, labels: np.ndarray) -> float:
        """Return the class-prior baseline: the loss, nats a row, of the best answer that is the same for every text."""
        weights = np.ones(self.outputs) if self.class_weights is None else self.class_weights.cpu().numpy()
        counted = np.bincount(labels, minlength=self.outputs) * weights
        answer = (1 - self.label_smoothing) * counted / counted.sum() + self.label_smoothing / self.outputs
        entropy = -float(sum(p * math.log(p) for p in answer if p > 0))
        return entropy * float(counted.sum()) / len(labels)

    # --- answers

    @staticmethod
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
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

    @staticmethod
    def answers(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted classes, int64 [rows], and their probabilities, float [rows]."""
        return probabilities.argmax(-1), probabilities.max(-1)

    @staticmethod
    def changed(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return bool [rows], whether the answer is another; both are probabilities, [rows, classes]."""
        return np.asarray(found.argmax(1) != expected.argmax(1))

    @staticmethod
    def near_ties(logits: torch.Tensor, distance: float) -> torch.Tensor:
        """Return bool [rows], whether a change of the logits by `distance` may change the answer."""
        best, second = logits.topk(2).values.unbind(1)
        return best - second < distance

    # --- evaluation

    @staticmethod
    def row_results(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return float [rows, 3], all that metrics need of a row: loss in nats, predicted class, its probability.

        Logits are float [rows, classes], labels int [rows].
        """
        losses = F.cross_entropy(logits, labels.long(), reduction="none")
        confidences, predictions = logits.softmax(-1).max(-1)
        return torch.stack([losses, predictions.to(losses.dtype), confidences], dim=1)

    def metrics(self, results: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return an evaluation's entry for `metrics.jsonl` from all rows' `row_results` and labels, int [rows].

        Lists have one number per class.
        """
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
        return metric.confusion_matrix(labels, results[:, 1].astype(np.int64), self.outputs)

    @staticmethod
    def logits_of(probabilities: np.ndarray) -> np.ndarray:
        """Return fp64 logits, up to a constant for each row, finite for a probability of 0 too; [rows, classes]."""
        return np.asarray(np.log(probabilities.astype(np.float64).clip(min=_SMALLEST)))

    def results_of(self, probabilities: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Return `row_results`, fp64, for probabilities whose logits are divided by a temperature."""
        logits = torch.from_numpy(self.logits_of(probabilities) / temperature)
        return self.row_results(logits, torch.tensor(labels)).numpy()

    @staticmethod
    def describe(metrics: dict[str, Any]) -> str:
        """Return the main metrics in a few words, for a line on the console."""
        return f"accuracy {metrics['accuracy']:.4f}  macro F1 {metrics['macro_f1']:.4f}  loss {metrics['loss']:.4f}"

    @staticmethod
    def table_cells(metrics: dict[str, Any]) -> dict[str, str]:
        """Return a file's cells in the table of evaluated files, by the columns' names."""
        cells = {"accuracy": f"{metrics['accuracy']:.4f}"}
        if "rows" in metrics:  # not a mean of several files
            cells["95 % interval"] = f"{metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f}"
        return {**cells, "macro F1": f"{metrics['macro_f1']:.4f}", "ECE": f"{metrics['ece']:.4f}"}

    @staticmethod
    def hub_metrics(metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """Return an evaluation's metrics as a model card on the Hub lists them."""
        names = {"accuracy": ("accuracy", "accuracy"), "macro_f1": ("f1", "macro F1")}
        return [{"type": kind, "name": name, "value": metrics[key]} for key, (kind, name) in names.items()]

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
        counts = np.bincount(probabilities.argmax(1))
        label = self.label_names[int(counts.argmax())]
        now, before = (float(self.logits_of(each).std(0).max()) for each in (probabilities, untrained))
        is_constant = (counts > 0).sum() == 1 and len(np.unique(labels)) > 1
        if is_constant and now <= _COLLAPSED_DEVIATION * before:
            return f"same prediction for every text of dev, {label!r} with the same probability"
        loss = -float(self.logits_of(probabilities)[np.arange(len(labels)), labels].mean())
        baseline = SingleLabel(self.label_names).baseline_loss(labels)
        accuracy, most = float((probabilities.argmax(1) == labels).mean()), np.bincount(labels).max() / len(labels)
        is_useless = loss >= _USELESS_LOSS * baseline and accuracy - most < _USELESS_ACCURACY * (1 - most)
        if has_learned and is_useless:
            return f"the model had learned, but is now hardly better than {label!r} for every text of dev"
        return ""

    # --- exported forms

    def append_to_onnx(self, add: Callable[..., str], logits: str) -> dict[str, tuple[str, str, list[int]]]:
        """Append label and probabilities to an ONNX graph; returns values, types and sizes of a text by outputs' names.

        `add` adds an operator to the graph and returns its output (see export/onnx).
        """
        probabilities = add("Softmax", logits, axis=-1)
        best = add("ArgMax", probabilities, axis=-1, keepdims=0)
        label = add("Gather", np.array(self.label_names, dtype=object), best)
        return {"label": (label, "STRING", []), "probabilities": (probabilities, "FLOAT", [self.outputs])}

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


Task = SingleLabel


def listed(names: Sequence[str]) -> str:
    """Return names, separated by commas; of many only the first."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in names[:10]) + more


def _quoted(value: object) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."


def label_text(cell: object) -> str:
    """Return a label as text, stripped of spaces: empty for JSON's null and NaN; 3.0 is 3, true is true."""
    if isinstance(cell, str):
        return cell.strip()
    if type(cell) is int:
        return str(cell)
    if isinstance(cell, list) and len(cell) < 2:
        return label_text(cell[0] if cell else None)
    if cell is None or cell != cell:
        return ""
    return _plain(json.dumps(cell, ensure_ascii=False, default=str))


def _plain(label: str) -> str:
    """Return a whole float as integer, any other label as it is."""
    whole = _WHOLE.fullmatch(label)
    return str(int(whole[1])) if whole and len(whole[1]) < 19 else label


def _key(label: str) -> str:
    if _INTEGER.fullmatch(label) or _FRACTION.fullmatch(label):
        return label
    return _INVISIBLE.sub("", label).casefold() or label


def alike(labels: Iterable[str]) -> list[list[str]]:
    """Return the labels, as they stand in a file, that differ only by case, spaces, signs or what cannot be seen."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_key(_plain(label)), []).append(label)
    return [group for group in groups.values() if len({_plain(label) for label in group}) > 1]


def numbers_for(names: Sequence[str], labels: Iterable[str], path: object) -> tuple[list[str], dict[str, int]]:
    """Return the names of `--label-names`, and the classes' numbers by the integers that stand for them in files.

    Names may say their integers themselves, `1=World`. Else they are in the order of the integers among `labels`, those
    of the file, which begin at 0, at 1, or are all there. UserError if that cannot be told.
    """
    pairs = [match for name in names if (match := re.fullmatch("(-?[0-9]+)=(.+)", name))]
    if len(pairs) == len(names):
        return [pair[2] for pair in pairs], {pair[1]: number for number, pair in enumerate(pairs)}
    plain = {_plain(label) for label in labels} - MISSING - set(names)
    integers = sorted(int(label) for label in plain if _INTEGER.fullmatch(label))
    integers = integers[1:] if integers[:2] == [-1, 0] else integers
    count, first = len(names), 0
    if any(_INTEGER.fullmatch(name) for name in names):
        return list(names), {}
    if len(integers) == count:
        return list(names), {str(integer): number for number, integer in enumerate(integers)}
    if integers and integers[0] != 0 and integers[-1] == count:
        first = 1
    elif integers and (integers[0] != 0 or integers[-1] >= count):
        stand = ", ".join(map(str, integers[:10]))
        raise UserError(
            f"{path} has the labels {stand}, and --label-names has {count} names: which number has which? Say it with"
            f" them: --label-names {integers[0]}={names[0]},..."
        )
    return list(names), {str(first + number): number for number in range(count)}


def _check_one_each(first_lines: dict[str, int], path: object) -> None:
    """Raise UserError if labels are several a row, scores, or more than there may be classes."""
    for label, line in first_lines.items():
        where, parts = f"{path}, line {line}", [part.strip() for part in _PARTS.split(label)]
        is_list = label[:1] in "[{" and label[-1:] in "]}"
        if is_list or (len(parts) > 1 and all(part in first_lines or part.isdecimal() for part in parts)):
            raise UserError(
                f"{where}: label {_quoted(label)} is several labels; multi-label classification is not supported, a row"
                " has one label: name a column of single labels with --label-column"
            )
        if _FRACTION.fullmatch(label):
            raise UserError(
                f"{where}: label {_quoted(label)} is a fraction; scores (regression) are not supported, a class is an"
                " integer or a word. Name another column with --label-column, or the classes with --label-names"
            )
    if len(first_lines) > MAX_CLASSES:
        raise UserError(
            f"{path}, line {list(first_lines.values())[MAX_CLASSES]}: more than {MAX_CLASSES:,} different labels; name"
            " the column with the classes with --label-column"
        )


def _in_order(first_lines: dict[str, int], path: object) -> list[str]:
    """Return the labels of a file, each given with the line of its first row, in the order of their numbers."""
    labels = sorted(first_lines)
    if len(labels) < 2:
        have = f"all rows have the label {_quoted(labels[0])}" if labels else "no row has a label"
        raise UserError(
            f"{path}: {have}; name the column with the classes with --label-column, or all classes with --label-names"
        )
    integers = [label for label in labels if _INTEGER.fullmatch(label)]
    if len(integers) == len(labels):
        return sorted(labels, key=int)
    if integers:
        word = next(label for label in labels if label not in integers)
        raise UserError(
            f"{path} has integers and words as labels ({integers[0]!r} in line {first_lines[integers[0]]},"
            f" {_quoted(word)} in line {first_lines[word]}); make them one, or name the classes with --label-names"
        )
    return labels
