"""The compact table: which rows, which numbers, and the same result as training the whole table."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunTrain, losses, metrics
from safetensors.torch import load_file

from sst2_xlmr.model.vocabulary import Vocabulary, used_vocabulary, whole_vocabulary
from sst2_xlmr.util.tensors import LazyTensor


def test_ids_that_occur_and_the_special_ones() -> None:
    vocabulary = used_vocabulary([np.array([0, 9, 7, 2], np.int32), np.array([7, 30], np.int32)], 40)
    assert vocabulary.ids.tolist() == [0, 1, 2, 3, 7, 9, 30]
    id_map = vocabulary.id_map()
    assert id_map is not None and not vocabulary.is_whole
    assert id_map[[*vocabulary.ids.tolist(), 8]].tolist() == [0, 1, 2, 3, 4, 5, 6, 3]
    assert whole_vocabulary(40).is_whole and whole_vocabulary(40).id_map() is None


def test_expand_decays_what_was_not_trained() -> None:
    table, rows = torch.arange(12.0).view(6, 2), torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    before = LazyTensor((6, 2), table.dtype, lambda start, stop: table[start:stop])
    vocabulary = Vocabulary(torch.tensor([0, 4]), 6, decay=0.5)
    expected = [[-1, -1], [1, 1.5], [2, 2.5], [3, 3.5], [-2, -2], [5, 5.5]]
    for after in (rows, LazyTensor((2, 2), rows.dtype, lambda start, stop: rows[start:stop])):
        expanded = vocabulary.expand(before, after)
        for start, stop in itertools.combinations(range(7), 2):
            assert expanded.rows(start, stop).tolist() == expected[start:stop]


EMBEDDING = "roberta.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("max_norm", [0, 0.05])
@pytest.mark.parametrize("how", ["--compile", "--no-compile"])
def test_equals_whole_table(run_train: RunTrain, tiny_encoder: Path, tmp_path: Path, how: str, max_norm: float) -> None:
    """To the bit, but for rows that only decay; with clipping, whose norm is summed in another order, within 1e-6."""
    options = [how, "--max-steps", 20, "--max-grad-norm", max_norm, "--weight-decay", 0.1]
    compact, whole = run_train(tmp_path / "a", *options), run_train(tmp_path / "b", *options, "--full-vocabulary")
    assert losses(compact) == (pytest.approx(losses(whole), rel=1e-6) if max_norm else losses(whole))
    assert min(line["grad_norm"] for line in metrics(compact) if "split" not in line) > max_norm, "all are clipped"
    kept = load_file(next((compact / "checkpoints").glob("step-*")) / "vocabulary.safetensors")["ids"]
    folders = (compact / "model", whole / "model", tiny_encoder)
    ours, theirs, before = (load_file(folder / "model.safetensors") for folder in folders)
    is_untouched = torch.ones(len(before[EMBEDDING]), dtype=torch.bool)
    is_untouched[kept] = False
    assert int(is_untouched.sum()) > 100 and len(kept) > 4
    assert float((ours[EMBEDDING] - before[EMBEDDING])[is_untouched].abs().max()) > 1e-4, "decay would be missed"
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6 if max_norm else 1e-7, rtol=0 if max_norm else 1e-5)
        rows = kept if name == EMBEDDING else ...
        assert max_norm or torch.equal(ours[name][rows], tensor[rows]), name
