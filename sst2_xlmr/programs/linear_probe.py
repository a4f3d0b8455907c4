"""A linear classifier on the frozen encoder's features: a cheap baseline, which shows what fine-tuning adds."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sst2_xlmr.backend import prediction_model
from sst2_xlmr.config import Config
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.data.token_cache import TokenCache
from sst2_xlmr.evaluation.evaluate import batches_of_like_length, logits_of, on_all_cores
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.task import main_metric
from sst2_xlmr.util.device import choose_device

MOST_ROWS = 2000  # to fit it on
PENALTY = 0.1  # weight of half the sum of squared weights, added to the mean loss


def features_of(model: nn.Module, cache: TokenCache, rows: np.ndarray, config: Config) -> torch.Tensor:
    """Return the rows' features, fp32 [rows, hidden], on the CPU; `model` returns features instead of logits."""
    device = choose_device(config.device)
    order = [rows[batch] for batch in batches_of_like_length(cache.lengths()[rows], config.eval_batch_tokens)]
    parts = on_all_cores(lambda batch: logits_of(model, cache.ids, cache.offsets, batch, device).cpu(), order, device)
    features = torch.cat(list(parts))
    return features[torch.from_numpy(np.argsort(np.concatenate(order)))]  # `rows` are ascending


def linear_probe(config: Config) -> float:
    """Fit a linear layer on the features at `<s>` of some training rows; returns its main metric on dev."""
    inputs = prepare(config, quiet=True)
    classifier, _ = build_classifier(inputs.encoder, inputs.task)
    for name in ("dense", "out"):
        setattr(classifier.head, name, nn.Identity())
    model = prediction_model(classifier.requires_grad_(False).eval().to(choose_device(config.device)))
    train, dev = inputs.caches["train"], inputs.caches["dev"]
    usable = np.arange(len(train)) if inputs.train_rows is None else inputs.train_rows
    rows = np.sort(np.random.RandomState(config.seed).permutation(usable)[:MOST_ROWS])
    features = features_of(model, train, rows, config)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features, labels = (features - mean) / deviation, torch.from_numpy(train.labels[rows])
    weights = torch.ones(len(rows)) if train.weights is None else torch.from_numpy(train.weights[rows])
    task = inputs.task.for_training(config, inputs.train_labels, inputs.train_weights, torch.device("cpu"))
    layer = nn.Linear(features.shape[1], task.outputs)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        mean_loss = task.loss(layer(features), labels, weights) / weights.sum()
        total = mean_loss + PENALTY / 2 * layer.weight.square().sum()
        total.backward()
        return float(total)

    optimizer.step(loss)
    with torch.no_grad():
        logits = layer((features_of(model, dev, np.arange(len(dev)), config) - mean) / deviation)
        results = task.row_results(logits, torch.tensor(dev.labels))
    return main_metric(task.metrics(results.numpy(), dev.labels))
