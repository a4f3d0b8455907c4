"""The packed forward and backward pass against the plain one, and against explicit masks."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_ENCODER, SST2_NAMES, kernels_for, needs_small_encoder
from test_kernels import LENGTHS, attention_masks, masks
from torch import nn

from sst2_xlmr.engines.cpu.kernels import Packed
from sst2_xlmr.engines.cpu.packed_encoder import PackedClassifier, pack
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import EncoderShape, find_encoder
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.vocabulary import Vocabulary
from sst2_xlmr.task import SingleLabel

# Head sizes 8, 20 and 64; with one layer, the last is also the first.
Shape = tuple[int, int, int]
SHAPES = [(32, 4, 3), (40, 2, 2), (128, 2, 1)]


def build(shape: Shape, dropout: float = 0.0, head_dropout: float = 0.0, seed: int = 0) -> SequenceClassifier:
    """In training mode; weights large enough for every part to matter. shape: hidden, heads, layers."""
    hidden, heads, layers = shape
    torch.manual_seed(seed)
    # With an odd width, oneDNN's products for AMX (torch 2.13) multiply the next row's first values by 0: maybe NaN.
    model = SequenceClassifier(EncoderShape(200, hidden, layers, heads, 2 * hidden + 2, 48), 2, dropout, head_dropout)
    for name, parameter in model.named_parameters():
        is_gamma = "norm" in name and name.endswith("weight")
        parameter.data.normal_(float(is_gamma), 1.5 / hidden**0.5 if parameter.dim() > 1 else 0.3)
    return model.train()


def packed(model: SequenceClassifier) -> PackedClassifier:
    return PackedClassifier(model, kernels_for(next(model.parameters()).dtype)).train(model.training)


Batch = tuple[torch.Tensor, torch.Tensor]


def batch(lengths: list[int], vocab_size: int = 200) -> Batch:
    """Packed texts of these lengths: `<s>`, random ids, `</s>`."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(4, vocab_size, (len(lengths), max(lengths)), generator=generator)
    texts = [row[:length] for row, length in zip(ids, lengths)]
    for text in texts:
        text[0], text[-1] = 0, 2
    return torch.cat(texts), torch.tensor(lengths)


