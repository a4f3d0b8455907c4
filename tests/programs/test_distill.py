"""`sst2-xlmr distill`: what the students are trained on, and that they are the same after a kill."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Capture, Words, json_lines, refusal, user_error
from running import call_in_forks

import sst2_xlmr
from sst2_xlmr.programs import distill
from sst2_xlmr.task import MultiLabel, Regression, SingleLabel
from sst2_xlmr.util.files import digest_of

TEXTS = ["a fine film", "dull and slow", "hard to say", "quite moving , in parts", "  "]


run = partial(call_in_forks, distill.main)


@pytest.fixture
def options(train_words: Words, small_data: Path, tmp_path: Path) -> Words:
    """Return a quick distillation's options; the unlabelled texts are TEXTS and one each of train and dev."""
    seen = [(small_data / f"{split}.tsv").read_text().splitlines()[1].split("\t")[0] for split in ("train", "dev")]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, *seen]))
    fixed = ["--unlabelled", texts, "--teacher-precision", "fp32"]
    return lambda *more: [*fixed, *train_words(tmp_path / "all", "--epochs", 1, *more)]


def test_students_learn_from_the_mean_of_the_labelled_runs(options: Words, tmp_path: Path, capsys: Capture) -> None:
    folder, words = tmp_path / "all", options("--seeds", "3,5", "--rounds", 2, "--labelled", "--epochs 2 --seed 9")
    assert "leave out --seed" in user_error(run, *words)
    words[-1] = "--epochs 2"
    run(*words)
    printed = capsys.readouterr().out
    assert "round-1: 4 unlabelled texts; 3 left out: labelled, evaluated on, or empty; teacher dev 0." in printed
    configs = [json.loads((folder / name / "seed-3/config.json").read_text()) for name in ("labelled", "round-1")]
    assert [config["epochs"] for config in configs] == [2, 1]
    for name, previous in (("round-1", "labelled"), ("round-2", "round-1")):
        rows = json_lines(folder / name / "train.jsonl")
        assert len(rows) == 50 + 4
        assert [row["text"] for row in rows[50:]] == TEXTS[:4]
        assert {str(row["label"]) for row in rows[:50]} == {"negative", "positive"}
        models = [sst2_xlmr.load(folder / previous / f"seed-{seed}/model", "fp32", "cpu") for seed in (3, 5)]
        mean = np.mean([model.probabilities(TEXTS[:4]) for model in models], axis=0)
        assert np.allclose([[*row["label"].values()] for row in rows[50:]], mean, atol=2e-6)
    results = json.loads((folder / "study.json").read_text())
    assert list(results["runs"]) == ["labelled", "round-1", "round-2"]
    assert "dev" in results["summary"]["round-2"]["difference"]

    # As if the program had been killed before the rows of the second round were complete.
    students = [folder / f"round-2/seed-{seed}" for seed in (3, 5)]
    before = [digest_of(student / "model/model.safetensors") for student in students]
    for file in ("teacher.json", "train.jsonl"):
        (folder / "round-2" / file).unlink()
    for student in students:
        student.rename(tmp_path / student.name)
    run(*words)
    assert capsys.readouterr().out.count("was finished") == 4
    assert [digest_of(student / "model/model.safetensors") for student in students] == before


