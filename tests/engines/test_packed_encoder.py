"""The packed forward and backward pass against the plain one, against torchtext's, and against explicit masks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_ENCODER, needs_small_encoder
from reference import torchtext_model
from torch import nn

from sst2_xlmr.data.rows import SST2_NAMES
from sst2_xlmr.engines.cpu.kernels import Packed, load_kernels
from sst2_xlmr.engines.cpu.packed_encoder import PackedClassifier, pack
from sst2_xlmr.model.classifier import Classifier, Dropouts, build_classifier
from sst2_xlmr.model.encoders import EncoderShape, find_encoder

# Head sizes 8, 20 and 64; with one layer, the last is also the first.
SHAPES = [(32, 4, 3), (40, 2, 2), (128, 2, 1)]
LENGTHS = [2, 40, 16, 3, 17, 31, 5]


def build(shape: tuple[int, int, int], dropout: float = 0.0, head_dropout: float = 0.0, seed: int = 0) -> Classifier:
    """In training mode; weights large enough for every part to matter. shape: hidden, heads, layers."""
    hidden, heads, layers = shape
    torch.manual_seed(seed)
    model = Classifier(
        EncoderShape(200, hidden, layers, heads, 2 * hidden + 3, 48), 2, Dropouts(dropout, dropout, head_dropout)
    )
    for name, parameter in model.named_parameters():
        is_gamma = "norm" in name and name.endswith("weight")
        parameter.data.normal_(float(is_gamma), 1.5 / hidden**0.5 if parameter.dim() > 1 else 0.3)
    return model.train()


def packed(model: Classifier) -> PackedClassifier:
    """The engine over the same parameters."""
    kernels = load_kernels(next(model.parameters()).dtype)
    if kernels is None:
        pytest.skip("there is no C compiler")
    return PackedClassifier(model, kernels).train(model.training)


def batch(lengths: list[int], vocab_size: int = 200) -> torch.Tensor:
    """int64 [texts, longest]: `<s>`, random ids, `</s>`, padding."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(4, vocab_size, (len(lengths), max(lengths)), generator=generator)
    tokens[:, 0] = 0
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = 2
        tokens[row, length:] = 1
    return tokens


def keys(count: int) -> torch.Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(7))


def loss(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % 2, reduction="sum")


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


def run(model: Classifier, tokens: torch.Tensor, uses_engine: bool) -> dict[str, torch.Tensor]:
    """Return all gradients, and the logits, without dropout."""
    model.train()
    logits = (packed(model) if uses_engine else model)(tokens)
    loss(logits if logits.dtype == torch.float64 else logits.float()).backward()
    return {**gradients(model), "logits": logits.detach()}


