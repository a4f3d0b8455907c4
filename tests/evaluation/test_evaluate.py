"""Evaluation: every row counted once; metrics; how a faster precision compares; temperatures, fitted and folded in."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALONE, CPU, SAMPLE_DATA, SST2_NAMES, Capture, Patch, RunTrain, refusal, tokenize_sample
from running import digests, logged, on_ranks, resume
from safetensors.torch import load_file
from sklearn import metrics as reference

import sst2_xlmr
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.evaluation import calibration, metrics
from sst2_xlmr.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, calibrate
from sst2_xlmr.evaluation.compare import check_comparison, compare_files
from sst2_xlmr.evaluation.evaluate import evaluate, evaluation_of, length_sorted_batches, on_all_cores
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.programs import evaluate as program
from sst2_xlmr.programs import predict
from sst2_xlmr.report.tables import comparison_table
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.distributed import World, gather_objects

TASK = SingleLabel(SST2_NAMES)


@pytest.fixture
def dev(tiny_encoder: Path) -> TokenCache:
    return tokenize_sample(tiny_encoder, "dev", 64)


@pytest.fixture
def classifier(tiny_encoder: Path) -> SequenceClassifier:
    found, _ = build_classifier(find_encoder(str(tiny_encoder)), TASK)
    found.head.out.weight.data *= 50
    return found.train()


def test_agrees_with_one_row_at_a_time(classifier: SequenceClassifier, dev: TokenCache) -> None:
    found = evaluate(classifier, TASK, dev, 200, ALONE)
    assert classifier.training
    classifier.eval()
    rows = torch.from_numpy(dev.ids.astype(np.int64)).split(dev.lengths.tolist())
    with torch.no_grad():
        logits = torch.cat([classifier(row, torch.tensor([len(row)])) for row in rows])
    labels = torch.from_numpy(dev.labels).long()
    assert found.metrics["rows"] == len(found.results) == 152
    assert found.metrics["accuracy"] == float((logits.argmax(-1) == labels).sum()) / 152
    assert found.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    np.testing.assert_allclose(found.results, TASK.row_results(logits, labels), atol=1e-6)
    np.testing.assert_allclose(found.probabilities, logits.softmax(-1), atol=1e-6)
    cooler = evaluation_of(TASK, found.logits / 2, dev.labels)
    np.testing.assert_allclose(cooler.probabilities, (logits / 2).softmax(-1), atol=1e-5)
    np.testing.assert_allclose(cooler.results, TASK.row_results(logits / 2, labels), atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 7])
@pytest.mark.parametrize("batch_tokens", [1, 31, 1000, 10**9])
def test_batches_have_every_row_once_and_no_more_tokens_than_allowed(batch_tokens: int, ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 40, 500)
    batches = list(length_sorted_batches(lengths, batch_tokens, ranks))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for rows, behind in zip(batches, [*batches[1:], None]):
        padded = max(len(rows[rank::ranks]) * lengths[rows[rank::ranks]].max(initial=0) for rank in range(ranks))
        assert padded <= batch_tokens or len(rows) == 1
        if behind is not None:
            assert lengths[rows].max() <= lengths[behind].min()
            with_next = -(-(len(rows) + 1) // ranks) * lengths[behind[0]]
            assert with_next > batch_tokens, "one row more would have found room"
    assert not list(length_sorted_batches(np.zeros(0, np.int64), batch_tokens))


@pytest.mark.parametrize("batch_tokens", [900, 30])
def test_ranks_count_every_row_once(classifier: SequenceClassifier, dev: TokenCache, batch_tokens: int) -> None:
    """With 30 tokens at a time, most batches have no row for some of the ranks. All get the same result."""

    def check(world: World) -> None:
        found = evaluate(classifier, TASK, dev, batch_tokens, world)
        assert gather_objects(world, found.metrics) == [found.metrics] * 3
        assert {key: pytest.approx(value, rel=1e-6) for key, value in alone.metrics.items()} == found.metrics
        np.testing.assert_allclose(found.results, alone.results, atol=1e-6)
        np.testing.assert_allclose(found.probabilities, alone.probabilities, atol=1e-6)

    alone = evaluate(classifier, TASK, dev, batch_tokens, ALONE)
    on_ranks(3, check)


def test_figures_of_classes_are_those_of_scikit_learn() -> None:
    """Macro F1 of the classes that occur among labels or predictions; one of them may be missing in either."""
    random = np.random.RandomState(0)
    for _ in range(60):
        labels, predictions = random.randint(0, random.randint(1, 5, 2)[:, None], (2, 7))
        confusion = metrics.confusion_matrix(labels, predictions, 4)
        assert confusion.tolist() == reference.confusion_matrix(labels, predictions, labels=range(4)).tolist()
        assert metrics.macro_f1(confusion) == pytest.approx(reference.f1_score(labels, predictions, average="macro"))
        sides = {"labels": range(4), "zero_division": 0}
        expected = reference.precision_recall_fscore_support(labels, predictions, **sides)
        for name, values in zip(("precision", "recall", "f1", "support"), expected):
            assert metrics.per_class(confusion)[name] == pytest.approx(values)


@pytest.mark.parametrize(
    ("confidences", "right", "expected"),
    [
        # Bins of 1/15: two in (0.9333, 1], one right; one in (0.6, 0.6667], right; 0.6 itself is in the bin below.
        ([0.95, 0.99, 0.65, 0.6], [1, 0, 1, 0], (abs(0.95 + 0.99 - 1) + abs(0.65 - 1) + 0.6) / 4),
        ([0.601, 0.6], [1, 0], (0.399 + 0.6) / 2),
        ([1, 0, np.nextafter(np.float32(1), np.float32(2))], [1, 1, 1], 1 / 3),  # the ends, and rounded beyond
        ([0.7] * 10, [1] * 7 + [0] * 3, 0),
    ],
)
def test_ece_by_hand(confidences: list[float], right: list[int], expected: float) -> None:
    found = metrics.expected_calibration_error(np.array(confidences), np.array(right, bool))
    assert found == pytest.approx(expected, abs=1e-6)


def test_interval_is_that_of_drawing_rows() -> None:
    random, started = np.random.RandomState(7), time.process_time()
    is_right = np.arange(200) < 170
    drawn = is_right[random.randint(0, 200, (10_000, 200))].mean(1)
    low, high = metrics.accuracy_interval(170, 200)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.006)
    assert low < 0.85 < high
    assert metrics.accuracy_interval(170, 200) == (low, high), "the same at every call"
    assert (metrics.accuracy_interval(40, 40), metrics.accuracy_interval(0, 40)) == ((1, 1), (0, 0))
    metrics.accuracy_interval(900_000, 1_000_000)
    assert time.process_time() - started < 5, "a number is drawn for a row, not for a resample"


def sides(found: list[float], expected: list[float], labels: list[int] | None) -> Any:
    """Of two classes, from the probabilities of class 1."""
    both = [np.stack([1 - np.array(p), np.array(p)], 1).astype(np.float32) for p in (found, expected)]
    return both[0], both[1], None if labels is None else np.array(labels)


# The second label changes, to a wrong one; the third from a wrong one to a right one.
PAIR = sides([0.9, 0.6, 0.45, 0.1], [0.8, 0.4, 0.6, 0.1], [1, 0, 0, 0])
UNLABELLED = sides([0.9], [0.7], None)


def test_the_table_has_a_line_for_every_file_and_one_for_all() -> None:
    """By hand: the calibration error of `fr` is that of four rows, each alone in its bin."""
    compared = compare_files(TASK, {"fr": PAIR, "de": UNLABELLED})
    lines = [line.split() for line in comparison_table(TASK, compared, "int8", "fp32")]
    assert lines[0][:7] == ["file", "labels", "changed", "largest", "change", "accuracy", "int8"]
    ece = (abs(0.9 - 1) * 2 + 0.6 + 0.45) / 4
    assert lines[1][:6] == ["fr", "2", "(50.00%)", "0.2000", "0.7500", "(0.7500)"]
    assert lines[1][8:] == [f"{ece:.4f}", "(0.1250)", "4"]
    assert lines[2] == ["de", "0", "(0.00%)", "0.2000", "-", "-", "-", "1"]
    assert lines[3][2:4] == ["2", "(40.00%)"] and len(lines) == 4
    assert len(comparison_table(TASK, compare_files(TASK, {"fr": PAIR}), "int8", "fp32")) == 2


def test_what_passes_a_bound_is_refused() -> None:
    worse = sides([0.9, 0.6, 0.1], [0.8, 0.4, 0.1], [1, 0, 0])
    allowed = [({"a": PAIR}, 0.5, 0.0), ({"a": worse}, 0.5, 0.34), ({"b": UNLABELLED}, 0.0, 0.0)]
    for files, most_changed, most_lost in allowed:
        check_comparison(TASK, compare_files(TASK, files), most_changed, most_lost, "int8", "fp32")
    refused: list[Any] = [
        ({"a": PAIR}, 0.49, 1.0, "int8 changes 2 of 4 labels of fp32, 50.00% (limit 49.00%)"),
        ({"a": worse, "b": UNLABELLED}, 0.5, 0.33, "int8 loses 33.33% of accuracy against fp32 (limit 33.00%)"),
        ({"a": sides([float("nan")], [0.5], None)}, 1.0, 1.0, "produces probabilities that are not finite"),
    ]
    for files, *bounds, says in refused:
        assert says in refusal(check_comparison, TASK, compare_files(TASK, files), *bounds, "int8", "fp32")


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_every_core_computes_batches_of_its_own(threads: int) -> None:
    """In order; with one thread of torch's each, unless there are too few; nothing goes on after an error."""
    running, used = set(), set()

    def work(batch: np.ndarray) -> int:
        running.add(int(batch[0]))
        used.add((threading.get_ident(), torch.get_num_threads()))
        time.sleep(0.01)
        running.discard(int(batch[0]))
        if batch[0] == 5:
            raise ValueError("five")
        return int(batch[0])

    batches = [np.array([number]) for number in range(8)]
    assert list(on_all_cores(work, batches[:5], CPU)) == [0, 1, 2, 3, 4]
    assert {count for _, count in used} == {1}
    assert len(used) == threads
    with pytest.raises(ValueError, match="five"):
        list(on_all_cores(work, batches, CPU))
    assert not running
    used.clear()
    assert list(on_all_cores(work, batches[:1], CPU)) == [0]
    assert used == {(threading.get_ident(), threads)}
    assert torch.get_num_threads() == threads


