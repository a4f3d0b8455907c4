"""Metrics: exact counts, whatever the batches and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE_DATA

from sst2_xlmr.data.rows import SST2_NAMES, Columns
from sst2_xlmr.data.token_cache import TokenCache, tokenize_file
from sst2_xlmr.evaluation import evaluate as module
from sst2_xlmr.evaluation.evaluate import batches_of_like_length, evaluate, predict
from sst2_xlmr.evaluation.metrics import confusion_matrix, summarize
from sst2_xlmr.model.classifier import Classifier, build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.util.distributed import World

CPU = torch.device("cpu")


@pytest.fixture
def dev(tiny_encoder: Path, tmp_path: Path) -> TokenCache:
    return tokenize_file(
        SAMPLE_DATA / "dev.tsv", tiny_encoder / "sentencepiece.bpe.model", Columns(), SST2_NAMES, 64, tmp_path
    )


@pytest.fixture
def model(tiny_encoder: Path) -> Classifier:
    classifier, _ = build_classifier(find_encoder(str(tiny_encoder)), SST2_NAMES)
    classifier.head.out_proj.weight.data *= 50
    return classifier.train()


def test_agrees_with_one_row_at_a_time(model: Classifier, dev: TokenCache) -> None:
    found = evaluate(model, dev, 200, World.alone(CPU), keep_probabilities=True)
    assert model.training
    model.eval()
    rows = [dev.ids[dev.offsets[i] : dev.offsets[i + 1]] for i in range(len(dev))]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor(row[None].astype("int64"))) for row in rows])
    labels = torch.tensor(dev.labels.astype("int64"))
    assert found.metrics["rows"] == found.confusion.sum() == 152
    assert found.metrics["accuracy"] == float((logits.argmax(-1) == labels).sum()) / 152
    assert found.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, logits.softmax(-1).numpy(), atol=1e-6)
    assert confusion_matrix(dev.labels, found.probabilities.argmax(-1), 2).tolist() == found.confusion.tolist()
    assert evaluate(model, dev, 200, World.alone(CPU)).probabilities is None


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("batch_tokens", [1, 30, 31, 1000, 10**9])
def test_batches_have_every_row_once_and_no_more_tokens_than_allowed(batch_tokens: int, ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 40, 500)
    batches = list(batches_of_like_length(lengths, batch_tokens, ranks))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for rows, behind in zip(batches, [*batches[1:], None]):
        padded = max(len(rows[rank::ranks]) * lengths[rows[rank::ranks]].max(initial=0) for rank in range(ranks))
        assert padded <= batch_tokens or len(rows) == 1
        if behind is not None:
            assert lengths[rows].max() <= lengths[behind].min()
            with_next = -(-(len(rows) + 1) // ranks) * lengths[behind[0]]
            assert with_next > batch_tokens, "one row more would have found room"
    assert not list(batches_of_like_length(np.zeros(0, np.int64), batch_tokens))


@pytest.mark.parametrize("world_size", [2, 3, 200])
def test_ranks_count_every_row_once(
    model: Classifier, dev: TokenCache, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks one after the other, rank 0 last with what the others had; with 200, most have nothing to do."""
    alone = evaluate(model, dev, 900, World.alone(CPU), keep_probabilities=True)
    sums: list[torch.Tensor] = []
    shares: list[object] = []

    def sum_so_far(_: World, tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor)
        return torch.stack(sums).sum(0)

    def gathered(_: World, item: object) -> list[object]:
        shares.append(item)
        return shares

    monkeypatch.setattr(module, "sum_over_ranks", sum_so_far)
    monkeypatch.setattr(module, "gather_objects", gathered)
    monkeypatch.setattr(module, "summarize", lambda *arguments: {"arguments": arguments})
    for rank in reversed(range(world_size)):
        found = evaluate(model, dev, 900, World(rank, world_size, rank, world_size, CPU), keep_probabilities=True)
        assert (found.probabilities is None) == (rank > 0)
    assert found.confusion.tolist() == alone.confusion.tolist()
    metrics = summarize(*found.metrics["arguments"])
    assert metrics.keys() == alone.metrics.keys()
    for key, value in alone.metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-6), key
    assert found.probabilities is not None and alone.probabilities is not None
    np.testing.assert_allclose(found.probabilities, alone.probabilities, atol=1e-6)


def test_predictions_keep_their_order(model: Classifier) -> None:
    model.eval()
    ids = [[0, 7, 2], [0, 9, 8, 7, 6, 2], [0, 9, 2], [0, 2]]
    whole = predict(model, ids, 12, CPU)
    for row, probabilities in zip(ids, whole):
        torch.testing.assert_close(predict(model, [row], 1, CPU)[0], probabilities)
    torch.testing.assert_close(whole.sum(-1), torch.ones(4))
