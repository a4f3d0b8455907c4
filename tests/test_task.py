"""Tasks: how labels are read, losses, predictions and when they collapse, metrics, what exported forms append."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, refusal
from sklearn import metrics as reference

from sst2_xlmr.config import Config
from sst2_xlmr.data.rows import Row, inspect, read_options_for, read_rows
from sst2_xlmr.data.sniff import ReadOptions
from sst2_xlmr.evaluation import metrics
from sst2_xlmr.labels import split_labels
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.task import MultiLabel, Regression, SingleLabel, Task, at_temperature, check_options, task_kind
from sst2_xlmr.training.guard import collapse_reason

LABELS = torch.tensor([0, 2, 1, 0, 0, 2])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def task(weights: torch.Tensor | None = None, smoothing: float = 0.0) -> SingleLabel:
    return SingleLabel(["a", "b", "c"], label_smoothing=smoothing, class_weights=weights)


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


def predictions(deviation: float, classes: int = 2, rows: int = 872) -> np.ndarray:
    """Probabilities whose logits, 0.4 for the first class, deviate at random from text to text."""
    logits = deviation * np.random.RandomState(0).normal(size=(rows, classes))
    logits[:, 0] += 0.4
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 77])
@pytest.mark.parametrize("untrained", [5e-5, 6e-4, 0.008, 0.3])
def test_predictions_that_do_not_depend_on_the_text(classes: int, untrained: float) -> None:
    """Compared with the untrained model's, which over one layer deviate by 0.00005 only."""
    names = [f"class {number}" for number in range(classes)]
    before, labels = predictions(untrained, classes), np.random.RandomState(1).randint(classes, size=872)

    def alike(probabilities: np.ndarray, labels: np.ndarray = labels) -> bool:
        reason = collapse_reason(SingleLabel(names), probabilities, before[: len(labels)], labels, has_learned=False)
        assert reason in ("", "same prediction for every text of dev: 'class 0'")
        return bool(reason)

    assert alike(predictions(0.0, classes)), "the same to the bit"
    assert alike(predictions(0.15 * untrained, classes)), "a little of a text's length"
    assert not alike(predictions(0.7 * untrained, classes)), "a run that learns slowly"
    probabilities = predictions(0.0, classes)
    probabilities[0] = np.roll(probabilities[0], 1)
    assert not alike(probabilities), "two labels"
    assert not alike(probabilities[1:], np.zeros(871, int)), "dev has one class"
    assert alike(np.eye(classes)[np.zeros(872, int)]), "probabilities of 0"


def test_predictions_that_have_become_useless() -> None:
    def useless(accuracy: float, sure: float, share: float = 0.5, has_learned: bool = True) -> bool:
        """Answers right in that share of the rows, with that probability for the label; the other rows wrong."""
        labels = (np.arange(1000) < 1000 * share).astype(int)
        is_right = np.random.RandomState(0).random_sample(1000) < accuracy
        probabilities = np.full((1000, 2), 1 - sure)
        probabilities[np.arange(1000), np.where(is_right, labels, 1 - labels)] = sure
        before = predictions(0.1, 2, 1000)
        return "had learned" in collapse_reason(SingleLabel(["-", "+"]), probabilities, before, labels, has_learned)

    assert useless(0.52, 0.55)
    assert not useless(0.52, 0.55, has_learned=False), "a slow beginning"
    assert not useless(0.70, 0.70), "it is better than chance"
    assert not useless(0.85, 0.999), "overfitted: a high loss, but right"
    assert useless(0.95, 0.999, share=0.05), "so is always the frequent label"


RESULTS = torch.tensor([[2.0, 0.0, 1.0], [0.5, 0.4, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, -2.0]])


