"""The same run on this torch and on another: SST2_XLMR_TEST_OTHER_STACK names the other's Python."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE_DATA, SMALL_ENCODER, losses, needs_small_encoder, sst2_sentences, train_options
from running import ROOT, printed_by, resume

import sst2_xlmr
from sst2_xlmr import train

OTHER = os.environ.get("SST2_XLMR_TEST_OTHER_STACK", "")
STEPS = 30

pytestmark = [pytest.mark.skipif(not OTHER, reason="there is no SST2_XLMR_TEST_OTHER_STACK"), needs_small_encoder]

PROBABILITIES = """
import sys, json, sst2_xlmr
model = sst2_xlmr.load(sys.argv[1], precision="fp32", device="cpu")
json.dump(model.probabilities(json.load(open(sys.argv[2]))).tolist(), open(sys.argv[3], "w"))
"""


def test_losses_a_resumed_run_and_probabilities_are_the_same(tmp_path: Path) -> None:
    options = ["--max-steps", STEPS, "--batch-size", 16, "--lr", 5e-5, "--max-length", 256, "--save-every", STEPS // 2]
    printed_by(ROOT, OTHER, "train.py", *train_options(SMALL_ENCODER, SAMPLE_DATA, tmp_path / "theirs", *options))
    train.main(train_options(SMALL_ENCODER, SAMPLE_DATA, tmp_path / "ours", *options))
    theirs = losses(tmp_path / "theirs")
    assert losses(tmp_path / "ours") == pytest.approx(theirs, rel=1e-5)

    model, texts = tmp_path / "theirs" / "model", sst2_sentences()
    (tmp_path / "texts").write_text(json.dumps(texts), encoding="utf-8")
    printed_by(ROOT, OTHER, "-c", PROBABILITIES, model, tmp_path / "texts", tmp_path / "probabilities")
    found = np.array(json.loads((tmp_path / "probabilities").read_text()))
    ours = sst2_xlmr.load(model, precision="fp32", device="cpu").probabilities(texts)
    assert found.shape == (len(texts), 2)
    np.testing.assert_allclose(found, ours, atol=1e-5)
    assert (found.argmax(1) == ours.argmax(1)).all()

    for name in ("model", "best", f"checkpoints/step-{STEPS:08}"):
        shutil.rmtree(tmp_path / "theirs" / name)
    resume(tmp_path / "theirs")
    assert losses(tmp_path / "theirs") == pytest.approx(theirs, rel=1e-5)
    assert len(theirs) == STEPS
