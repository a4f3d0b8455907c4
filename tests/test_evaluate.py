"""Metrics: exact counts, whatever the batches and ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SAMPLE_DATA

from sst2_xlmr import evaluate as module
from sst2_xlmr.config import Config
from sst2_xlmr.data import SST2_NAMES, Columns
from sst2_xlmr.distributed import World
from sst2_xlmr.encoders import find_encoder
from sst2_xlmr.evaluate import evaluate, macro_f1, predict
from sst2_xlmr.model import Classifier, build_classifier
from sst2_xlmr.token_cache import TokenCache, tokenize_file

CPU = torch.device("cpu")


@pytest.fixture
def dev(tiny_encoder: Path, tmp_path: Path) -> TokenCache:
    return tokenize_file(
        SAMPLE_DATA / "dev.tsv", tiny_encoder / "sentencepiece.bpe.model", Columns(), SST2_NAMES, 64, tmp_path
    )


@pytest.fixture
def model(tiny_encoder: Path) -> Classifier:
    classifier, _ = build_classifier(find_encoder(str(tiny_encoder)), Config(label_names=SST2_NAMES), None)
    classifier.head.out_proj.weight.data *= 50
    return classifier.train()


def test_macro_f1_by_hand() -> None:
    assert macro_f1(torch.tensor([[3, 1], [2, 4]])) == pytest.approx((2 * 3 / 9 + 2 * 4 / 11) / 2)
    assert macro_f1(torch.tensor([[5, 0], [5, 0]])) == pytest.approx((2 / 3 + 0) / 2)


def test_agrees_with_one_row_at_a_time(model: Classifier, dev: TokenCache) -> None:
    found = evaluate(model, dev, 7, World(0, 1, 0, 1, CPU))
    assert model.training
    model.eval()
    rows = [dev.ids[dev.offsets[i] : dev.offsets[i + 1]] for i in range(len(dev))]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor(row[None].astype("int64"))) for row in rows])
    labels = torch.tensor(dev.labels.astype("int64"))
    assert found["rows"] == 152
    assert found["accuracy"] == float((logits.argmax(-1) == labels).sum()) / 152
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 200])
def test_ranks_count_every_row_once(
    model: Classifier, dev: TokenCache, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank's own sums, added up by hand; with 200 ranks, most have nothing to do."""
    alone = evaluate(model, dev, 64, World(0, 1, 0, 1, CPU))
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(module, "sum_over_ranks", lambda _, tensor: sums.append(tensor.clone()))
    for rank in range(world_size):
        try:
            evaluate(model, dev, 64, World(rank, world_size, rank, world_size, CPU))
        except ZeroDivisionError:
            assert rank >= 152  # a rank without rows, whose sums nobody else's complete here
    confusion = torch.stack(sums[1::2]).sum(0).view(2, 2)
    assert int(confusion.sum()) == 152
    assert int(confusion.diagonal().sum()) / 152 == alone["accuracy"]
    assert float(torch.stack(sums[::2]).sum()) / 152 == pytest.approx(alone["loss"], rel=1e-6)


def test_predictions_keep_their_order(model: Classifier) -> None:
    model.eval()
    ids = [[0, 7, 2], [0, 9, 8, 7, 6, 2], [0, 9, 2], [0, 2]]
    whole = predict(model, ids, 3, CPU)
    for row, probabilities in zip(ids, whole):
        torch.testing.assert_close(predict(model, [row], 1, CPU)[0], probabilities)
    torch.testing.assert_close(whole.sum(-1), torch.ones(4))