def test_predictions_and_cells() -> None:
    probabilities = task().probabilities(RESULTS)
    torch.testing.assert_close(probabilities, RESULTS.exp() / RESULTS.exp().sum(1, keepdim=True))
    wrong, prediction_of = task().mistakes(probabilities.numpy(), np.array([0, 1, 1, 2]))
    assert wrong.tolist() == [3, 1], "the surest first"
    assert prediction_of(1) == ["b", "a", f"{float(probabilities[1].amax()):.4f}"]
    row = [0.2, 0.5, 0.3]
    assert task().prediction_cells(row, all_probabilities=False, abstain_below=0.5) == ["b", 0.5]
    assert task().prediction_cells(row, all_probabilities=False, abstain_below=0.51) == ["?", 0.5]
    changed = task().is_prediction_changed(np.array([row, row]), np.array([[0.2, 0.4, 0.3], [0.5, 0.4, 0.1]]))
    assert changed.tolist() == [False, True]

    # Answers that a little may change.
    assert task().near_ties(RESULTS, 0.11).tolist() == [False, True, False, True]
    assert task().near_ties(RESULTS, 0.09).tolist() == [False, False, False, True]
    assert task().near_ties(RESULTS, 1.5).tolist() == [True, True, False, True]


def test_metrics_by_hand() -> None:
    """Classes 0 and 1 of three; c is neither a label nor a prediction, so it does not count."""
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
    assert list(task().table_cells({key: found[key] for key in task().tensorboard_metrics})) == [
        "accuracy",
        "macro F1",
        "ECE",
    ]


PLAIN = ReadOptions()
GENERATOR = np.random.RandomState(0)
TRUE = (GENERATOR.random_sample((300, 5)) < [0.5, 0.3, 0.1, 0.02, 0.0]).astype(np.float32)
PROBABILITIES = (0.6 * GENERATOR.random_sample((300, 5)) + 0.3 * TRUE).round(2).astype(np.float32)  # some are equal
NAMES = ["a", "b", "c", "d", "e"]


def read(file: Path, content: str, read_options: ReadOptions = PLAIN, **options: Any) -> tuple[Task, list[Row]]:
    file.write_text(content, encoding="utf-8")
    found = inspect(file, read_options)
    config, labels, named = Config(**options), found.labels, found.layout.class_names.values()
    task = task_kind(config, labels).from_labels(config, labels, labels, named, file)
    check_options(task, config)
    return task, list(read_rows(file, read_options, task))


def json_rows(*labels: Any) -> str:
    return "".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels)


