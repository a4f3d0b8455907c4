"""The compact table: which rows, which numbers, and the same result as training the whole table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses, metrics
from safetensors.torch import load_file

from sst2_xlmr.model.vocabulary import expand_table, renumbering, used_ids
from sst2_xlmr.util.tensors import Deferred


def test_ids_that_occur_and_the_special_ones() -> None:
    kept = used_ids([np.array([0, 9, 7, 2], np.int32), np.array([7, 30], np.int32)], 40)
    assert kept.tolist() == [0, 1, 2, 3, 7, 9, 30]
    rows = renumbering(kept, 40)
    assert rows[[0, 1, 2, 3, 7, 9, 30]].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert rows[8] == 3


def test_expand_decays_what_was_not_trained() -> None:
    table, rows = torch.arange(12.0).view(6, 2), torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    before = Deferred((6, 2), table.dtype, lambda start, stop: table[start:stop])
    after = Deferred((2, 2), rows.dtype, lambda start, stop: rows[start:stop])
    expanded = expand_table(before, torch.tensor([0, 4]), after, 0.5)
    expected = [[-1, -1], [1, 1.5], [2, 2.5], [3, 3.5], [-2, -2], [5, 5.5]]
    assert expanded.shape == (6, 2)
    for start in range(6):
        for stop in range(start + 1, 7):
            assert expanded.rows(start, stop).tolist() == expected[start:stop]


TABLE = "roberta.embeddings.word_embeddings.weight"


def train_both(run_train: Callable[..., Path], tmp_path: Path, *options: object) -> tuple[Path, Path]:
    """Return the run with the compact table, and the run with the whole one."""
    compact = run_train(tmp_path / "compact", *options)
    return compact, run_train(tmp_path / "whole", *options, "--full-vocabulary")


@pytest.mark.parametrize("how", ["--compile", "--no-compile"])
def test_same_result_as_the_whole_table(run_train: Callable[..., Path], tmp_path: Path, how: str) -> None:
    """Without clipping, whose norm is summed in another order, all is equal to the bit but the untouched rows."""
    compact, whole = train_both(run_train, tmp_path, how, "--epochs", 2, "--max-grad-norm", 0, "--weight-decay", 0.1)
    assert losses(compact) == losses(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (compact, whole))
    for name, tensor in theirs.items():
        if name == TABLE:
            saved = load_file(next((compact / "checkpoints").glob("step-*")) / "vocabulary.safetensors")
            kept = saved["kept_ids"]
            assert 4 < len(kept) < len(tensor)
            assert torch.equal(ours[name][kept], tensor[kept])
            torch.testing.assert_close(ours[name], tensor, atol=1e-7, rtol=1e-5)
        else:
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("how", ["--compile", "--no-compile"])
def test_all_rows_agree_with_clipping(
    run_train: Callable[..., Path], tiny_encoder: Path, tmp_path: Path, how: str
) -> None:
    """30 steps with decay and clipping: all weights within 1e-6, where decay alone moves untouched rows by far more."""
    options = [how, "--max-steps", 30, "--weight-decay", 0.1, "--max-grad-norm", 0.05]
    runs = train_both(run_train, tmp_path, *options)
    assert min(line["grad_norm"] for line in metrics(runs[0]) if "split" not in line) > 0.05, "a step was not clipped"
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in runs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=0, msg=name)
    kept = load_file(next((runs[0] / "checkpoints").glob("step-*")) / "vocabulary.safetensors")["kept_ids"]
    is_untouched = torch.ones(len(ours[TABLE]), dtype=torch.bool)
    is_untouched[kept] = False
    assert int(is_untouched.sum()) > 100
    before = load_file(tiny_encoder / "model.safetensors")[TABLE]
    assert float((ours[TABLE] - before)[is_untouched].abs().max()) > 1e-4
