"""The same run on this torch and on another: SST2_XLMR_TEST_OTHER_STACK names the other's Python."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    SAMPLE_DATA,
    SMALL_ENCODER,
    SST2,
    losses,
    needs_small_encoder,
    sst2_sentences,
    train_options,
)

from sst2_xlmr import train
from sst2_xlmr.data.rows import Columns
from sst2_xlmr.data.token_cache import tokenize_file
from sst2_xlmr.task import SST2_NAMES, SingleLabel

OTHER = os.environ.get("SST2_XLMR_TEST_OTHER_STACK", "")
STEPS = 30

pytestmark = [
    pytest.mark.skipif(not OTHER, reason="SST2_XLMR_TEST_OTHER_STACK does not name the Python of another stack"),
    needs_small_encoder,
]

DIGEST_OF_IDS = """
import sys, hashlib
from pathlib import Path
from sst2_xlmr.data.rows import Columns
from sst2_xlmr.data.token_cache import tokenize_file
from sst2_xlmr.task import SST2_NAMES, SingleLabel
task = SingleLabel(SST2_NAMES)
tokenizer, folder, *files = map(Path, sys.argv[1:])
for file in files:
    print(hashlib.sha256(tokenize_file(file, tokenizer, Columns(), task, 256, folder).ids.tobytes()).hexdigest())
"""

PROBABILITIES = """
import sys, json, sst2_xlmr
model = sst2_xlmr.load(sys.argv[1], precision="fp32", device="cpu")
json.dump(model.probabilities(json.load(open(sys.argv[2]))).tolist(), open(sys.argv[3], "w"))
"""


def run(python: str, *command: object) -> str:
    """Run a program of the project under a Python."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [python, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(folder: Path, *more: object) -> list[str]:
    fixed = ["--max-steps", STEPS, "--batch-size", 16, "--lr", 5e-5, "--max-length", 256]
    return train_options(SMALL_ENCODER, SAMPLE_DATA, folder, *fixed, *more)


def test_ids_are_the_same(tmp_path: Path) -> None:
    """All rows of SST-2's train and dev where they are at hand."""
    tokenizer = SMALL_ENCODER / "sentencepiece.bpe.model"
    files = [(SST2 if SST2.is_dir() else SAMPLE_DATA) / f"{split}.tsv" for split in ("train", "dev")]
    theirs = run(OTHER, "-c", DIGEST_OF_IDS, tokenizer, tmp_path / "theirs", *files).split()
    task = SingleLabel(SST2_NAMES)
    ours = [tokenize_file(file, tokenizer, Columns(), task, 256, tmp_path / "ours").ids for file in files]
    assert theirs == [hashlib.sha256(ids.tobytes()).hexdigest() for ids in ours]


def test_losses_a_resumed_run_and_probabilities_are_the_same(tmp_path: Path) -> None:
    run(OTHER, "train.py", *options(tmp_path / "theirs", "--save-every", STEPS // 2))
    train.main(options(tmp_path / "ours"))
    theirs = losses(tmp_path / "theirs")
    assert losses(tmp_path / "ours") == pytest.approx(theirs, rel=1e-5)

    model, texts = tmp_path / "theirs" / "model", sst2_sentences()
    (tmp_path / "texts").write_text(json.dumps(texts), encoding="utf-8")
    for name, python in (("a", OTHER), ("b", sys.executable)):
        run(python, "-c", PROBABILITIES, model, tmp_path / "texts", tmp_path / name)
    found = [np.array(json.loads((tmp_path / name).read_text())) for name in "ab"]
    assert found[0].shape == (len(texts), 2)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert (found[0].argmax(1) == found[1].argmax(1)).all()

    for name in ("model", "best", f"checkpoints/step-{STEPS:08}"):
        shutil.rmtree(tmp_path / "theirs" / name)
    train.main(["--resume", "--output-dir", str(tmp_path / "theirs")])
    assert losses(tmp_path / "theirs") == pytest.approx(theirs, rel=1e-5)
    assert len(theirs) == STEPS