SEVERAL = {"task": "multi-label"}


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.jsonl", json_rows(["a", "c"], ["b"], []), {}),
        ("a.csv", "text,label\nx,a|c\ny,b\nz,\nu,a\nv,c\n", {}),
        ("a.csv", "text,label\nx,a / c\ny,b\nz,\n", {"label_delimiter": "/"}),
        ("a.csv", "text,label\nx,\"['a', 'c']\"\ny,['b']\nz,[]\n", {}),
        ("a.tsv", "text\tlabel\nx\t0,2\ny\t1\nz\t\nu\t0\nv\t2\n", {"label_names": ["a", "b", "c"]}),
        ("a.txt", "__label__a __label__c x\n__label__b y\nz\n", SEVERAL),
        ("a.jsonl", json_rows(*(dict(zip("abc", row)) for row in ([1, 0, 1], [0, 1, 0], [0, 0, 0]))), {}),
        ("a.jsonl", json_rows([1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0] * 3), {"label_names": [*"abc"], **SEVERAL}),
    ],
)
def test_several_labels_however_they_are_written(tmp_path: Path, name: str, content: str, options: Any) -> None:
    read_options = ReadOptions(format="fasttext") if name.endswith(".txt") else PLAIN
    task, rows = read(tmp_path / name, content, read_options, **options)
    assert isinstance(task, MultiLabel)
    assert task.label_names == ["a", "b", "c"]
    assert [row.label.tolist() for row in rows[:3]] == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_columns_of_0_and_1_are_several_labels_and_those_of_probabilities_one(tmp_path: Path) -> None:
    options = ReadOptions(labels=("toxic", "insult"))
    task, rows = read(tmp_path / "a.csv", "text,toxic,insult\nx,1,0\ny,0,0\nz,1,1\n", options)
    assert (type(task), task.label_names) == (MultiLabel, ["toxic", "insult"])
    assert [row.label.tolist() for row in rows] == [[1, 0], [0, 0], [1, 1]]
    assert task.read_label({"toxic": "-1", "insult": -1}, "") is None, "a row of a test file that is not scored"
    rows_of = {'{"toxic": 1, "insult": 0}': (3, 1), '{"toxic": 0, "insult": 1}': (2, 2)}
    assert ["--task single-label" in note for note in task.label_warnings(rows_of)] == [True]
    assert not task.label_warnings({**rows_of, '{"toxic": 1, "insult": 1}': (1, 3)})
    options = ReadOptions(labels=("probability_no", "probability_yes"))
    content = "text,probability_no,probability_yes\nx,0.25,0.75\ny,0.9,0.1\n"
    task, rows = read(tmp_path / "b.csv", content, options)
    assert (type(task), task.label_names) == (SingleLabel, ["no", "yes"])
    np.testing.assert_allclose([row.label for row in rows], [[0.25, 0.75], [0.9, 0.1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ("x,1.5\ny,3\n", Regression),
        ("x,1.0\ny,3.0\n", SingleLabel),
        ("x,yes\ny,no\n", SingleLabel),
        ('x,"art,life"\ny,art\nz,life\n', MultiLabel),
        ('x,"art,life"\ny,music\n', SingleLabel),
    ],
)
def test_a_task_is_found_only_where_it_is_certain(tmp_path: Path, rows: str, kind: type) -> None:
    assert type(read(tmp_path / "a.csv", f"text,label\n{rows}")[0]) is kind


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("text,label\nx,1.5\ny,bad\n", {"task": "regression"}, "line 3: label 'bad' is not a number"),
        ("text,label\nx,2\ny,2\n", {"task": "regression"}, "all rows have the same score"),
        ('text,label\nx,"a,b"\ny,a\nz,b\n', {"task": "single-label"}, "--task multi-label"),
        ("text,label\nx,1.5\ny,2\n", {"task": "single-label"}, "--task regression"),
        ("text,label\nx,1.5\ny,2\n", {"calibrate": True}, "--calibrate does not go with this task"),
        ("text,label\nx,a\ny,b\n", {"threshold_for": "f1"}, "--threshold-for does not go with this task"),
        ('text,label\nx,"a,b"\ny,a\nz,b\n', {"label_smoothing": 0.1}, "--label-smoothing does not go"),
        ("text,label\nx,a\ny,b\n", {"best_by": "rmse"}, "--best-by is one of accuracy, macro_f1, loss, mean, not"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path: Path, content: str, options: Any, says: str) -> None:
    assert says in refusal(read, tmp_path / "a.csv", content, **options)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ('["a", "x"]', "'x' is neither one of a, b"),
        ('{"a": 0}', "but none for b"),
        ('{"a": 2, "b": 0}', "'a' has 2"),
        ('{"a": "x", "b": 0}', "line 2: label 'a' has a value that is no number"),
    ],
)
def test_a_bad_label_names_the_line(tmp_path: Path, cell: str, says: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "x", "label": ["a"]}}\n{{"text": "y", "label": {cell}}}\n')
    line = refusal(lambda: list(read_rows(file, ReadOptions(), MultiLabel(["a", "b"]))))
    assert "line 2: " in line and says in line


def test_names_in_files_are_the_classes_even_if_the_training_rows_lack_some() -> None:
    task = SingleLabel.from_labels(Config(), {"b": (1, 1), "c": (1, 2)}, {}, [["b", "a", "c"]], "")
    assert (task.label_names, task.label_ids) == (["a", "b", "c"], {"0": 1, "1": 0, "2": 2})


def test_numpy_and_python_lists_are_read() -> None:
    assert split_labels("[ 8 20]") == split_labels("['8', '20']") == split_labels("8,20") == {"8": 1.0, "20": 1.0}
    assert split_labels("[0 1 0]") == {0: 0.0, 1: 1.0, 2: 0.0}
    assert split_labels("a,b", known=["a,b"]) == "a,b"
    assert split_labels("[1.2.3]") == "[1.2.3]", "neither"