TEXTS = ["A fine film.", "Not my cup of tea.", "", "word " * 30, "It was  slow"]
TWO = SingleLabel(["no", "yes"])


def drawn(temperature: float, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, and what a model says whose logits are `temperature` times too large."""
    random = np.random.RandomState(0)
    logits = random.normal(0, 1.5, (20_000, classes))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (true.cumsum(1) < random.random_sample((len(true), 1))).sum(1)
    said = np.exp(logits * temperature)
    return (said / said.sum(1, keepdims=True)).astype(np.float32), labels


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


@pytest.fixture
def any_gain(monkeypatch: Patch) -> None:
    """For models of this test's size, which no temperature makes significantly better."""
    monkeypatch.setattr(calibration, "_SIGNIFICANT_GAIN", 0.0)


@pytest.mark.parametrize(("temperature", "classes"), [(0.5, 2), (1.0, 2), (3.0, 5)])
def test_the_temperature_is_found(temperature: float, classes: int) -> None:
    probabilities, labels = drawn(temperature, classes)
    task = SingleLabel([f"class {number}" for number in range(classes)])
    found, before, after = calibrate(task, probabilities, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert after < 0.01
    assert before > 0.05 or temperature == 1.0
    assert (tempered(probabilities, found).argmax(1) == probabilities.argmax(1)).all()


def test_rows_that_say_nothing_do_not_make_it_extreme(any_gain: None) -> None:
    sure = np.array([[1 - 1e-6, 1e-6], [1e-6, 1 - 1e-6]], np.float32)
    assert calibrate(TWO, sure, np.array([0, 1]))[0] == pytest.approx(MIN_TEMPERATURE, rel=0.01)
    assert calibrate(TWO, sure, np.array([1, 0]))[0] == pytest.approx(MAX_TEMPERATURE, rel=0.01)


def test_it_stays_at_1_if_rows_cannot_tell() -> None:
    """Of twelve draws of rows from a calibrated model, one may show another temperature by chance."""
    probabilities, labels = drawn(1.0, 2)
    parts = [slice(start, start + 200) for start in range(0, 2_400, 200)]
    fitted = [calibrate(TWO, probabilities[part], labels[part]) for part in parts]
    unchanged = [(before, after) for temperature, before, after in fitted if temperature == 1]
    assert len(unchanged) >= 10
    assert all(before == after for before, after in unchanged)
    assert "temperature 1, as no other" in metrics.describe_calibration(1, *unchanged[0])


def probabilities_of(model: Path) -> np.ndarray:
    return sst2_xlmr.load(model, precision="fp32", device="cpu").probabilities(TEXTS)


def test_train_writes_calibrated_models(any_gain: None, run_train: RunTrain, tmp_path: Path, capsys: Capture) -> None:
    options = ["--epochs", 3, "--precision", "bf16"]
    plain = run_train(tmp_path / "plain", *options)
    capsys.readouterr()
    run = run_train(tmp_path / "run", *options, "--calibrate")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("calibrated ")]
    temperature = float(line.split("temperature ")[1].split(",")[0])
    before, after = probabilities_of(plain / "model"), probabilities_of(run / "model")
    np.testing.assert_allclose(after, tempered(before, temperature), atol=2e-3)
    assert (before.argmax(1) == after.argmax(1)).all()
    card = (run / "model" / "README.md").read_text()
    assert f"The probabilities are calibrated on dev: temperature {temperature:.3f}, " in card
    assert "temperature" not in (plain / "model" / "README.md").read_text()
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (run, plain))
    changed = {name for name in weights if not weights[name].equal(others[name])}
    assert changed == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert "chosen by their accuracy on dev" in (run / "best" / "README.md").read_text()
    assert "chosen by their accuracy on dev" not in card
    whole = digests(run)
    shutil.rmtree(run / "model")
    resume(run)
    assert digests(run) == whole


