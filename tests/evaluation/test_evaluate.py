"""Evaluation: every row counted once, whatever the batches and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE_DATA
from running import on_ranks

from sst2_xlmr.data.rows import Columns
from sst2_xlmr.data.token_cache import TokenCache, tokenize_file
from sst2_xlmr.evaluation.evaluate import batches_of_like_length, evaluate
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import SST2_NAMES, SingleLabel
from sst2_xlmr.util.distributed import World, gather_objects
from sst2_xlmr.util.errors import Interrupted

CPU = torch.device("cpu")
TASK = SingleLabel(SST2_NAMES)


@pytest.fixture
def dev(tiny_encoder: Path, tmp_path: Path) -> TokenCache:
    tokenizer_file = tiny_encoder / "sentencepiece.bpe.model"
    return tokenize_file(SAMPLE_DATA / "dev.tsv", tokenizer_file, Columns(), TASK, 64, tmp_path)


@pytest.fixture
def model(tiny_encoder: Path) -> SequenceClassifier:
    classifier, _ = build_classifier(find_encoder(str(tiny_encoder)), TASK)
    classifier.head.out.weight.data *= 50
    return classifier.train()


def test_agrees_with_one_row_at_a_time(model: SequenceClassifier, dev: TokenCache) -> None:
    found = evaluate(model, TASK, dev, 200, World.alone(CPU))
    assert model.training
    model.eval()
    rows = [torch.from_numpy(dev.ids[start:end]).long() for start, end in zip(dev.offsets, dev.offsets[1:])]
    with torch.no_grad():
        logits = torch.cat([model(row, torch.tensor([len(row)])) for row in rows])
    labels = torch.from_numpy(dev.labels).long()
    assert found.metrics["rows"] == len(found.results) == 152
    assert found.metrics["accuracy"] == float((logits.argmax(-1) == labels).sum()) / 152
    assert found.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    np.testing.assert_allclose(found.results, TASK.row_results(logits, labels), atol=1e-6)
    np.testing.assert_allclose(found.probabilities, logits.softmax(-1), atol=1e-6)


def test_it_ends_when_all_ranks_are_to_stop(model: SequenceClassifier, dev: TokenCache) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        evaluate(model, TASK, dev, 200, World.alone(CPU), should_stop=lambda: next(asked))
    assert model.training
    assert next(asked, None) is None


@pytest.mark.parametrize("ranks", [1, 7])
@pytest.mark.parametrize("batch_tokens", [1, 31, 1000, 10**9])
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


@pytest.mark.parametrize("batch_tokens", [900, 30])
def test_ranks_count_every_row_once(model: SequenceClassifier, dev: TokenCache, batch_tokens: int) -> None:
    """With 30 tokens at a time, most batches have no row for some of the ranks. All get the same result."""

    def check(world: World) -> None:
        found = evaluate(model, TASK, dev, batch_tokens, world)
        assert gather_objects(world, found.metrics) == [found.metrics] * 3
        assert {key: pytest.approx(value, rel=1e-6) for key, value in alone.metrics.items()} == found.metrics
        np.testing.assert_allclose(found.results, alone.results, atol=1e-6)
        np.testing.assert_allclose(found.probabilities, alone.probabilities, atol=1e-6)

    alone = evaluate(model, TASK, dev, batch_tokens, World.alone(CPU))
    on_ranks(3, check)
