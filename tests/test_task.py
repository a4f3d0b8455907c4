"""A single label: its loss, its answers and their metrics, what exported forms append, when answers have collapsed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU

from sst2_xlmr.config import Config
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.training.guard import collapse_reason

LABELS = torch.tensor([0, 2, 1, 0, 0, 2])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def task(weights: torch.Tensor | None = None, smoothing: float = 0.0) -> SingleLabel:
    return SingleLabel(["a", "b", "c"], smoothing, weights)


def class_weights(given: str | None, labels: np.ndarray) -> torch.Tensor | None:
    return task().for_training(Config(class_weights=given), labels, None, CPU).class_weights


def test_balanced_classes_weigh_the_same_and_rows_one_on_average_and_numbers_are_taken_as_they_are() -> None:
    weights, given = (class_weights(each, LABELS.numpy()) for each in ("balanced", "0.5,2,0"))
    assert weights is not None and given is not None
    of_rows = weights[LABELS]
    torch.testing.assert_close(of_rows.mean(), torch.tensor(1.0))
    assert [float(of_rows[label == LABELS].sum()) for label in range(3)] == pytest.approx([2, 2, 2])
    assert given.tolist() == [0.5, 2, 0]
    assert class_weights(None, LABELS.numpy()) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_row_counts_as_often_as_its_class_weighs(smoothing: float) -> None:
    weights = torch.tensor([3.0, 1.0, 2.0])
    times = weights[LABELS].long()
    repeated = LOGITS.repeat_interleave(times, 0), LABELS.repeat_interleave(times)
    expected = F.cross_entropy(*repeated, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(task(weights, smoothing).loss(LOGITS, LABELS), expected)
    plain = task(None, smoothing).loss(LOGITS, LABELS)
    torch.testing.assert_close(task(torch.ones(3), smoothing).loss(LOGITS, LABELS), plain)


def answers(deviation: float, classes: int = 2, rows: int = 872) -> np.ndarray:
    """Probabilities whose logits, 0.4 for the first class, deviate at random from text to text."""
    logits = deviation * np.random.RandomState(0).normal(size=(rows, classes))
    logits[:, 0] += 0.4
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 77])
@pytest.mark.parametrize("untrained", [5e-5, 6e-4, 0.008, 0.3])
def test_answers_that_do_not_depend_on_the_text(classes: int, untrained: float) -> None:
    """Compared with the untrained model's, which over one layer deviate by 0.00005 only."""
    names = [f"class {number}" for number in range(classes)]
    before, labels = answers(untrained, classes), np.random.RandomState(1).randint(classes, size=872)

    def alike(probabilities: np.ndarray, labels: np.ndarray = labels) -> bool:
        reason = collapse_reason(SingleLabel(names), probabilities, before[: len(labels)], labels, has_learned=False)
        assert reason in ("", "same prediction for every text of dev: 'class 0'")
        return bool(reason)

    assert alike(answers(0.0, classes)), "the same to the bit"
    assert alike(answers(0.15 * untrained, classes)), "a little of a text's length"
    assert not alike(answers(0.7 * untrained, classes)), "a run that learns slowly"
    probabilities = answers(0.0, classes)
    probabilities[0] = np.roll(probabilities[0], 1)
    assert not alike(probabilities), "two labels"
    assert not alike(probabilities[1:], np.zeros(871, int)), "dev has one class"
    assert alike(np.eye(classes)[np.zeros(872, int)]), "probabilities of 0"


def test_answers_that_have_become_useless() -> None:
    def useless(accuracy: float, sure: float, share: float = 0.5, has_learned: bool = True) -> bool:
        """Answers right in that share of the rows, with that probability for the label; the other rows wrong."""
        labels = (np.arange(1000) < 1000 * share).astype(int)
        is_right = np.random.RandomState(0).random_sample(1000) < accuracy
        probabilities = np.full((1000, 2), 1 - sure)
        probabilities[np.arange(1000), np.where(is_right, labels, 1 - labels)] = sure
        before = answers(0.1, 2, 1000)
        return "had learned" in collapse_reason(SingleLabel(["-", "+"]), probabilities, before, labels, has_learned)

    assert useless(0.52, 0.55)
    assert not useless(0.52, 0.55, has_learned=False), "a slow beginning"
    assert not useless(0.70, 0.70), "it is better than chance"
    assert not useless(0.85, 0.999), "overfitted: a high loss, but right"
    assert useless(0.95, 0.999, share=0.05), "so is always the frequent label"


RESULTS = torch.tensor([[2.0, 0.0, 1.0], [0.5, 0.4, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, -2.0]])


def test_answers_and_cells() -> None:
    probabilities = task().probabilities(RESULTS)
    torch.testing.assert_close(probabilities, RESULTS.exp() / RESULTS.exp().sum(1, keepdim=True))
    wrong, answer_of = task().mistakes(probabilities.numpy(), np.array([0, 1, 1, 2]))
    assert wrong.tolist() == [3, 1], "the surest first"
    assert answer_of(1) == ["b", "a", f"{float(probabilities[1].amax()):.4f}"]
    row = [0.2, 0.5, 0.3]
    assert task().cells(row, all_probabilities=False, abstain_below=0.5) == ["b", 0.5]
    assert task().cells(row, all_probabilities=False, abstain_below=0.51) == ["?", 0.5]
    changed = task().changed(np.array([row, row]), np.array([[0.2, 0.4, 0.3], [0.5, 0.4, 0.1]]))
    assert changed.tolist() == [False, True]

    # Answers that a little may change.
    assert task().near_ties(RESULTS, 0.11).tolist() == [False, True, False, True]
    assert task().near_ties(RESULTS, 0.09).tolist() == [False, False, False, True]
    assert task().near_ties(RESULTS, 1.5).tolist() == [True, True, False, True]


def test_metrics_by_hand() -> None:
    """Classes 0 and 1 of three; c is neither a label nor an answer, so it does not count."""
    labels = np.array([0, 1, 1, 1])
    results = task().row_results(RESULTS, torch.from_numpy(labels))
    torch.testing.assert_close(results[:, 0], F.cross_entropy(RESULTS, torch.from_numpy(labels), reduction="none"))
    assert results[:, 1].tolist() == [0, 0, 1, 0]
    found = task().metrics(results.numpy(), labels)
    assert found["loss"] == pytest.approx(float(results[:, 0].mean()))
    assert (found["accuracy"], found["rows"], found["macro_f1"]) == (0.5, 4, 0.5)
    assert task().confusion(results.numpy(), labels).tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]
    cooler = task().results_of(task().probabilities(RESULTS).numpy(), labels, temperature=2.0)
    np.testing.assert_allclose(cooler, task().row_results(RESULTS / 2, torch.from_numpy(labels)), atol=1e-5)
    assert task().describe(found) == f"accuracy 0.5000  macro F1 0.5000  loss {found['loss']:.4f}"
    assert list(task().table_cells(found)) == ["accuracy", "95 % interval", "macro F1", "ECE"]
    assert list(task().table_cells({key: found[key] for key in task().scalars})) == ["accuracy", "macro F1", "ECE"]