def average_error(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all tensors, relative to their norms."""
    return sum(float((ours[name].double() - x).norm() / x.norm()) for name, x in exact.items()) / len(exact)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [LENGTHS, [16] * 3, [40], [2] * 8], ids=str)
def test_equals_the_plain_path(threads: None, shape: tuple[int, int, int], lengths: list[int]) -> None:
    """Logits and all gradients without dropout."""
    model, tokens = build(shape), batch(lengths)
    assert_same(run(model, tokens, True), run(model, tokens, False), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torchtext(shape: tuple[int, int, int]) -> None:
    """Which computes all positions of the last layer, and a mask."""
    model, tokens = build(shape), batch(LENGTHS)
    reference = torchtext_model(model).train()
    logits = reference(tokens)
    loss(logits).backward()
    assert_same(run(model, tokens, True), {**gradients(reference), "logits": logits.detach()}, 1e-5)


@needs_small_encoder
def test_is_as_exact_as_torch_on_real_weights() -> None:
    """Against float64, over 12 layers: everything within 1e-5, and on average no further off than the plain path."""
    model, _ = build_classifier(find_encoder(str(SMALL_ENCODER)), SST2_NAMES, kept_ids=np.arange(5000))
    torch.manual_seed(0)
    for parameter in model.head.parameters():
        parameter.data.normal_(0, 0.3)
    tokens = batch(LENGTHS, 5000)
    ours, plain = run(model, tokens, True), run(model, tokens, False)
    exact = run(model.double(), tokens, False)
    assert_same(ours, exact, 1e-5)
    assert average_error(ours, exact) < 1.1 * average_error(plain, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_as_exact_as_torchs(threads: None, shape: tuple[int, int, int]) -> None:
    """Against the same weights in float64, logits and gradients are no further off than the plain path in bf16.

    The first rounding that tips over decides much of one draw's error, so it is the mean over several.
    """
    errors = []
    for seed in range(6):
        model, tokens = build(shape, seed=seed).bfloat16(), batch(LENGTHS)
        ours, plain = run(model, tokens, True), run(model, tokens, False)
        exact = run(model.double(), tokens, False)
        assert_same(ours, exact, 0.2)
        errors.append((average_error(ours, exact), average_error(plain, exact)))
    ours_mean, plain_mean = np.mean(errors, axis=0)
    assert ours_mean < 1.1 * plain_mean


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_its_batch(shape: tuple[int, int, int]) -> None:
    """Nor on its place in it, nor on how much padding comes behind; with dropout."""
    model, tokens, keyed = packed(build(shape, 0.3, 0.3)), batch(LENGTHS), keys(len(LENGTHS))
    with torch.no_grad():
        together = model(tokens, dropout_keys=keyed)
        for row, length in enumerate(LENGTHS):
            alone = model(tokens[row : row + 1, :length], False, dropout_keys=keyed[row : row + 1])
            torch.testing.assert_close(alone[0], together[row], atol=2e-6, rtol=2e-6)
        turned = model(tokens.flip(0), dropout_keys=keyed.flip(0)).flip(0)
        torch.testing.assert_close(turned, together, atol=2e-6, rtol=2e-6)
        wide = model(F.pad(tokens, (0, 5), value=1), dropout_keys=keyed)
        assert torch.equal(wide, together)


def test_packing() -> None:
    """Ids and positions one after another; the number of rows is a multiple of 8; a token's key is its own."""
    tokens, keyed = batch([3, 7, 2]), keys(3)
    rows, ids, positions = pack(tokens, keyed, 0.1)
    assert rows.starts.tolist() == [0, 3, 10, 12]
    assert (rows.tokens, rows.longest, rows.drop_p) == (12, 7, 0.1)
    assert ids.tolist() == [*tokens[0, :3].tolist(), *tokens[1].tolist(), *tokens[2, :2].tolist(), 1, 1, 1, 1]
    assert positions.tolist() == [0, 1, 2, *range(7), 0, 1, 0, 0, 0, 0]
    assert len(rows.keys) == 16
    assert len(rows.keys[:12].unique()) == 12
    alone, _, _ = pack(tokens[1:2], keyed[1:2], 0.1)
    assert torch.equal(alone.keys[:7], rows.keys[3:10])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_parts_add_up_with_dropout(threads: None, shape: tuple[int, int, int]) -> None:
    """Masks belong to rows: the gradient of a batch is the sum over its parts, however it is cut."""
    model, tokens, keyed = build(shape, 0.2, 0.2), batch(LENGTHS), keys(len(LENGTHS))
    engine = packed(model)
    labels = torch.arange(len(LENGTHS)) % 2

    def add(rows: torch.Tensor) -> None:
        part = tokens[rows][:, : int(tokens[rows].ne(1).sum(1).max())]
        logits = engine(part, dropout_keys=keyed[rows])
        F.cross_entropy(logits, labels[rows], reduction="sum").backward()

    everything = torch.arange(len(LENGTHS))
    add(everything)
    whole = gradients(model)
    for cut in (everything.split(1), everything.split(3), (everything[::2], everything[1::2])):
        for part in cut:
            add(part)
        assert_same(gradients(model), whole, 2e-6)
    keyed = keyed + 1
    add(everything)
    other = gradients(model)
    assert float((other["head.dense.weight"] - whole["head.dense.weight"]).norm()) > 0.1 * float(
        whole["head.dense.weight"].norm()
    ), "another key, but the same masks"


def forward_with_masks(
    model: Classifier, tokens: torch.Tensor, keyed: torch.Tensor, p: float, head_p: float
) -> torch.Tensor:
    """The network text by text in torch, on all positions of all layers, times masks read off the kernels."""
    transformer, head = model.encoder.transformer, model.head
    layers, kernels = transformer.layers.layers, load_kernels(torch.float32)
    assert kernels is not None
    logits = []
    for text, key in zip(tokens, keyed):
        text = text[text != 1][None]
        rows, _, _ = pack(text, key[None], p)
        n, width = text.shape[1], model.shape.hidden

        def drop(values: torch.Tensor, site: int, p: float = p, rows: Packed = rows) -> torch.Tensor:
            mask = torch.ones(len(rows.keys), values.shape[1])
            kernels.dropout_(mask, Packed(rows.starts, rows.keys, rows.longest, p), site)
            return values * mask[: len(values)]

        x = transformer.token_embedding(text)[0] + transformer.positional_embedding.embedding.weight[2 : n + 2]
        x = drop(transformer.embedding_layer_norm(x), 0)
        for number, layer in enumerate(layers):
            attention = layer.self_attn
            heads, size = attention.heads, model.shape.hidden // attention.heads
            # Queries of zero weigh all keys alike; value j of every head is 1 at key j.
            zeros, ones = torch.zeros(len(rows.keys), heads * 64), torch.zeros(len(rows.keys), heads, 64)
            ones[torch.arange(n), :, torch.arange(n)] = n
            masks = kernels.attention(zeros, zeros, ones.flatten(1), heads, rows, 3 * number + 1)
            masks = masks.view(-1, heads, 64)[:n, :, :n].transpose(0, 1)
            projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = projected.view(n, 3, heads, size).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(1, 2) / size**0.5).softmax(2) * masks
            mixed = (weights @ v).transpose(0, 1).reshape(n, width)
            x = layer.norm1(x + drop(attention.out_proj(mixed), 3 * number + 2))
            x = layer.norm2(x + drop(layer.linear2(F.gelu(layer.linear1(x))), 3 * number + 3))
        first = drop(x[:1], 3 * len(layers) + 1, head_p)
        logits.append(head.out_proj(drop(torch.tanh(head.dense(first)), 3 * len(layers) + 2, head_p)))
    return torch.cat(logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_equals_explicit_masks(shape: tuple[int, int, int]) -> None:
    """Forward and backward, at every place where dropout stands."""
    model, tokens, keyed = build(shape, 0.2, 0.4, seed=1), batch(LENGTHS), keys(len(LENGTHS))
    found = []
    for forward in (
        lambda: packed(model)(tokens, dropout_keys=keyed),
        lambda: forward_with_masks(model, tokens, keyed, 0.2, 0.4),
    ):
        logits = forward()
        loss(logits).backward()
        found.append({**gradients(model), "logits": logits.detach()})
    assert_same(found[0], found[1], 1e-5)


def test_frozen_encoder_trains_the_head_only() -> None:
    model, tokens, keyed = build(SHAPES[0], 0.0, 0.2), batch(LENGTHS), keys(len(LENGTHS))
    engine = packed(model)
    loss(engine(tokens, dropout_keys=keyed)).backward()
    whole = gradients(model)
    model.encoder.requires_grad_(False)
    logits = engine(tokens, dropout_keys=keyed)
    loss(logits).backward()
    head = gradients(model)
    assert head.keys() == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert all(torch.equal(grad, whole[name]) for name, grad in head.items())
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            seen.add(node.name())
            nodes += [other for other, _ in node.next_functions]
    assert not any("Layer" in name or "Embedding" in name for name in seen), "the encoder's pass was recorded"


def test_evaluation_has_no_dropout_and_leaves_no_graph() -> None:
    model, tokens = build(SHAPES[0], 0.5, 0.5), batch(LENGTHS)
    engine = packed(model).eval()
    with torch.no_grad():
        first = engine(tokens)
        assert torch.equal(engine(tokens, dropout_keys=keys(len(LENGTHS))), first)
    assert first.grad_fn is None
    assert torch.equal(first, packed(build(SHAPES[0]))(tokens).detach())
    assert not gradients(model)


def test_equal_calls_give_equal_bits(threads: None) -> None:
    model, tokens, keyed = build(SHAPES[1], 0.2, 0.2), batch(LENGTHS), keys(len(LENGTHS))
    runs = []
    for _ in range(3):
        loss(packed(model)(tokens, dropout_keys=keyed)).backward()
        runs.append(gradients(model))
    for run in runs[1:]:
        assert all(torch.equal(grad, runs[0][name]) for name, grad in run.items())


def test_what_is_not_a_number_reaches_the_loss_and_the_gradients() -> None:
    """From a weight of the first layer, and from an embedding that one text uses."""
    model, tokens = build(SHAPES[0]), batch(LENGTHS)
    clean = copy.deepcopy(model.state_dict())
    transformer = model.encoder.transformer
    for parameter, where in (
        (transformer.layers.layers[0].linear1.weight, (3, 4)),
        (transformer.token_embedding.weight, (int(tokens[1, 9]), 0)),
    ):
        model.load_state_dict(clean)
        parameter.data[where] = float("nan")
        logits = packed(model)(tokens)
        assert logits[1].isnan().all()
        loss(logits).backward()
        found = gradients(model)
        assert found["encoder.transformer.layers.layers.0.self_attn.in_proj_weight"].isnan().any()
        assert found["head.dense.weight"].isnan().any()


def test_it_can_be_copied_and_saved() -> None:
    model, tokens = packed(build(SHAPES[0])), batch(LENGTHS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), model(tokens))