def test_weights_are_read_and_rows_of_weight_0_are_absent(tmp_path: Path) -> None:
    file, options = tmp_path / "a.csv", ReadOptions(weight="w")
    _, rows = read(file, "text,label,w\nx,a,2\ny,b,0\nz,b,0.5\nu,c,0\n", options)
    assert [(row.text, row.weight) for row in rows] == [("x", 2.0), ("z", 0.5)]
    assert inspect(file, options).check(file, SingleLabel(["a", "b"]), drop=False) == {"weight 0": 2}
    asked = [read_options_for(Config(weight_column="w"), split) for split in ("train", "dev")]
    assert asked == [options, ReadOptions()], "evaluation counts every row once"
    for bad in ("-1", "nan", "many", ""):
        says = refusal(read, file, f"text,label,w\nx,a,{bad}\ny,b,1\n", options)
        assert "line 2: the weight " in says and " is not a number of 0 or more" in says


def test_metrics_of_several_labels_are_those_of_scikit_learn() -> None:
    task = MultiLabel(NAMES, thresholds=(0.5, 0.4, 0.6, 0.3, 0.5))
    found = task.metrics(task.results_of(PROBABILITIES, TRUE), TRUE)
    predicted = np.asarray([0.5, 0.4, 0.6, 0.3, 0.5], np.float32) <= PROBABILITIES
    precision, recall, f1, _ = reference.precision_recall_fscore_support(TRUE, predicted, zero_division=0)
    expected = {
        "macro_f1": f1.mean(),
        "micro_f1": reference.f1_score(TRUE, predicted, average="micro"),
        "macro_f1_at_0.5": reference.f1_score(TRUE, PROBABILITIES >= 0.5, average="macro", zero_division=0),
        "exact_match": reference.accuracy_score(TRUE, predicted),
        "mean_average_precision": 0.8 * reference.average_precision_score(TRUE[:, :4], PROBABILITIES[:, :4]),
        "loss": reference.log_loss(TRUE.reshape(-1), PROBABILITIES.astype(float).reshape(-1)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    np.testing.assert_allclose([found["precision"], found["recall"]], [precision, recall])


def test_metrics_of_scores_are_those_of_scikit_learn_and_scipy() -> None:
    from scipy import stats

    true = GENERATOR.randint(0, 11, 200).astype(np.float32) / 2
    scores = (true + GENERATOR.normal(size=200)).round(1).astype(np.float32)[:, None]
    task = Regression(["score"])
    found = task.metrics(task.results_of(scores, true), true)
    expected = {
        "loss": reference.mean_squared_error(true, scores),
        "rmse": reference.mean_squared_error(true, scores) ** 0.5,
        "mae": reference.mean_absolute_error(true, scores),
        "pearson": stats.pearsonr(scores[:, 0], true)[0],
        "spearman": stats.spearmanr(scores[:, 0], true)[0],
        "rows": 200,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert metrics.spearman(np.ones(5), np.arange(5)) == 0


@pytest.mark.parametrize("label", range(4))
def test_a_fitted_threshold_is_the_best_there_is(label: int) -> None:
    scores, true = PROBABILITIES[:, label], TRUE[:, label] > 0.5
    cuts = np.unique(np.concatenate([scores, scores + 1e-4, [0, 1]]))

    def best(value: Any, allowed: Any = lambda *_: True) -> float:
        return max(value(true, scores >= cut) for cut in cuts if allowed(true, scores >= cut))

    def at(threshold: float, value: Any) -> float:
        return float(value(true, scores >= threshold, zero_division=0))

    f1, precision = reference.f1_score, reference.precision_score
    assert at(metrics.fitted_threshold(scores, true), f1) == pytest.approx(best(f1))
    threshold = metrics.fitted_threshold(scores, true, "precision", 0.5)
    reachable = best(lambda *sides: precision(*sides, zero_division=0)) >= 0.5
    assert not reachable or at(threshold, precision) >= 0.5
    threshold = metrics.fitted_threshold(scores, true, "recall", 0.9)
    assert at(threshold, reference.recall_score) >= 0.9
    wanted = best(f1, lambda *sides: reference.recall_score(*sides, zero_division=0) >= 0.9)
    assert at(threshold, f1) == pytest.approx(wanted)


def test_a_label_that_dev_does_not_have_keeps_its_threshold_and_temperature_moves_no_label() -> None:
    task = MultiLabel(NAMES, thresholds=tuple(MultiLabel(NAMES).fit_thresholds(PROBABILITIES, TRUE, None)))
    assert task.thresholds[4] == 0.5
    for temperature in (0.5, 2.0):
        logits = torch.from_numpy(task.logits_of(PROBABILITIES) / temperature)
        sides = (at_temperature(task, temperature), logits.sigmoid()), (task, PROBABILITIES)
        found, expected = ([each.prediction_cells(row, False)[0] for row in values.tolist()] for each, values in sides)
        assert found == expected


def test_losses_and_gradients_are_those_of_transformers_heads() -> None:
    logits = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    several, scores = torch.from_numpy(TRUE), torch.arange(300.0)
    cases: list[Any] = [
        (MultiLabel(NAMES), several, lambda x: F.binary_cross_entropy_with_logits(x, several)),
        (Regression(["score"]), scores, lambda x: F.mse_loss(x[:, 0], scores)),
    ]
    for task, labels, expected in cases:
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        (task.loss(ours, labels) / 300).backward()
        expected(theirs).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("kind", "smoothing"), [("single", 0.2), ("soft", 0.2), ("several", 0.0), ("scores", 0.0)])
def test_a_weight_of_2_is_the_row_twice_and_the_baseline_the_least_constant_loss(kind: str, smoothing: float) -> None:
    weights = GENERATOR.randint(1, 3, 100).astype(np.float32)
    labels = {
        "single": GENERATOR.randint(0, 5, 100).astype(np.int32),
        "soft": GENERATOR.dirichlet(np.ones(5), 100).astype(np.float32),
        "several": TRUE[:100, :],
        "scores": GENERATOR.normal(size=100).astype(np.float32),
    }[kind]
    task: Any = {"several": MultiLabel(NAMES), "scores": Regression(["score"])}.get(kind, SingleLabel(NAMES))
    if kind == "soft":
        task = replace(task, is_soft=True)
    config = Config() if kind == "scores" else Config(class_weights="1,2,0.5,1,3", label_smoothing=smoothing)
    task = task.for_training(config, labels, weights, CPU)
    logits = torch.randn(100, task.outputs, generator=torch.Generator().manual_seed(0))
    twice = np.repeat(np.arange(100), weights.astype(int))
    once = task.loss(logits, torch.from_numpy(labels), torch.from_numpy(weights))
    torch.testing.assert_close(once, task.loss(logits[twice], torch.from_numpy(labels[twice])))
    baseline = task.baseline_loss(labels, weights)
    assert baseline == pytest.approx(task.baseline_loss(labels[twice]))
    predictions = torch.randn(2000, task.outputs, generator=torch.Generator().manual_seed(1))
    rows = torch.from_numpy(labels[twice])
    losses = [float(task.loss(each.expand(len(rows), -1), rows)) / len(rows) for each in predictions]
    assert min(losses) * 0.9 <= baseline <= min(losses) + 1e-5


def test_hard_labels_are_soft_ones_of_certainty() -> None:
    labels = GENERATOR.randint(0, 5, 50)
    hard = SingleLabel(NAMES, label_smoothing=0.1, class_weights=torch.tensor([1.0, 2, 3, 4, 5]))
    logits, soft = torch.randn(50, 5), np.eye(5, dtype=np.float32)[labels]
    sides, probabilities = ((hard, labels), (replace(hard, is_soft=True), soft)), logits.softmax(1).numpy()
    torch.testing.assert_close(*(task.loss(logits, torch.from_numpy(each)) for task, each in sides))
    found, expected = (task.metrics(task.results_of(probabilities, each), each) for task, each in sides)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_scores_are_scaled_in_training_and_predictions_are_in_the_files_scale() -> None:
    labels = np.array([0.0, 5.0, 10.0], np.float32)
    task = Regression(["score"]).for_training(Config(), labels, None, CPU)
    logits = (torch.from_numpy(labels)[:, None] - 5) / np.std(labels)
    assert float(task.loss(logits, torch.from_numpy(labels))) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(task.probabilities(logits)[:, 0], labels, atol=1e-5)
    assert task.baseline_loss(labels) == pytest.approx(1)


def test_a_collapse_is_seen_in_every_task() -> None:
    random = np.random.RandomState(0)
    before, labels = random.uniform(0.45, 0.55, (300, 5)), TRUE
    task = MultiLabel(NAMES)
    assert "same prediction" in collapse_reason(task, np.full((300, 5), 0.3), before, labels, False)
    assert not collapse_reason(task, PROBABILITIES, before, labels, True)
    assert "had learned" in collapse_reason(task, random.uniform(0.4, 0.6, (300, 5)), before, labels, True)
    scores, values = labels[:, 0] * 4, Regression(["score"])
    assert "same prediction" in collapse_reason(values, np.full((300, 1), 2.0), before[:, :1], scores, False)
    assert not collapse_reason(values, scores[:, None] + before[:, :1], before[:, :1], scores, True)
    assert "had learned" in collapse_reason(values, random.uniform(0, 4, (300, 1)), before[:, :1], scores, True)


def test_cells_and_near_ties() -> None:
    task = MultiLabel(["a", "b"], thresholds=(0.5, 0.9))
    assert task.columns(True) == ["labels", "probabilities", "probability_a", "probability_b"]
    assert task.prediction_cells([0.6, 0.8], False) == [["a"], [0.6]]
    assert task.prediction_cells([0.1, 0.95], True) == [["b"], [0.95], 0.1, 0.95]
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.2], [1.0, 0.0]])
    assert task.near_ties(logits, 0.2).tolist() == [True, True, False]
    assert Regression(["score"]).prediction_cells([1.23456789], False) == [1.234568]
    changed = task.is_prediction_changed(np.array([[0.6, 0.8], [0.6, 0.8]]), np.array([[0.7, 0.7], [0.4, 0.8]]))
    assert changed.tolist() == [False, True]


