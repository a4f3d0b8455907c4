"""A trained model, as Python uses it."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Capture, Patch, change_json, change_weights, refusal

import sst2_xlmr
from sst2_xlmr.predictor import Classifier

TEXTS = ["A fine film.", "", "Ein Café, größer als nötig", "word " * 50, "好"]


def test_two_lines_of_python(model: Path) -> None:
    """Loading warns of nothing and prints nothing."""
    lines = f"import sst2_xlmr; model = sst2_xlmr.load({str(model)!r}); print(model.predict(['A fine film.', 'x']))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"{sst2_xlmr.load(model).predict(['A fine film.', 'x'])}\n"


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int8"])
def test_labels_and_probabilities_belong_together(model: Path, precision: str, capsys: Capture) -> None:
    classifier = sst2_xlmr.load(model, precision=precision, device="cpu")
    is_as_asked = precision == "auto" or "int8 needs a CPU" in capsys.readouterr().err
    assert classifier.precision == precision or is_as_asked
    assert (classifier.label_names, classifier.device) == (["a", "b"], torch.device("cpu"))
    found = classifier.probabilities(TEXTS)
    assert (found.shape, found.dtype) == ((5, 2), np.float32)
    assert np.allclose(found.sum(1), 1)
    assert classifier.predict(TEXTS) == [["a", "b"][number] for number in found.argmax(1)]
    in_order = [classifier.probabilities([text])[0] for text in TEXTS]
    assert np.allclose(found, in_order, atol=1e-6 if precision == "fp32" else 0.02)
    assert np.allclose(classifier.probabilities(TEXTS, batch_tokens=8), found, atol=0.02)
    assert classifier.probabilities([]).shape == (0, 2)
    assert classifier.predict([]) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_loaded_model_does_not_change_with_its_file(model: Path, tmp_path: Path, precision: str) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    classifier = sst2_xlmr.load(folder, precision=precision, device="cpu")
    expected = classifier.probabilities(TEXTS)
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert np.array_equal(classifier.probabilities(TEXTS), expected)


def test_several_threads_get_what_one_gets(model: Path, monkeypatch: Patch) -> None:
    """To the bit, and the model is used by one of them at a time."""
    classifier = Classifier.load(model, "fp32", torch.device("cpu"))
    chunks = [[f"{text} {number}" for text in TEXTS] for number in range(40)]
    expected = [classifier.probabilities(chunk) for chunk in chunks]
    forward, inside, most = classifier.module.forward, [], []

    def counted(*arguments: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        logits = forward(*arguments)
        inside.pop()
        return logits

    monkeypatch.setattr(classifier.module, "forward", counted)
    with ThreadPoolExecutor(8) as threads:
        for found, wanted in zip(threads.map(classifier.probabilities, chunks), expected):
            assert np.array_equal(found, wanted)
    assert set(most) == {1}


def test_wrong_use(model: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(model, "fp32", "cpu")
    no_texts: list[Any] = ["a text", ["a", ("b", "c")], [("a", "b", "c")], [("a", "b"), ("c",)], [1.5], [None]]
    for texts in no_texts:
        with pytest.raises(TypeError, match="texts must be a list of strings, or a list of pairs of strings"):
            classifier.predict(texts)
    assert "text 2: contains a NUL character or a lone" in refusal(classifier.predict, ["fine", "half \ud83d"])
    assert "config.json" in refusal(sst2_xlmr.load, tmp_path)
    with pytest.raises(ValueError, match="precision must be auto, bf16, fp32 or int8, not 'fp16'"):
        sst2_xlmr.load(model, precision="fp16")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or a torch.device, not 'gpu'"):
        sst2_xlmr.load(model, device="gpu")
    assert "--precision int8 is for a CPU" in refusal(Classifier.load, model, "int8", torch.device("cuda"))


def test_several_models_answer_with_the_mean_of_their_probabilities(model: Path, tmp_path: Path) -> None:
    other = change_weights(model, tmp_path / "other", lambda tensors: tensors["classifier.out_proj.bias"].add_(0.5))
    texts = ["a film", "not good", "never again " * 9]
    for precision in ("fp32", "int8"):
        both = [Classifier.load(folder, precision, "cpu").probabilities(texts) for folder in (model, other)]
        mean = Classifier.load_ensemble([model, other], precision, "cpu")
        np.testing.assert_allclose(mean.probabilities(texts), np.mean(both, axis=0), atol=1e-6)
    change_json(other / "config.json", id2label={"0": "x", "1": "y"})
    assert "so they cannot be averaged" in refusal(Classifier.load_ensemble, [model, other], "fp32", "cpu")
