"""Both optimizers, the plain one and the engine's, against torch's and each other; groups, masters, shared memory."""

import math
import os
import time
from functools import partial
from typing import Any

import pytest
import torch
from conftest import ALONE, Patch, assert_equal, kernels_for
from running import on_ranks
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.engines.cpu import shared_memory
from sst2_xlmr.engines.cpu.adamw import CpuAdamW
from sst2_xlmr.engines.cpu.kernels import Kernels
from sst2_xlmr.engines.cpu.shared_memory import shared_bytes
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.model.vocabulary import EMBEDDING, Vocabulary
from sst2_xlmr.training.optimizer import BETAS, EPSILON, AdamW, group_of
from sst2_xlmr.util.distributed import World, broadcast, gather_objects

CONFIG = Config(weight_decay=0.1, layerwise_lr_decay=0.8)
KINDS = ["plain", "fp32", "bf16"]


def model() -> SequenceClassifier:
    """Two layers, with weights about as large as a pretrained model's; tensors of 2 to 1,300 values."""
    torch.manual_seed(0)
    classifier = SequenceClassifier(EncoderShape(50, hidden=20, layers=2, heads=2, ffn=65, positions=20), 2)
    for parameter in classifier.parameters():
        parameter.data *= 0.1
    return classifier


def build(kind: str, classifier: SequenceClassifier, world: World = ALONE) -> Any:
    if kind == "plain":
        return AdamW(classifier, 2, CONFIG, world)
    return CpuAdamW(classifier, 2, CONFIG, world, kernels_for(torch.float32 if kind == "fp32" else torch.bfloat16))


def set_gradients(classifier: nn.Module, step: int) -> None:
    """The same values in every dtype: they fit into bf16."""
    generator = torch.Generator().manual_seed(step)
    for parameter in classifier.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)


def train(optimizer: AdamW, classifier: nn.Module, steps: range, max_norm: float = 0.5) -> list[torch.Tensor]:
    """Return the gradients' norms."""
    norms = []
    for step in steps:
        set_gradients(classifier, step)
        norms.append(optimizer.clip_grad_norm(max_norm))
        optimizer.step(1e-3 * (step + 1))
        optimizer.zero_grad()
    return norms