def keys(count: int) -> torch.Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(7))


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Of rows of one class: those of two would cancel in the gradient of the head's bias, and leave roundings."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients, and forget them."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {name: grad for name, grad in found.items() if grad is not None}


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` times its largest value."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        difference = float((ours[name].double() - expected.double()).abs().max())
        assert difference <= tolerance * float(expected.abs().max()), name


def outcome(model: nn.Module, forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the logits that `forward` gives, and all gradients of the model."""
    logits = forward(*inputs)
    loss(logits if logits.dtype == torch.float64 else logits.float()).backward()
    return {**gradients(model), "logits": logits.detach()}


def average_error(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    return sum(float((ours[name].double() - x).norm() / x.norm()) for name, x in exact.items()) / len(exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [LENGTHS, [40], [2] * 8], ids=str)
def test_equals_the_plain_path(threads: int, shape: Shape, lengths: list[int]) -> None:
    model, texts = build(shape), batch(lengths)
    assert_same(outcome(model, packed(model), *texts), outcome(model, model, *texts), 1e-5)


@needs_small_encoder
def test_is_as_exact_as_torch_on_real_weights() -> None:
    """Against float64, over 12 layers: everything within 1e-5, and on average no further off than the plain path."""
    vocabulary, task = Vocabulary(torch.arange(5000), 250_002), SingleLabel(SST2_NAMES)
    model, _ = build_classifier(find_encoder(str(SMALL_ENCODER)), task, vocabulary=vocabulary)
    torch.manual_seed(0)
    for parameter in model.head.parameters():
        parameter.data.normal_(0, 0.3)
    model.train()
    texts = batch(LENGTHS, 5000)
    ours, plain = outcome(model, packed(model), *texts), outcome(model, model, *texts)
    exact = outcome(model.double(), model, *texts)
    assert_same(ours, exact, 1e-5)
    assert average_error(ours, exact) < 1.1 * average_error(plain, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_as_exact_as_torchs(shape: Shape) -> None:
    """Against float64 no further off than the plain path; on average, as one rounding decides much of one draw."""
    errors = []
    for seed in range(6):
        model, texts = build(shape, seed=seed).bfloat16(), batch(LENGTHS)
        ours, plain = outcome(model, packed(model), *texts), outcome(model, model, *texts)
        exact = outcome(model.double(), model, *texts)
        assert_same(ours, exact, 0.2)
        errors.append((average_error(ours, exact), average_error(plain, exact)))
    ours_mean, plain_mean = np.mean(errors, axis=0)
    assert ours_mean < 1.1 * plain_mean


def with_masks(model: SequenceClassifier, texts: Batch, keyed: torch.Tensor, p: float, head_p: float) -> torch.Tensor:
    """The network text by text in torch, on all positions of all layers, times masks read off the kernels."""
    encoder, head, heads, width = model.encoder, model.head, model.shape.heads, model.shape.hidden
    layers, size = encoder.layers, width // heads
    logits = []
    for text, length, key in zip(texts[0].split(texts[1].tolist()), texts[1], keyed):
        rows, _, _ = pack(text, length[None], key[None], p)
        n = len(text)

        def drop(values: torch.Tensor, site: int, p: float = p, rows: Packed = rows) -> torch.Tensor:
            return values * masks(dataclasses.replace(rows, drop_p=p), site, values.shape[1])[: len(values)].float()

        x = drop(encoder.norm(encoder.tokens(text) + encoder.positions.weight[2 : n + 2]), 0)
        for number, layer in enumerate(layers):
            q, k, v = layer.qkv(x).view(n, 3, heads, size).permute(1, 2, 0, 3)
            mask = attention_masks(rows, 3 * number + 1, heads)[0].float()
            weights = (q @ k.transpose(1, 2) / size**0.5).softmax(2) * mask
            mixed = (weights @ v).transpose(0, 1).reshape(n, width)
            x = layer.norm1(x + drop(layer.out(mixed), 3 * number + 2))
            x = layer.norm2(x + drop(layer.down(F.gelu(layer.up(x))), 3 * number + 3))
        first = drop(x[:1], 3 * len(layers) + 1, head_p)
        logits.append(head.out(drop(torch.tanh(head.dense(first)), 3 * len(layers) + 2, head_p)))
    return torch.cat(logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_equals_explicit_masks(threads: int, shape: Shape) -> None:
    """Forward and backward, at every place, and text by text: masks belong to rows, however a batch is cut."""
    model, texts, keyed = build(shape, 0.2, 0.4, seed=1), batch(LENGTHS), keys(len(LENGTHS))
    reference = outcome(model, lambda: with_masks(model, texts, keyed, 0.2, 0.4))
    ours, again, other = (outcome(model, packed(model), *texts, each) for each in (keyed, keyed, keyed + 1))
    assert_same(ours, reference, 2e-5)
    assert all(torch.equal(again[name], each) for name, each in ours.items()), "equal calls, other bits"
    whole = ours["head.dense.weight"]
    assert float((other["head.dense.weight"] - whole).norm()) > 0.1 * float(whole.norm()), "other keys, the same masks"


def test_frozen_encoder_trains_the_head_only() -> None:
    """With no backward pass through the encoder."""
    model = build(SHAPES[0], 0.0, 0.2)
    model.encoder.requires_grad_(False)
    logits = packed(model)(*batch(LENGTHS), keys(len(LENGTHS)))
    loss(logits).backward()
    assert gradients(model).keys() == {name for name, _ in model.named_parameters() if name.startswith("head.")}

    def recorded(node: Any) -> set[str]:
        return {node.name()}.union(*(recorded(other) for other, _ in node.next_functions if other))

    assert not any("Layer" in name or "Embedding" in name for name in recorded(logits.grad_fn))


def test_evaluation_has_no_dropout_and_leaves_no_graph_also_in_copies() -> None:
    model, texts = build(SHAPES[0], 0.5, 0.5), batch(LENGTHS)
    engine = packed(model).eval()
    expected = packed(build(SHAPES[0]))(*texts).detach()
    for each in (engine, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        with torch.no_grad():
            logits = each(*texts, keys(len(LENGTHS)))
        assert torch.equal(logits, expected)
        assert logits.grad_fn is None
    assert not gradients(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_loss_and_the_gradients(dtype: torch.dtype, bad: float) -> None:
    """From a weight of the first layer, from an embedding that one text uses, and from the loss; nothing hides it."""
    texts = batch(LENGTHS)
    for name, where in (("layers.0.up", (3, 4)), ("tokens", (int(texts[0][LENGTHS[0] + 9]), 0))):
        model = build(SHAPES[0]).to(dtype)
        model.get_parameter(f"encoder.{name}.weight").data[where] = bad
        found = outcome(model, packed(model), *texts)
        broken = ~found["logits"].isfinite().any(1)
        assert broken.tolist() == [name != "tokens" or text == 1 for text in range(len(LENGTHS))]
        assert not found["encoder.layers.0.qkv.weight"].isfinite().any()
        assert not found["head.dense.weight"].isfinite().all()
    model = build(SHAPES[0]).to(dtype)
    (packed(model)(*texts, keys(len(LENGTHS))) * bad).sum().backward()
    assert not any(gradient.isfinite().all() for gradient in gradients(model).values())
