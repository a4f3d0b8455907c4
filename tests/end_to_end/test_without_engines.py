"""Everything works without `engines/`, as with `--no-compile`; with it bf16 learns as under torch's autocast."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL_ENCODER, SST2, RunTrain, losses, metrics, needs_small_encoder, train_options
from running import printed_by
from safetensors.torch import load_file

from sst2_xlmr import train

PROGRAM = """
import sys
import sst2_xlmr
from sst2_xlmr import train
from sst2_xlmr.programs import evaluate, predict
at = [number for number, word in enumerate(sys.argv) if word == "--then"]
train.main(sys.argv[1 : at[0]])
evaluate.main(sys.argv[at[0] + 1 : at[1]])
predict.main(sys.argv[at[1] + 1 :])
print(sst2_xlmr.__file__)
"""


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("stripped")
    shutil.copy(ROOT / "train.py", copy)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copytree(ROOT / "sst2_xlmr", copy / "sst2_xlmr", ignore=shutil.ignore_patterns("engines", "__pycache__"))
    return copy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_evaluates_and_predicts(
    stripped: Path, run_train: RunTrain, tiny_encoder: Path, small_data: Path, tmp_path: Path, precision: str
) -> None:
    options = ["--epochs", 1, "--precision", precision, "--micro-batch-size", 5]
    folder, reference = tmp_path / "run", run_train(tmp_path / "reference", *options, "--no-compile")
    model = ["--model", folder / "model", "--device", "cpu", "--precision", precision]
    words = train_options(tiny_encoder, small_data, folder, *options)
    then = ["--then", *model, "--file", f"dev={small_data / 'dev.tsv'}", "--then", *model, "A fine film."]
    said = printed_by(stripped, sys.executable, "-c", PROGRAM, *words, *then)
    assert "plain PyTorch: slower" in said
    assert losses(folder) == losses(reference)
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (folder, reference))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert f"{metrics(folder)[-1]['accuracy']:.4f}" in said.split("\nmodel  ")[1]
    *_, answer, file = said.splitlines()
    assert answer.count("\t") == 2
    assert file.startswith(f"{stripped}/sst2_xlmr")


@pytest.mark.slow
@needs_small_encoder
@pytest.mark.skipif(not (SST2 / "train.tsv").is_file(), reason=f"{SST2} is not there")
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_bf16_learns_as_autocast_does(tmp_path: Path, threads: int) -> None:
    """Without dropout its loss differs from that of plain PyTorch by far less than that of another seed."""
    (data := tmp_path / "data").mkdir()
    for split, rows in (("train", 8000), ("dev", 20)):  # more would take longer to tokenize than to train on
        lines = (SST2 / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        (data / f"{split}.tsv").write_text("\n".join(lines[: rows + 1]) + "\n", encoding="utf-8")

    def curve(name: str, *options: object) -> np.ndarray:
        fixed = ["--precision", "bf16", "--batch-size", 16, "--max-steps", 200, "--lr", 2e-5, "--threads", threads]
        run, exact = tmp_path / name, ["--dropout", 0, "--head-dropout", 0, "--eval-every", 0]
        train.main(train_options(SMALL_ENCODER, data, run, *fixed, *exact, *options))
        return np.array(losses(run)).reshape(-1, 20).mean(1)

    reference, other_seed = (curve(f"plain-{seed}", "--no-compile", "--seed", seed) for seed in (1, 2))
    ours = curve("engine", "--compile", "--seed", 1)
    assert reference[-1] < 0.75 * reference[0], "the reference did not learn"
    difference, spread = np.abs(ours - reference), np.abs(other_seed - reference)
    assert difference.mean() < 0.25 * spread.mean()
    assert difference.max() < 0.5 * spread.max()