def test_given_teachers_temperature_and_weight(options: Words, model: Path, small_data: Path, tmp_path: Path) -> None:
    for file in small_data.iterdir():  # with the model's labels
        file.write_text(file.read_text().replace("\t0", "\ta").replace("\t1", "\tb"))
    with_names = options("--teacher", model, "--temperature", 0.5, "--unlabelled-weight", 0.25)
    run(*with_names)
    rows = json_lines(tmp_path / "all/round-1/train.jsonl")
    found = sst2_xlmr.load(model, "fp32", "cpu").probabilities(TEXTS[:4]).astype(np.float64)
    expected = found**2 / (found**2).sum(1, keepdims=True)
    assert np.allclose([list(row["label"].values()) for row in rows[50:]], expected, atol=2e-6)
    assert [row["weight"] for row in rows] == [1.0] * 50 + [0.25] * 4
    assert json.loads((tmp_path / "all/round-1/seed-1/config.json").read_text())["weight_column"] == "weight"
    teacher = json.loads((tmp_path / "all/round-1/teacher.json").read_text())
    dev = [row.split("\t") for row in (tmp_path / "data/dev.tsv").read_text().splitlines()[1:]]
    right = sst2_xlmr.load(model, "fp32", "cpu").predict([text for text, _ in dev])
    accuracy = np.mean([label == answer for (_, label), answer in zip(dev, right)])
    assert teacher["figures"]["dev"] == pytest.approx(accuracy)
    for other in (["--temperature", 1], ["--teacher", model]):  # a second one
        assert "other teachers, texts or options" in refusal(run, *with_names, *other)

    run(*with_names, "--temperature", 1, "--align-classes", "--output-dir", tmp_path / "aligned")
    rows = json_lines(tmp_path / "aligned/round-1/train.jsonl")
    soft = np.array([list(row["label"].values()) for row in rows[50:]])
    share = np.mean([row["label"] == "b" for row in rows[:50]])
    assert soft.mean(0) == pytest.approx([1 - share, share], abs=1e-5)
    ratios = np.log(soft[:, 1] / soft[:, 0]) - np.log(found[:, 1] / found[:, 0])
    assert np.ptp(ratios) < 1e-4 < abs(ratios.mean()), "all logits are shifted alike"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--teacher", "MODEL"], "has labels a, b (single-label), the labelled rows have negative, positive"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--labelled", "--lr 'x"], "--labelled: cannot split"),
        (["--labelled", "--epoch 3"], "did you mean --epochs?"),
        (["--resume"], "leave out --resume"),
        (["--text-column", "x"], "no column 'x'"),
        (["--unlabelled", "none.txt"], "none.txt"),
        (["--columns", "unlabelled:text=x"], "no column 'x'"),
        (["--teacher", "none"], "none"),
    ],
)
def test_misuse(more: list[str], says: str, options: Words, model: Path, tmp_path: Path) -> None:
    words = [str(model) if word == "MODEL" else word for word in more]
    assert says in user_error(run, *options(*words))
    assert not (tmp_path / "all").exists(), "before anything is trained"


def test_rows_that_are_all_known_or_without_dev(options: Words, small_data: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.tsv"
    known.write_text("".join((small_data / "dev.tsv").read_text().splitlines(True)[:3]))
    words = options()
    assert "give others with --unlabelled" in refusal(run, "--unlabelled", known, *words[2:])
    (small_data / "dev.tsv").unlink()
    assert "name them with --dev-file" in refusal(run, *words, "--output-dir", tmp_path / "other")


def test_answers_to_several_labels_are_aligned_label_by_label() -> None:
    probabilities, labels = np.array([[0.9, 0.3], [0.8, 0.1], [0.2, 0.2]], np.float32), np.eye(4, dtype=np.float32)
    assert MultiLabel([*"ab"]).align_classes(probabilities, labels[:, :2]).mean(0) == pytest.approx([0.25, 0.25])


def test_a_teachers_answers_as_labels_of_every_task() -> None:
    probabilities = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    single, several, scores = SingleLabel(["a", "b"]), MultiLabel(["a", "b"]), Regression(["score"])
    assert single.label_to_json(single.soft_labels(probabilities)[0]) == {"a": 0.25, "b": 0.75}
    assert several.label_to_json(several.soft_labels(probabilities, temperature=0.5)[0]) == {"a": 0.1, "b": 0.9}
    assert scores.label_to_json(scores.soft_labels(np.array([[2.5]], np.float32))[0]) == 2.5
