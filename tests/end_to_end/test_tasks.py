"""Several labels, scores, weights and long texts, from a file to the answers of every exported form."""

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, Capture, change_weights, json_lines, losses, metrics, refusal, run_export, train_options
from running import call_in_forks, digests, forget_after, resume, train_on_ranks

from sst2_xlmr import load, train
from sst2_xlmr.data.batches import split_windows
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.programs import evaluate, predict, study
from sst2_xlmr.util import versions
from sst2_xlmr.util.files import digest_of

WORDS = ["good", "bad", "film", "slow", "fine", "plot", "music", "actors", "never", "again"]


def write_rows(folder: Path, label: Any, rows: int = 60, longest: int = 12) -> Path:
    """Write train.jsonl and dev.jsonl of random words; a row's label is made of its words."""
    folder.mkdir()
    chance = random.Random(0)
    for split, count in (("train", rows), ("dev", 20)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                words = [chance.choice(WORDS) for _ in range(chance.randint(2, longest))]
                file.write(json.dumps({"text": " ".join(words), "label": label(words)}) + "\n")
    return folder


def several(words: list[str]) -> list[str]:
    return [word for word in WORDS[:3] if word in words]


def score(words: list[str]) -> float:
    return 50 + 10.5 * words.count("good") - 10.5 * words.count("bad")


@pytest.fixture(scope="module", params=[several, score])
def trained(request: Any, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    data = write_rows(folder / "data", request.param)
    train.main(train_options(tiny_encoder, data, folder / "run", "--epochs", 20, "--eval-every", 0))
    return folder / "run"


def test_every_task_learns_and_says_what_it_is(trained: Path) -> None:
    first, *_, last = (line for line in metrics(trained) if line.get("split") == "dev")
    main = "macro_f1" if "macro_f1" in last else "spearman"
    assert last[main] > max(first[main], 0.5)
    config = json.loads((trained / "model/config.json").read_text())
    assert config["problem_type"] == {"macro_f1": "multi_label_classification", "spearman": "regression"}[main]
    assert len(config.get("thresholds", [])) == (3 if main == "macro_f1" else 0)


def test_predict_evaluate_and_python_agree(trained: Path, tmp_path: Path) -> None:
    dev, model = trained.parent / "data/dev.jsonl", trained / "model"
    rows = json_lines(dev)
    texts = [row["text"] for row in rows]
    classifier, common = load(model, "fp32"), ["--model", str(model), "--precision", "fp32"]
    answers, probabilities = classifier.predict(texts), classifier.probabilities(texts)
    for name in ("a.jsonl", "a.csv"):
        predict.main([*common, "--input", str(dev), "--output", str(tmp_path / name)])
    written = json_lines(tmp_path / "a.jsonl")
    in_table = list(csv.DictReader((tmp_path / "a.csv").open(newline="")))
    evaluate.main([*common, "--file", str(dev), "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["files"]["dev"]
    logged = [line for line in metrics(trained) if line.get("split") == "dev"][-1]
    if isinstance(answers[0], list):
        assert [row["labels"] for row in written] == answers
        assert [row["labels"] for row in in_table] == [",".join(each) for each in answers]
        right = np.mean([set(answer) == set(row["label"]) for answer, row in zip(answers, rows)])
        assert found["exact_match"] == pytest.approx(right)
        assert found["macro_f1"] == pytest.approx(logged["macro_f1"])
        assert set(found["classes"]) == set(WORDS[:3])
    else:
        assert [row["score"] for row in written] == answers == pytest.approx(probabilities[:, 0].tolist(), rel=1e-5)
        assert [float(row["score"]) for row in in_table] == answers
        assert found["rmse"] == pytest.approx(logged["rmse"], rel=1e-4)
        errors = probabilities[:, 0] - [row["label"] for row in rows]
        assert found["rmse"] == pytest.approx(float(np.sqrt((errors**2).mean())), rel=1e-4)
        in_bf16 = load(model, "bf16").probabilities(texts)
        assert in_bf16 == pytest.approx(probabilities, abs=0.2)
        assert (in_bf16 != torch.from_numpy(in_bf16).bfloat16().float().numpy()).any(), "not rounded to bf16"
    common += ["--input", str(dev)]
    for option, value in (("--glue-submission", tmp_path / "glue"), ("--abstain-below", 0.5)):
        out = [] if "glue" in option else ["--output", str(tmp_path / "b.csv")]
        assert f"{option} does not go with this" in refusal(predict.main, [*common, *out, option, str(value)])


def test_transformers_gives_the_same_probabilities(trained: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["good film", "bad bad plot", "never again"]
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    inputs = AutoTokenizer.from_pretrained(trained / "model")(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = logits.sigmoid() if model.config.problem_type.startswith("multi") else logits
    found = load(trained / "model", precision="fp32").probabilities(texts)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["hf", "onnx", "onnx --from-ids", "onnx-hf", "onnx-int8", "torchscript"])
def test_exported_forms_give_the_same_answers(trained: Path, tmp_path: Path, form: str) -> None:
    """export.py compares all answers itself, and would refuse others."""
    if form == "torchscript":
        pytest.importorskip("torchtext")
    options = ["--most-changed", 1, "--most-lost", 1, "--check-file", trained.parent / "data/dev.jsonl"]
    words = [*form.split(), *(options if "int8" in form else [])]
    run_export("--model", trained / "model", "--output", tmp_path / "out", "--format", *words)
    if form == "torchscript":
        found = torch.jit.load(tmp_path / "out")(["good film", "bad"])
        expected = load(trained / "model", precision="fp32")
        answers = found[0] if isinstance(found, tuple) else pytest.approx(found[:, 0].tolist(), rel=1e-4)
        assert expected.predict(["good film", "bad"]) == answers


def test_tasks_resume_to_the_bit_and_a_trained_head_goes_on(trained: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    data = trained.parent / "data"
    train.main(train_options(tiny_encoder, data, tmp_path / "whole", "--epochs", 3, "--save-every", 5))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    forget_after(tmp_path / "resumed", 20)
    resume(tmp_path / "resumed")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")
    train.main(train_options(trained / "model", data, tmp_path / "on", "--epochs", 1, "--lr", 1e-9))
    runs = (tmp_path / "on", trained)
    first, last = ([line for line in metrics(run) if line.get("split") == "dev"][-1] for run in runs)
    main = "macro_f1" if "macro_f1" in last else "rmse"
    assert first[main] == pytest.approx(last[main], rel=1e-3), "its own head goes on where it was"


def test_equal_weights_and_absent_rows_change_no_bit(tiny_encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", lambda words: words[0] in WORDS[:5])
    rows = json_lines(data / "train.jsonl")

    def run(name: str, weights: Any, *options: Any) -> str:
        lines = [json.dumps({**row, "w": weight}) for row, weight in zip(rows, weights) if weight is not None]
        (data / "train.jsonl").write_text("\n".join(lines) + "\n")
        train.main(train_options(tiny_encoder, data, tmp_path / name, "--epochs", 1, *options))
        return digest_of(tmp_path / name / "model/model.safetensors")

    plain = run("plain", [1] * 60)
    assert run("twice", [2] * 60, "--weight-column", "w") == plain
    np.testing.assert_allclose(losses(tmp_path / "twice"), losses(tmp_path / "plain"), rtol=1e-6)
    some = [None if number % 3 == 0 else 1 for number in range(60)]
    assert run("zeros", [each or 0 for each in some], "--weight-column", "w") == run("absent", some)
    options = ["--weight-column", "w", "--dev-share", 0.2]  # so that only some rows are trained on
    assert run("weighted", range(60), *options) != plain
    train_on_ranks(2, train_options(tiny_encoder, data, tmp_path / "two", "--epochs", 1, *options), tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "weighted"), rtol=1e-4)


@pytest.fixture(scope="module")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("long") / "data", lambda words: words[-1] in WORDS[:5], 40, 60)


LONG = ("--max-length", 24, "--epochs", 1, "--long-texts")


@pytest.mark.parametrize("kind", ["head-tail", "windows"])
def test_every_form_reads_long_texts_alike(tiny_encoder: Path, long_data: Path, tmp_path: Path, kind: str) -> None:
    train.main(train_options(tiny_encoder, long_data, tmp_path / "run", *LONG, kind))
    model, text = tmp_path / "run/model", " ".join(WORDS * 9)
    classifier, tokenizer, _ = load_classifier(model, CPU, bf16=False)
    ids, lengths = tokenizer.flat_ids([text, "short"])
    cut, windows = split_windows(torch.from_numpy(ids).long(), torch.from_numpy(lengths))
    assert int(cut.max()) == 24
    assert (None if windows is None else windows.tolist()) == (None if kind == "head-tail" else [len(cut) - 1, 1])
    tail, last = tokenizer.pieces.Encode(text)[-10:], ids[int(lengths[0]) - 11 : int(lengths[0]) - 1]
    assert (last - 1).tolist() == tail, "the end of the text is there"
    if windows is not None:
        with torch.no_grad():
            parts = torch.from_numpy(ids).long().split(cut.tolist())
            features = [classifier.encoder(part[None], None) for part in parts]
            expected = classifier.head(torch.cat(features[:-1]).mean(0, keepdim=True)).softmax(1)
        np.testing.assert_allclose(load(model, precision="fp32").probabilities([text]), expected, atol=1e-5)
    one = load(model, precision="fp32")
    assert (one.probabilities([text, "short"])[1] == one.probabilities(["short"])[0]).all(), "one window is as ever"
    for form in ("hf", "onnx", *["torchscript"] * (versions.has_torchtext() and kind == "head-tail")):
        run_export("--model", model, "--output", tmp_path / form, "--format", form)
    if kind == "windows":
        options = ["--model", model, "--output", tmp_path / "ids", "--format", "onnx", "--from-ids"]
        assert "averages the windows of a long text" in refusal(run_export, *options)
    int8 = load(model, precision="int8").probabilities([text])
    np.testing.assert_allclose(int8, one.probabilities([text]), atol=0.05)


def test_windows_do_not_depend_on_how_a_batch_is_cut(tiny_encoder: Path, long_data: Path, tmp_path: Path) -> None:
    """Not on micro-batches, counted in windows, nor on processes, nor on whether an engine computes."""
    options = [*LONG, "windows", "--stride", 10, "--dropout", 0, "--head-dropout", 0]
    train.main(train_options(tiny_encoder, long_data, tmp_path / "whole", *options))
    expected, micro = losses(tmp_path / "whole"), [*options, "--micro-batch-size", 5]
    train.main(train_options(tiny_encoder, long_data, tmp_path / "micro", *micro))
    train.main(train_options(tiny_encoder, long_data, tmp_path / "plain", *options, "--no-compile"))
    train_on_ranks(2, train_options(tiny_encoder, long_data, tmp_path / "two", *micro), tmp_path)
    for name in ("micro", "plain", "two"):
        np.testing.assert_allclose(losses(tmp_path / name), expected, rtol=2e-4, err_msg=name)


def test_texts_that_fit_train_as_ever(tiny_encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", lambda words: words[0] in WORDS[:5])
    for kind in ("cut", "windows"):
        train.main(train_options(tiny_encoder, data, tmp_path / kind, "--epochs", 1, "--long-texts", kind))
    assert losses(tmp_path / "cut") == losses(tmp_path / "windows")


def test_rows_are_answered_by_models_that_never_saw_them(tiny_encoder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = write_rows(tmp_path / "data", lambda words: "yes" if "good" in words else "no", 90, 8)
    rows = json_lines(data / "train.jsonl")
    for row in rows[::18]:
        row["label"] = {"yes": "no", "no": "yes"}[row["label"]]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
    options = train_options(tiny_encoder, data, tmp_path / "folds", "--epochs", 40, "--lr", 3e-3, "--eval-every", 0)
    place = options.index("--data-dir")
    options[place : place + 2] = ["--train-file", str(data / "train.jsonl")]
    call_in_forks(study.main, "--folds", 3, *options)
    folder = tmp_path / "folds/ours"
    found = json_lines(folder / "out-of-fold.jsonl")
    assert [row["text"] for row in found] == [row["text"] for row in [*rows, rows[1]]]
    assert found[1]["fold"] == found[90]["fold"], "equal texts stay together"
    for fold in (1, 2, 3):
        model = load(folder / f"fold-{fold}/seed-0/model")
        texts = [row["text"] for row in found if row["fold"] == fold]
        seen = {json.loads(line)["text"] for line in (folder / f"fold-{fold}/train.jsonl").read_text().splitlines()}
        assert not seen & set(texts)
        assert model.predict(texts) == [row["predicted_label"] for row in found if row["fold"] == fold]
        for label in ("yes", "no"):
            everywhere = [row["fold"] for row in found if row["label"] == label]
            assert abs(everywhere.count(fold) - len(everywhere) / 3) <= 2
    doubtful = json_lines(folder / "label-errors.jsonl")
    flipped = {i + 1 for i in range(0, 90, 18)}
    assert len(flipped & {row["line"] for row in doubtful[:12]}) >= 3
    assert "label errors" in capsys.readouterr().out
    call_in_forks(study.main, "--folds", 3, *options)
    assert "was finished" in capsys.readouterr().out


def test_calibrating_several_labels_moves_no_label(trained: Path, tmp_path: Path) -> None:
    dev, model = trained.parent / "data/dev.jsonl", trained / "model"
    words = ["--model", str(model), "--calibrate", str(dev), "--output", str(tmp_path / "calibrated")]
    if load(model).task.label_names == ["score"]:
        assert "--calibrate does not go with this task" in refusal(evaluate.main, words)
        return

    def overconfident(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
            tensors[name] = tensors[name] * 8

    model = change_weights(model, tmp_path / "overconfident", overconfident)
    evaluate.main(["--model", str(model), *words[2:]])
    texts = [json.loads(line)["text"] for line in dev.read_text().splitlines()]
    before, after = load(model, precision="fp32"), load(tmp_path / "calibrated", precision="fp32")
    assert not np.allclose(before.probabilities(texts), after.probabilities(texts), atol=1e-3)
    assert before.predict(texts) == after.predict(texts)


def test_several_models_are_one_answer(trained: Path, tmp_path: Path) -> None:
    dev, folders = trained.parent / "data/dev.jsonl", [trained / "model", trained / "best"]
    rows = json_lines(dev)
    models = [word for folder in folders for word in ("--model", str(folder))]
    predict.main([*models, "--input", str(dev), "--output", str(tmp_path / "a.jsonl"), "--precision", "fp32"])
    answers = json_lines(tmp_path / "a.jsonl")
    both = [load(folder, "fp32").probabilities([row["text"] for row in rows]) for folder in folders]
    mean = np.mean(both, axis=0)
    if "score" in answers[0]:
        np.testing.assert_allclose([row["score"] for row in answers], mean[:, 0], rtol=1e-5)
    evaluate.main([*models, "--file", str(dev), "--json", str(tmp_path / "a.json"), "--precision", "fp32"])
    found = json.loads((tmp_path / "a.json").read_text())["files"]["dev"]
    task = load(folders[0]).task
    labels = np.array([task.read_label(row["label"], "") for row in rows], np.float32)
    expected = task.metrics(task.results_of(mean.astype(np.float32), labels), labels)
    assert found["loss"] == pytest.approx(expected["loss"])