def test_the_most_doubtful_label_is_the_one_that_a_sure_model_contradicts() -> None:
    """A class of which the model is never sure is not doubted for that alone."""
    probabilities = np.array([[0.95, 0.05], [0.9, 0.1], [0.45, 0.55], [0.4, 0.6], [0.97, 0.03]])
    doubt = SingleLabel(["a", "b"]).label_error_scores(probabilities, np.array([0, 0, 1, 1, 1]))
    assert int(doubt.argmax()) == 4
    assert (doubt[:4] < doubt[4] / 2).all()
    several = MultiLabel(["a", "b"]).label_error_scores(
        probabilities, np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    )
    assert int(several.argmax()) == 4
    assert (
        int(
            Regression(["score"])
            .label_error_scores(np.array([[1.0], [2.0], [9.0]]), np.array([1.0, 2.5, 3.0]))
            .argmax()
        )
        == 2
    )


@pytest.mark.parametrize("class_weights", [None, "balanced", "3,1"])
def test_a_new_head_begins_with_the_best_constant_prediction(class_weights: str | None, tiny_encoder: Path) -> None:
    """Its loss is the baseline's, with weights of rows and labels, too."""
    labels = np.array([[1, 0], [0, 0], [0, 0], [1, 1], [0, 0]], np.float32)
    weights, config = np.array([1, 2, 1, 0.5, 1], np.float32), Config(class_weights=class_weights)
    task = MultiLabel(["a", "b"]).for_training(config, labels, weights, CPU)
    model, is_new = build_classifier(find_encoder(str(tiny_encoder)), task)
    assert is_new
    bias = model.head.out.bias.detach()
    assert bias.tolist() == pytest.approx(task.initial_bias)
    loss = task.loss(bias.repeat(5, 1), torch.from_numpy(labels), torch.from_numpy(weights)) / weights.sum()
    assert float(loss) == pytest.approx(task.baseline_loss(labels, weights), rel=1e-5)