def test_what_is_reported_is_measured_on_what_is_written(
    any_gain: None, run_train: RunTrain, small_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """In metrics.jsonl, the table at the end and the cards; of best/, another step's model, on the test files too."""
    options = ["--epochs", 4, "--lr", 3e-3, "--eval-every", 3, "--calibrate"]
    options += ["--test-file", SAMPLE_DATA / "test.de.tsv"]
    run = run_train(tmp_path / "run", *options)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    evaluations = [line for line in logged(run) if "split" in line]
    dev = [line for line in evaluations if line["split"] == "dev"]
    best = max(dev, key=lambda line: line["accuracy"])
    assert best is not dev[-1], "this run is to have two models"
    files = {"dev": small_data / "dev.tsv", "test.de": SAMPLE_DATA / "test.de.tsv"}
    of_splits = {line["split"]: line for line in evaluations if line["split"] != "dev"}
    found = [("best", "dev", best), ("model", "dev", dev[-1])]
    found += [("best", "test.de", of_splits["best/test.de"]), ("model", "test.de", of_splits["test.de"])]
    for folder, split, reported in found:
        measured = measure(run / folder, files[split], tmp_path / "numbers.json")
        assert {key: reported[key] for key in measured} == pytest.approx(measured, abs=1e-5), (folder, split)
        assert measured["ece"] != pytest.approx(0, abs=1e-4)
    for row, line in of_splits.items():
        assert any(words[:1] == [row] and f"{line['ece']:.4f}" in words for words in table), row
    for folder, line in (("best", best), ("model", dev[-1])):
        card = (run / folder / "README.md").read_text()
        assert f"{line['ece']:.4f}" in card, folder
    assert card.count("| test.de |") == 1, "best's figures are not the last model's"
    assert not any(words[:1] == ["mean"] for words in table), "of two models"


def measure(model: Path, file: Path, scratch: Path) -> dict[str, float]:
    options = ["--precision", "fp32", "--device", "cpu", "--json", scratch, "--overwrite"]
    program.main([str(word) for word in ("--model", model, "--file", f"x={file}", *options)])
    found = json.loads(scratch.read_text())["files"]["x"]
    return {key: found[key] for key in ("loss", "accuracy", "macro_f1", "ece")}


def test_predict_abstains(model: Path, tmp_path: Path, capsys: Capture) -> None:
    highest = probabilities_of(model).max(1)
    limit = float(np.sort(highest)[2]) - 1e-6
    options = ["--model", str(model), "--device", "cpu", "--precision", "fp32"]
    predict.main([*options, "--abstain-below", str(limit), *TEXTS])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] == "?" for row in rows] == (highest < limit).tolist()
    assert sum(row[0] == "?" for row in rows) == 2
    assert "'1.5' is not a probability" in refusal(predict.main, [*options, "--abstain-below", "1.5", "x"])
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta\n")
    words = ["--input", str(tmp_path / "test.tsv"), "--glue-submission", str(tmp_path / "g"), "--abstain-below", "0.9"]
    assert "needs a label per row" in refusal(predict.main, [*options, *words])
    assert not (tmp_path / "g").exists()