def saved(optimizer: AdamW) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return weights and moments as a checkpoint has them."""
    weights = {
        name: (each if isinstance(each, torch.Tensor) else each.rows(0, each.shape[0])).clone()
        for name, each in optimizer.weights().items()
    }
    return weights, {name: moment.clone() for name, moment in optimizer.moments().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_equals_torchs_adamw(kind: str, threads: int, max_norm: float) -> None:
    """With a group for every parameter; the plain one to the bit, the engine's fp32 masters within rounding."""
    ours, theirs = model(), model()
    optimizer = build(kind, ours)
    groups = [
        {"params": [each], "weight_decay": 0.1 if each.dim() > 1 else 0.0, "scale": group_of(name, each, 2, CONFIG)[0]}
        for name, each in theirs.named_parameters()
    ]
    is_fused = kind == "plain" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)  # torch has it for CPUs
    reference = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=is_fused or None)
    expected = []
    norms = train(optimizer, ours, range(20), max_norm)
    for step in range(20):
        set_gradients(theirs, step)
        expected.append(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf))
        for group in reference.param_groups:
            group["lr"] = 1e-3 * (step + 1) * group["scale"]
        reference.step()
    torch.testing.assert_close(norms, expected)
    masters, _ = saved(optimizer)
    torch.testing.assert_close(masters, dict(theirs.named_parameters()), atol=0.0 if kind == "plain" else 2e-6, rtol=0)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
        torch.testing.assert_close(parameter.float(), masters[name], atol=0, rtol=2.0**-8 * (kind == "bf16"))


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_what_one_has_saved_the_other_continues(first: str, second: str) -> None:
    """As if it had not been interrupted: within rounding, or to the bit if it is of the same kind."""
    begun, whole, resumed = model(), model(), model()
    optimizer, uninterrupted, continued = build(first, begun), build(second, whole), build(second, resumed)
    train(optimizer, begun, range(10))
    train(uninterrupted, whole, range(20))
    weights, moments = saved(optimizer)
    assert all(tensor.dtype == torch.float32 for each in (weights, moments) for tensor in each.values())
    continued.load(weights, moments, 10)
    assert_equal(saved(continued), (weights, moments))
    train(continued, resumed, range(10, 20))
    torch.testing.assert_close(saved(continued), saved(uninterrupted), atol=0.0 if first == second else 5e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_is_saved_but_has_no_moments_and_does_not_change(kind: str) -> None:
    classifier = model()
    classifier.encoder.requires_grad_(False)
    optimizer = build(kind, classifier)
    before, moments = saved(optimizer)
    assert {name.split(".")[1] for name in moments} == {"head"}
    train(optimizer, classifier.head, range(3))
    after, _ = saved(optimizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("head.")}
    optimizer.load(before, moments, 0)
    assert_equal(saved(optimizer)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_in_fp32(kind: str) -> None:
    """1 + 512 * 2^-9 is 2 in fp32; in bf16 every single addition would be lost. The next step begins anew."""
    classifier = model()
    optimizer = build(kind, classifier)
    no_sync = getattr(optimizer, "no_sync", torch.enable_grad)
    count = sum(parameter.numel() for parameter in classifier.parameters())

    def backward(value: float) -> None:
        sum((parameter.float() * value).sum() for parameter in classifier.parameters()).backward()  # type: ignore[union-attr]

    for micro_batches in ([1.0, *[2.0**-9] * 512], [0.5, 0.5], [1.0]):
        for value in micro_batches[:-1]:
            with no_sync():
                backward(value)
        backward(micro_batches[-1])
        torch.testing.assert_close(optimizer.clip_grad_norm(0.0), torch.tensor(sum(micro_batches) * math.sqrt(count)))
        optimizer.step(1e-4)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lr", [2e-5, 0.1])
def test_rows_without_gradient_decay_as_the_vocabulary_says(kind: str, lr: float) -> None:
    """Also at real settings, where a factor rounded to fp32 would decay 8 % too much."""
    classifier = model()
    optimizer, vocabulary = build(kind, classifier), Vocabulary(torch.arange(50), 50)
    scale, decay = group_of(EMBEDDING, classifier.encoder.tokens.weight, 2, CONFIG)
    vocabulary.scaled_weight_decay = scale * decay
    before, _ = saved(optimizer)
    steps = 200 if lr < 0.01 else 5
    for step in range(steps):
        set_gradients(classifier, step)
        classifier.encoder.tokens.weight.grad[10] = 0  # type: ignore[index]
        optimizer.clip_grad_norm(0.0)
        optimizer.step(lr)
        optimizer.zero_grad()
        vocabulary.decay_unused_rows(lr)
    assert vocabulary.unused_rows_factor == pytest.approx((1 - lr * 0.1 * 0.8**3) ** steps, rel=1e-9)
    row = saved(optimizer)[0][EMBEDDING][10].double() / before[EMBEDDING][10].double()
    assert 1 - float(row.mean()) == pytest.approx(1 - vocabulary.unused_rows_factor, rel=0.03)


@pytest.mark.parametrize("kind", ["plain", "fp32"])
def test_nodes_that_find_other_norms_take_rank_0s(kind: str, monkeypatch: Patch) -> None:
    """Else their weights drift apart in the last bits, since others add up in another order."""

    def steps(world: World) -> list[torch.Tensor]:
        classifier = model()
        optimizer = build(kind, classifier, world)
        norms = train(optimizer, classifier, range(1), 0.0) + train(optimizer, classifier, range(1, 5))
        return [*norms, *saved(optimizer)[0].values()]

    def check(world: World) -> None:
        def as_other_cores_make_it(real: Any) -> Any:  # but by more
            return lambda *arguments: real(*arguments) * (1 + 1e-3 * world.rank)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", as_other_cores_make_it(nn.utils.clip_grad_norm_))
        monkeypatch.setattr(Kernels, "square_sum", as_other_cores_make_it(Kernels.square_sum))
        first, second = gather_objects(world, steps(world))
        assert_equal(first, second)
        torch.testing.assert_close(first, alone, atol=1e-6, rtol=0)

    alone = steps(ALONE)
    on_ranks(2, check, nodes=True)


def test_rates_fall_with_the_distance_from_the_head_and_only_matrices_decay() -> None:
    scales = {"head.dense": 1.0, "encoder.layers.1.up": 0.5, "encoder.layers.0.qkv": 0.25}
    scales |= dict.fromkeys(("encoder.tokens", "encoder.positions", "encoder.norm"), 0.125)
    for name, parameter in model().named_parameters():
        scale, decay = group_of(name, parameter, 2, Config(layerwise_lr_decay=0.5))
        assert scale == scales.get(name.rpartition(".")[0], scale)
        assert (decay > 0) == (name.endswith("weight") and "norm" not in name)


def optimizer(world: World, kernels: Kernels) -> CpuAdamW:
    torch.manual_seed(1)
    shapes = [(1,), (3,), (63,), (64,), (65,), (129,), (7, 9), (33, 100), (1000, 17)]
    weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    weights[3].requires_grad_(False)
    return CpuAdamW(weights, 1, Config(weight_decay=0.01), world, kernels)


def backward(optimizer: CpuAdamW, gradients: list[torch.Tensor]) -> None:
    for state, gradient in zip(optimizer._trained, gradients):
        (state.weight * gradient).sum().backward()


def check_steps(world: World, dtype: torch.dtype) -> None:
    kernels = kernels_for(dtype)
    adamw = kernels.adamw

    def late_on_rank_1(*arguments: Any) -> None:
        time.sleep(0.01 * (world.rank == 1))
        adamw(*arguments)

    kernels.adamw = late_on_rank_1  # type: ignore[method-assign, assignment]
    together, alone = (optimizer(each, kernels) for each in (world, World(world.device)))
    assert together.shares_memory
    for step in range(1, 12):
        accumulated, is_bad = dtype == torch.bfloat16 and step % 3 == 0, step % 5 == 0
        torch.manual_seed(step)
        gradients = [[torch.randn(state.weight.shape).to(dtype) for state in alone._trained] for _ in range(3)]
        if is_bad:
            gradients[step % 3][2][-1] = float("nan")
        time.sleep(0.02 * (step % 7 == world.rank))
        if accumulated:
            with together.no_sync():  # a first micro-batch, whose gradient is zero
                backward(together, [torch.zeros_like(gradient) for gradient in gradients[world.rank]])
        backward(together, gradients[world.rank])
        alone._accumulates = True
        for state, *of_ranks in zip(alone._trained, *gradients):
            first, second, third = (gradient.float() for gradient in of_ranks)
            state.accumulator = (first + second + third) / 3
        norms = together.clip_grad_norm(0.5), alone.clip_grad_norm(0.5)
        assert all(norm.isfinite() == (not is_bad) for norm in norms)
        if is_bad:
            together.zero_grad()
            alone.zero_grad()
            continue
        torch.testing.assert_close(*norms)
        alone._norm = together._norm  # else the factor may differ in its last bit
        together.step(1e-2)
        together.zero_grad()
        alone.step(1e-2)
        alone.zero_grad()
        for ours, theirs in zip(together._trained, alone._trained):
            found, expected = ours.tensors(), theirs.tensors()
            assert all(torch.equal(found[name], expected[name]) for name in expected), (step, ours.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_together_are_those_of_one_process(dtype: torch.dtype) -> None:
    """To the bit, with ranks that come late, micro-batches, frozen and tiny parameters, and NaN on one rank only."""
    kernels_for(dtype)
    on_ranks(3, partial(check_steps, dtype=dtype))


def test_processes_agree_that_they_share_no_memory(monkeypatch: Patch) -> None:
    """There may be another process's file by that name, no such memory on this system, or another node."""

    def check(world: World) -> None:
        with monkeypatch.context() as patched:
            if world.rank == 1:
                file = os.memfd_create("another")
                os.ftruncate(file, 1 << 16)
                another = f"/proc/{os.getpid()}/fd/{file}"
                patched.setattr(shared_memory, "broadcast", lambda *facts: (another, broadcast(*facts)[1]))
            assert shared_bytes(world, 64) is None
        monkeypatch.delattr(os, "memfd_create")
        assert shared_bytes(world, 64) is None

    on_ranks(2, check)
    assert shared_bytes(World(torch.device("cpu"), 0, 2), 64) is None
