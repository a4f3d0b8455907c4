"""The compact table: which rows, which numbers, and the same result as training the whole table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses, metrics
from safetensors.torch import load_file

from sst2_xlmr.model.vocabulary import Vocabulary, used_vocabulary, whole_vocabulary
from sst2_xlmr.util.tensors import LazyTensor


def test_ids_that_occur_and_the_special_ones() -> None:
    vocabulary = used_vocabulary([np.array([0, 9, 7, 2], np.int32), np.array([7, 30], np.int32)], 40)
    assert vocabulary.ids.tolist() == [0, 1, 2, 3, 7, 9, 30]
    id_map = vocabulary.id_map()
    assert id_map is not None
    assert id_map[vocabulary.ids].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert id_map[8] == 3
    assert not vocabulary.is_whole
    assert whole_vocabulary(40).is_whole and whole_vocabulary(40).id_map() is None


def test_expand_decays_what_was_not_trained() -> None:
    table, rows = torch.arange(12.0).view(6, 2), torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    before = LazyTensor((6, 2), table.dtype, lambda start, stop: table[start:stop])
    vocabulary = Vocabulary(torch.tensor([0, 4]), 6, decay_rate=0.1)
    for lr in (0.5, 1.0):
        vocabulary.count_step(lr)
    assert vocabulary.decay == pytest.approx(0.95 * 0.9)
    vocabulary.decay = 0.5
    expected = [[-1, -1], [1, 1.5], [2, 2.5], [3, 3.5], [-2, -2], [5, 5.5]]
    for after in (rows, LazyTensor((2, 2), rows.dtype, lambda start, stop: rows[start:stop])):
        expanded = vocabulary.expand(before, after)
        assert expanded.shape == (6, 2)
        for start in range(6):
            for stop in range(start + 1, 7):
                assert expanded.rows(start, stop).tolist() == expected[start:stop]


def test_another_vocabulary_takes_over_a_checkpoints_rows() -> None:
    """An id that is new gets what decay has left of its pretrained row, and moments of zero."""
    name, vocabulary = "encoder.tokens.weight", Vocabulary(torch.tensor([0, 1, 2, 3, 5, 9]), 10, decay=0.5)
    ids, saved = torch.tensor([0, 1, 2, 3, 4, 9]), torch.arange(12.0).view(6, 2)
    weights, moments = {name: saved.clone()}, {f"exp_avg.{name}": saved.clone(), f"exp_avg_sq.{name}": saved + 1}
    vocabulary.take_over(weights, moments, ids, torch.full((6, 2), 8.0))
    assert weights[name].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [4, 4], [10, 11]]
    assert moments[f"exp_avg.{name}"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 0], [10, 11]]
    assert moments[f"exp_avg_sq.{name}"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [0, 0], [11, 12]]


EMBEDDING = "roberta.embeddings.word_embeddings.weight"


def train_both(run_train: Callable[..., Path], tmp_path: Path, *options: object) -> tuple[Path, Path]:
    """Return the run with the compact table, and the run with the whole one."""
    compact = run_train(tmp_path / "compact", *options)
    return compact, run_train(tmp_path / "whole", *options, "--full-vocabulary")


def ids_of(run: Path) -> torch.Tensor:
    return load_file(next((run / "checkpoints").glob("step-*")) / "vocabulary.safetensors")["ids"]


@pytest.mark.parametrize("how", ["--compile", "--no-compile"])
def test_same_result_as_the_whole_table(run_train: Callable[..., Path], tmp_path: Path, how: str) -> None:
    """Without clipping, whose norm is summed in another order, all is equal to the bit but the untouched rows."""
    compact, whole = train_both(run_train, tmp_path, how, "--epochs", 2, "--max-grad-norm", 0, "--weight-decay", 0.1)
    assert losses(compact) == losses(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (compact, whole))
    for name, tensor in theirs.items():
        if name == EMBEDDING:
            kept = ids_of(compact)
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
    is_untouched = torch.ones(len(ours[EMBEDDING]), dtype=torch.bool)
    is_untouched[ids_of(runs[0])] = False
    assert int(is_untouched.sum()) > 100
    before = load_file(tiny_encoder / "model.safetensors")[EMBEDDING]
    assert float((ours[EMBEDDING] - before)[is_untouched].abs().max()) > 1e-4
