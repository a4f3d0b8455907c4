"""Every kernel against plain torch, in fp32 and bf16, with one thread and with two; and how the library is compiled."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from sst2_xlmr.engines.cpu import kernels as compiling
from sst2_xlmr.engines.cpu.kernels import GRADIENTS, PARAMETER, Kernels, Packed, load_kernels
from sst2_xlmr.engines.cpu.masters import join_master, split_master
from sst2_xlmr.training.optimizer import BETAS, EPSILON

DTYPES = [torch.float32, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
LENGTHS = [2, 16, 40, 3, 17, 31, 5]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


def load(dtype: torch.dtype) -> Kernels:
    found = load_kernels(dtype)
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def pack(lengths: list[int], drop_p: float = 0.0, seed: int = 0) -> Packed:
    """Random keys; the number of rows is rounded up to a multiple of 8."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    keys = np.random.RandomState(seed).randint(0, 2**32, starts[-1] + -starts[-1] % 8, np.uint32)
    return Packed(torch.from_numpy(starts), torch.from_numpy(keys.view(np.int32)), max(lengths), drop_p)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def masks(rows: Packed, site: int, n: int) -> torch.Tensor:
    """float64 [rows, n], 0 or 1 / (1 - p), read off a matrix of ones."""
    ones = torch.ones(len(rows.keys), n)
    load(torch.float32).dropout_(ones, rows, site)
    return torch.where(ones > 0, 1 / (1 - rows.drop_p), 0.0).double()


def close(ours: torch.Tensor, reference: torch.Tensor, roundings: float = 1.0) -> None:
    """fp32: within 1e-5 of the largest value; bf16: this, and the rounding of each result, half of its last bit."""
    largest = float(reference.abs().max())
    rtol = 0.0 if ours.dtype == torch.float32 else roundings * 2.0**-8
    torch.testing.assert_close(ours.double(), reference.detach().double(), rtol=rtol, atol=1e-5 * largest)


def same_bits(ours: torch.Tensor, other: torch.Tensor) -> bool:
    view = torch.int32 if ours.dtype == torch.float32 else torch.int16
    return torch.equal(ours.contiguous().view(view), other.contiguous().view(view))


# ---- dropout ----


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_of_dropped_units(kernels: Kernels, threads: int, p: float) -> None:
    """Within 4 sigma over 10^6 units, and over rows, columns and neighbours; the rest is scaled by 1 / (1 - p)."""
    rows = pack([10] * 400, p)
    kept = torch.ones(4000, 250, dtype=kernels.dtype)
    kernels.dropout_(kept, rows, 5)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)).to(kernels.dtype))}
    dropped = (kept == 0).double()

    def deviation(found: float, expected: float, count: int) -> float:
        return abs(found - expected) / math.sqrt(expected * (1 - expected) / count)

    assert deviation(float(dropped.mean()), p, dropped.numel()) < 4
    for dim in (0, 1):  # the largest of 4,000: 5 sigma
        worst = (dropped.mean(dim) - p).abs().max() / math.sqrt(p * (1 - p) / dropped.shape[dim])
        assert float(worst) < 5.5
    for pair in (dropped[:, 1:] * dropped[:, :-1], dropped[1:] * dropped[:-1]):
        assert deviation(float(pair.mean()), p * p, pair.numel()) < 4.5


def test_masks_differ_between_sites_rows_and_runs(threads: int) -> None:
    """Two masks share as many units as independent ones would: half of them, within 4 sigma."""
    rows = pack([64], 0.5)
    other = pack([64], 0.5, seed=1)
    first = masks(rows, 3, 384)
    different = [masks(rows, site, 384) for site in (0, 1, 2, 4, 30, 37)] + [masks(other, 3, 384)]
    different += [first.roll(1, 0), first.roll(7, 0), first.flip(0)]
    for mask in different:
        share = float((mask == first).double().mean())
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(first.numel()), share


def test_equal_keys_give_equal_masks_wherever_the_row_is(kernels: Kernels, threads: int) -> None:
    rows = pack([30], 0.3)
    whole, some = torch.ones(32, 50, dtype=kernels.dtype), torch.ones(3, 50, dtype=kernels.dtype)
    kernels.dropout_(whole, rows, 2)
    at = torch.tensor([29, 4, 4])
    kernels.dropout_(some, rows, 2, rows.keys[at])
    assert torch.equal(some, whole[at])


def test_no_dropout_leaves_the_bits(kernels: Kernels, threads: int) -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, NAN, INF, -INF, 1e-40, 3e38]] * 8, dtype=kernels.dtype)
    before = values.clone()
    kernels.dropout_(values, pack([8], 0.0), 1)
    assert same_bits(values, before)


# ---- sums, normalization, GELU ----


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (7, 3), (40, 33), (1000, 20)])
def test_column_sums(kernels: Kernels, threads: int, rows: int, n: int) -> None:
    x = random(rows, n, dtype=kernels.dtype)
    close(kernels.column_sums(x), x.double().sum(0))


@pytest.mark.parametrize("n", [1, 20, 33, 384])
@pytest.mark.parametrize("drop_p", [0.0, 0.3])
def test_add_norm(kernels: Kernels, threads: int, n: int, drop_p: float) -> None:
    rows, dtype = pack([5, 12], drop_p), kernels.dtype
    x, y, grad = (random(24, n, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    bias, gamma, beta = (random(n, dtype=dtype, seed=seed) for seed in (4, 5, 6))
    hidden, normed = kernels.add_norm(x, y, bias, gamma, beta, 1e-5, rows, 7)
    mask = masks(rows, 7, n)
    close(hidden, x.double() + (y.double() + bias.double()) * mask)

    inputs = [t.double().requires_grad_() for t in (hidden, gamma, beta)]
    reference = F.layer_norm(inputs[0], (n,), inputs[1], inputs[2], 1e-5)
    close(normed, reference)
    reference.backward(grad.double())
    dhidden, dy, dgamma, dbeta, dbias = kernels.add_norm_backward(grad, hidden, gamma, 1e-5, rows, 7)
    for ours, theirs in zip((dhidden, dgamma, dbeta), inputs):
        if n > 1:  # the gradient through the norm of a single value is zero but for rounding
            assert theirs.grad is not None
            close(ours, theirs.grad)
    if n > 1:
        assert inputs[0].grad is not None
        expected = inputs[0].grad * mask
        close(dy, expected)
        assert torch.equal(dy == 0, expected == 0), "another mask than in the forward pass"
        close(dbias, expected.sum(0))


def test_add_norm_of_embeddings_and_of_first_tokens(kernels: Kernels, threads: int) -> None:
    """Without y, x is taken as it is; with keys of their own, rows get the masks of these."""
    rows, dtype = pack([5, 12], 0.3), kernels.dtype
    x, gamma, beta = (random(*shape, dtype=dtype, seed=1) for shape in ((24, 20), (20,), (20,)))
    hidden, normed = kernels.add_norm(x, None, None, gamma, beta, 1e-5, rows, 0)
    assert torch.equal(hidden, x)
    close(normed, F.layer_norm(x.double(), (20,), gamma.double(), beta.double(), 1e-5))
    with_y = kernels.add_norm_backward(x, hidden, gamma, 1e-5, rows, 0)
    without_y = kernels.add_norm_backward(x, hidden, gamma, 1e-5, rows, 0, has_y=False)
    assert all(same_bits(with_y[part], without_y[part]) for part in (0, 2, 3))

    firsts = torch.tensor([0, 5])
    whole, _ = kernels.add_norm(x, x, beta, gamma, beta, 1e-5, rows, 4)
    some, _ = kernels.add_norm(x[firsts], x[firsts], beta, gamma, beta, 1e-5, rows, 4, rows.keys[firsts])
    assert same_bits(some, whole[firsts])
    whole = kernels.add_norm_backward(x, hidden, gamma, 1e-5, rows, 4)[1]
    some = kernels.add_norm_backward(x[firsts], hidden[firsts], gamma, 1e-5, rows, 4, rows.keys[firsts])[1]
    assert same_bits(some, whole[firsts])


@pytest.mark.parametrize("n", [1, 17, 96])
def test_bias_gelu(kernels: Kernels, threads: int, n: int) -> None:
    bias, grad = random(n, dtype=kernels.dtype), random(200, n, dtype=kernels.dtype, seed=2)
    x = random(200, n, dtype=kernels.dtype, seed=1, scale=3.0)
    v = (x.double() + bias.double()).requires_grad_()
    reference = F.gelu(v)
    reference.sum().backward()
    y = kernels.bias_gelu_(x, bias)
    derivative = x
    close(y, reference)
    assert v.grad is not None
    close(derivative, v.grad)
    expected = grad.double() * derivative.double()
    dbias = kernels.bias_gelu_backward_(grad, derivative)
    close(grad, expected)
    close(dbias, expected.sum(0))


def test_bias_gelu_everywhere() -> None:
    """From -1e4 to 1e4: the value within 2e-7 of |v| or of 1, the derivative within 1e-6; far out exactly v or 0."""
    v = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])])
    reference = v.double().requires_grad_()
    F.gelu(reference).sum().backward()
    derivative = v.clone()[:, None]
    y = load(torch.float32).bias_gelu_(derivative, torch.zeros(1))[:, 0]
    assert reference.grad is not None
    error = (y.double() - F.gelu(reference.detach())).abs() / v.double().abs().clamp(min=1)
    assert float(error.max()) < 2e-7
    assert float((derivative[:, 0].double() - reference.grad).abs().max()) < 1e-6
    assert y[-6:].tolist() == pytest.approx([0, 0, 0, 20, 100, 1e4], rel=0, abs=1e-30)
    assert derivative[-6:, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1], rel=0, abs=1e-30)


# ---- attention ----


def attention_masks(rows: Packed, site: int, heads: int) -> list[torch.Tensor]:
    """Per text float64 [heads, queries, keys]: with equal weights, and values that are one at one key each."""
    kernels, size = load(torch.float32), 64
    zeros, lengths = torch.zeros(len(rows.keys), heads * size), rows.starts.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])
    values = torch.zeros(len(rows.keys), heads, size)
    values[torch.arange(rows.tokens), :, positions] = 1
    mixed = kernels.attention(zeros, zeros, values.flatten(1), heads, rows, site).view(-1, heads, size)
    found = [mixed[start : start + n, :, :n].transpose(0, 1) for start, n in zip(rows.starts.tolist(), lengths)]
    return [torch.where(mask > 0, 1 / (1 - rows.drop_p), 0.0).double() for mask in found]


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, rows: Packed, dropped: list[torch.Tensor]
) -> torch.Tensor:
    """The same in torch, text by text; q has all tokens. Rows behind the last text are zero."""
    out = []
    for start, end, mask in zip(rows.starts[:-1].tolist(), rows.starts[1:].tolist(), dropped):
        query, key, value = (x[start:end].view(end - start, heads, -1).transpose(0, 1) for x in (q, k, v))
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[2])).softmax(2) * mask
        out.append((weights @ value).transpose(0, 1).flatten(1))
    return torch.cat([*out, torch.zeros(len(q) - rows.tokens, q.shape[1], dtype=q.dtype)])


def test_attention_masks(threads: int) -> None:
    """The share of dropped weights; other masks for other heads, sites, queries."""
    rows = pack([60] * 10, 0.25)
    found = torch.stack(attention_masks(rows, 4, 6))
    dropped = (found == 0).double()
    assert abs(float(dropped.mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / dropped.numel())
    other = (torch.stack(attention_masks(rows, 7, 6)) == 0).double()
    alike = 0.25**2 + 0.75**2
    for mask in (other, dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(1, 2), dropped.roll(1, 3)):
        share = float((mask == dropped).double().mean())
        assert abs(share - alike) < 4 * math.sqrt(alike * (1 - alike) / dropped.numel()), share


@pytest.mark.parametrize("drop_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("heads", "size", "lengths"),
    [(3, 8, LENGTHS), (2, 20, LENGTHS), (2, 64, [33, 2, 16]), (1, 16, [16] * 3), (5, 1, [2, 3]), (2, 8, [1] * 8)],
)
@pytest.mark.parametrize("first_only", [False, True])
def test_attention(
    kernels: Kernels, threads: int, heads: int, size: int, lengths: list[int], drop_p: float, first_only: bool
) -> None:
    """q, k and v are columns of a wider matrix, as a layer has them; scores are large enough to tell keys apart."""
    rows, dtype, width = pack(lengths, drop_p), kernels.dtype, heads * size
    projected = random(len(rows.keys), 3 * width, dtype=dtype, scale=1.5)
    q, k, v = projected.chunk(3, dim=1)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    reference = reference_attention(inputs[0], inputs[1], inputs[2], heads, rows, attention_masks(rows, 4, heads))
    grad = random(len(rows.keys), width, dtype=dtype, seed=1)
    dprojected = torch.full_like(projected, NAN)
    dq, dk, dv = dprojected.chunk(3, dim=1)
    if first_only:
        firsts = rows.starts[:-1].long()
        q, grad, reference = q[firsts], grad[firsts], reference[firsts]
        dq = torch.full_like(q, NAN)
    mixed = kernels.attention(q, k, v, heads, rows, 4)
    close(mixed, reference)
    reference.backward(grad.double())
    kernels.attention_backward(grad, (q, k, v), (dq, dk, dv), heads, rows, 4)
    expected = [x.grad for x in inputs]
    if first_only:
        assert expected[0] is not None
        expected[0] = expected[0][firsts]
    for ours, theirs in zip((dq, dk, dv), expected):
        assert theirs is not None
        if max(lengths) > 1 or ours is dv:  # softmax of one score has no gradient but rounding
            close(ours, theirs)
    if not first_only:
        assert not mixed[rows.tokens :].any() and not dprojected[rows.tokens :].any()


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_attention_with_scores_far_apart(kernels: Kernels, scale: float) -> None:
    """One key takes all; nothing overflows."""
    rows = pack([20], 0.0)
    q, k, v = (random(24, 8, dtype=kernels.dtype, seed=seed, scale=scale) for seed in range(3))
    mixed = kernels.attention(q, k, v, 1, rows, 1)
    close(mixed, reference_attention(q.double(), k.double(), v.double(), 1, rows, [torch.ones(1, 20, 20).double()]))


def test_attention_backward_by_finite_differences(threads: int) -> None:
    """With dropout, and without any reference: the derivative along a random direction, in fp32."""
    rows, kernels = pack([5, 18], 0.3), load(torch.float32)
    inputs = [random(24, 16, seed=seed) for seed in range(3)]
    towards = [random(24, 16, seed=seed) for seed in range(3, 6)]
    grad = random(24, 16, seed=9)
    outputs = [torch.empty(24, 16) for _ in range(3)]
    kernels.attention_backward(grad, tuple(inputs), tuple(outputs), 2, rows, 4)  # type: ignore[arg-type]
    step, ends = 1e-2, []
    for sign in (1, -1):
        q, k, v = (x + sign * step * d for x, d in zip(inputs, towards))
        ends.append(kernels.attention(q, k, v, 2, rows, 4))
    found = float(((ends[0] - ends[1]).double() * grad.double()).sum() / (2 * step))
    expected = float(sum((x.double() * d.double()).sum() for x, d in zip(outputs, towards)))
    assert found == pytest.approx(expected, rel=2e-3)


# ---- AdamW ----

SIZES = [1, 63, 64, 65, 1023, 1025, 5000]


def describe(tensors: list[list[Any]], rates: list[tuple[float, float]]) -> np.ndarray:
    """Each parameter's gradient, weights, low bits, mean and square, and its rate and decay."""
    arguments = np.zeros(len(tensors), PARAMETER)
    for line, found, (rate, decay) in zip(arguments, tensors, rates):
        for name, tensor in zip(("grad", "weights", "low", "mean", "square"), found):
            line[name] = 0 if tensor is None else tensor.data_ptr()
        line["n"], line["rate"], line["decay"] = found[0].numel(), rate, decay
    return arguments


def parameters(dtype: torch.dtype, fp32_grads: bool) -> list[list[Any]]:
    """Return gradient, weights, low bits (None in fp32), mean and square of every size."""
    result = []
    for size in SIZES:
        master = random(size, seed=1)
        weights, low = split_master(master) if dtype == torch.bfloat16 else (master, None)
        grad = random(size, seed=2, dtype=torch.float32 if fp32_grads else dtype)
        result.append([grad, weights, low, random(size, seed=3) * 0.1, random(size, seed=4).square()])
    return result


def master_of(tensors: list[Any]) -> torch.Tensor:
    """Return fp32 weights; of weights, low bits, and whatever follows."""
    return tensors[0].clone() if tensors[1] is None else join_master(*tensors[:2])


def same_bytes(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # type: ignore[union-attr]


@pytest.mark.parametrize("fp32_grads", [True, False])
def test_square_sum(kernels: Kernels, threads: int, fp32_grads: bool) -> None:
    fp32_grads = fp32_grads or kernels.dtype == torch.float32
    found = parameters(kernels.dtype, fp32_grads)
    arguments = describe(found, [(0.0, 0.0)] * len(SIZES))
    expected = sum(float(grad.double().square().sum()) for grad, *_ in found)
    total = kernels.square_sum(arguments, np.array((0, 1, fp32_grads), GRADIENTS))
    assert total == pytest.approx(expected, rel=1e-6)
    assert kernels.square_sum(arguments, np.array((0, 1, fp32_grads), GRADIENTS)) == total
    for bad in (NAN, INF):
        found[4][0][-1] = bad
        assert not math.isfinite(kernels.square_sum(arguments, np.array((0, 1, fp32_grads), GRADIENTS)))


@pytest.mark.parametrize("fp32_grads", [True, False])
def test_adamw(kernels: Kernels, threads: int, fp32_grads: bool) -> None:
    """Ten steps are torch's, each parameter with a rate and decay of its own; equal bits with one thread and two."""
    fp32_grads = fp32_grads or kernels.dtype == torch.float32
    ours, again, start = (parameters(kernels.dtype, fp32_grads) for _ in range(3))
    rates = [(1e-3 * (number + 1), 1e-2 * (number % 3)) for number in range(len(SIZES))]
    for run, count in ((ours, threads), (again, 1)):
        torch.set_num_threads(count)
        for step in range(1, 11):
            places = describe(run, [(lr / (1 - BETAS[0] ** step), lr * decay) for lr, decay in rates])
            root = 1 / math.sqrt(1 - BETAS[1] ** step)
            kernels.adamw(places, np.array((0, 1, fp32_grads), GRADIENTS), 0.5, BETAS, EPSILON, root)
    for mine, other, (grad, *before), (lr, decay) in zip(ours, again, start, rates):
        assert all(map(same_bytes, mine[1:], other[1:]))
        weight = nn.Parameter(master_of(before))
        reference = torch.optim.AdamW([weight], lr, BETAS, EPSILON, decay)
        moments = dict(zip(("exp_avg", "exp_avg_sq"), before[2:]))
        reference.state[weight] = {"step": torch.tensor(0.0), **moments}
        weight.grad = 0.5 * grad.float()
        for _ in range(10):
            reference.step()
        for found, expected in ((master_of(mine[1:]), weight.detach()), *zip(mine[3:], moments.values())):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fp32_grads", [True, False])
@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_of_several_processes_are_averaged(
    kernels: Kernels, threads: int, processes: int, fp32_grads: bool
) -> None:
    """Equal bits to one process that is given their fp32 mean, added in their order."""
    dtype = torch.float32 if fp32_grads else kernels.dtype
    size = 5000
    of_all = torch.stack([random(size, seed=10 + number, dtype=dtype) for number in range(processes)])
    mean = of_all[0].float()
    for other in of_all[1:]:
        mean = mean + other.float()
    results = []
    for grad, places in (
        (of_all, np.array((size * of_all.element_size(), processes, fp32_grads or dtype == torch.float32), GRADIENTS)),
        (mean / processes, np.array((0, 1, True), GRADIENTS)),
    ):
        found = parameters(kernels.dtype, False)[-1]
        arguments = describe([[grad, *found[1:]]], [(1e-3, 1e-2)])
        arguments["n"] = size
        norm = kernels.square_sum(arguments, places)
        kernels.adamw(arguments, places, 0.5, BETAS, EPSILON, 1.0)
        results.append((norm, found[1:]))
    assert results[0][0] == results[1][0]
    assert all(map(same_bytes, results[0][1], results[1][1]))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_adamw_shows_a_gradient_that_is_not_finite(kernels: Kernels, bad: float) -> None:
    found = parameters(kernels.dtype, False)
    for grad, *_ in found:
        grad[-1] = bad
    root = 1 / math.sqrt(1 - BETAS[1])
    gradients = np.array((0, 1, kernels.dtype == torch.float32), GRADIENTS)
    kernels.adamw(describe(found, [(1e-3, 0.01)] * len(SIZES)), gradients, 1.0, BETAS, EPSILON, root)
    for _, weights, _, mean, _ in found:
        assert not weights[-1].isfinite() and not mean[-1].isfinite()
        assert weights[:-1].isfinite().all()


# ---- what is not a number, repeated calls ----


def calls(kernels: Kernels, bad: float | None = None) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Every kernel that works on rows, on 3 texts of 6, 17 and 9 tokens; `bad` is put at token 10 of each input."""
    rows, dtype = pack([6, 17, 9], 0.2), kernels.dtype

    def matrix(seed: int, width: int = 40) -> torch.Tensor:
        values = random(32, width, dtype=dtype, seed=seed)
        if bad is not None:
            values[10, 3] = bad
        return values

    vector = random(40, dtype=dtype)

    def dropped() -> list[torch.Tensor]:
        values = matrix(1)
        kernels.dropout_(values, dataclasses.replace(rows, drop_p=0.5), 1)
        return [values]

    def gelu() -> list[torch.Tensor]:
        derivative = matrix(1)
        y = kernels.bias_gelu_(derivative, vector)
        return [y, derivative]

    def gelu_backward() -> list[torch.Tensor]:
        grad = matrix(1)
        return [kernels.bias_gelu_backward_(grad, random(32, 40, dtype=dtype)), grad]

    def attention(part: int) -> Callable[[], list[torch.Tensor]]:
        def call() -> list[torch.Tensor]:
            inputs = [matrix(n) if n == part else random(32, 40, dtype=dtype, seed=n) for n in range(3)]
            return [kernels.attention(inputs[0], inputs[1], inputs[2], 2, rows, 1)]

        return call

    def attention_backward() -> list[torch.Tensor]:
        q, k, v = (random(32, 40, dtype=dtype, seed=seed) for seed in range(3))
        outputs = tuple(torch.empty_like(q) for _ in range(3))
        kernels.attention_backward(matrix(4), (q, k, v), outputs, 2, rows, 1)  # type: ignore[arg-type]
        return list(outputs)

    def norm_backward(bad_grad: bool) -> Callable[[], list[torch.Tensor]]:
        plain = random(32, 40, dtype=dtype, seed=9)
        inputs = (matrix(1), plain) if bad_grad else (plain, matrix(1))
        return lambda: list(kernels.add_norm_backward(*inputs, vector, 1e-5, rows, 1))

    return {
        "dropout": dropped,
        "column_sums": lambda: [kernels.column_sums(matrix(1))],
        "add_norm, x": lambda: list(
            kernels.add_norm(matrix(1), random(32, 40, dtype=dtype), vector, vector, vector, 1e-5, rows, 1)
        ),
        "add_norm, y": lambda: list(
            kernels.add_norm(random(32, 40, dtype=dtype), matrix(1), vector, vector, vector, 1e-5, rows, 1)
        ),
        "add_norm_backward, grad": norm_backward(True),
        "add_norm_backward, hidden": norm_backward(False),
        "bias_gelu": gelu,
        "bias_gelu_backward": gelu_backward,
        **{f"attention, {name}": attention(part) for part, name in enumerate("qkv")},
        "attention_backward": attention_backward,
    }


NAMES = [
    *("dropout", "column_sums", "add_norm, x", "add_norm, y", "add_norm_backward, grad", "add_norm_backward, hidden"),
    *("bias_gelu", "bias_gelu_backward", "attention, q", "attention, k", "attention, v", "attention_backward"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_so(kernels: Kernels, name: str, bad: float) -> None:
    """In every result, in the row it belongs to (or the text, in attention), and nowhere else."""
    results = calls(kernels, bad)[name]()
    if name == "add_norm_backward, hidden":
        del results[3]  # beta's gradient does not depend on it
    for result in results:
        broken = ~result.isfinite()
        assert broken.any(), f"{name}: {bad} was lost"
        if result.dim() == 2:
            where = broken.any(1).nonzero().flatten()
            first, last = (6, 22) if name.startswith("attention") else (10, 10)
            assert first <= int(where[0]) and int(where[-1]) <= last


@pytest.mark.parametrize("name", NAMES)
def test_equal_calls_give_equal_bits(kernels: Kernels, threads: int, name: str) -> None:
    """Also with another number of threads, but for sums over rows."""
    call = calls(kernels)[name]
    first = call()
    for _ in range(5):
        assert all(same_bits(ours, other) for ours, other in zip(call(), first))
    torch.set_num_threads(3)
    assert all(same_bits(ours, other) for ours, other in zip(call(), first) if ours.dim() == 2)


# ---- compiling ----


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of compiled libraries in a new cache; skips where nothing compiles."""
    load(torch.float32)
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path))
    return tmp_path / f"kernels-{os.getuid()}"


def compile_anew() -> None:
    """Find the kernels as a new process does, and check that they work."""
    found = compiling._find_kernels.__wrapped__(torch.float32)
    assert isinstance(found, Kernels), found
    assert found.column_sums(torch.ones(5, 3)).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "/nonexistent/cc"}, "no C compiler: /nonexistent/cc not found"),
        ({"CC": "false"}, "false failed: exit status 1"),
        ({"CC": "", "PATH": "/nonexistent"}, "no C compiler: gcc not found"),
        ({"CC": "sh -c 'echo In x.c: >&2; echo x.c:1: error: y >&2; exit 1'"}, "sh failed: x.c:1: error: y"),
    ],
)
def test_without_a_compiler_there_are_no_kernels_and_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiling, "_find_kernels", compiling._find_kernels.__wrapped__)
    assert load_kernels(torch.float32) is None
    assert compiling.fallback_reason() == reason
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent / "file").touch()
    monkeypatch.setenv("SST2_XLMR_CACHE", str(cache.parent / "file" / "cache"))
    compile_anew()


def test_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_anew()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    compile_anew()
    assert len(list(cache.iterdir())) == 1, "something was left behind"


def test_a_cache_on_a_disk_mounted_noexec(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled there, once, is loaded from elsewhere; if that cannot be either, the reason is the true one."""
    forbidden, dlopen = [str(cache)], ctypes.CDLL

    def mounted_noexec(file: str) -> ctypes.CDLL:
        if file.startswith(tuple(forbidden)):
            raise OSError(f"{file}: failed to map segment from shared object")
        return dlopen(file)

    monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    compile_anew()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    compile_anew()
    forbidden.append(tempfile.gettempdir())
    reason = str(compiling._find_kernels.__wrapped__(torch.float32))
    assert reason.startswith("cannot load what gcc compiled: ")
    assert reason.endswith("failed to map segment from shared object")


def test_two_processes_compile_at_once(cache: Path) -> None:
    program = """
import torch
from sst2_xlmr.engines.cpu.kernels import load_kernels
for dtype in (torch.float32, torch.bfloat16):
    print(load_kernels(dtype).column_sums(torch.ones(5, 3, dtype=dtype)).tolist())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    for process in started:
        assert process.communicate(timeout=300)[0] == "[5.0, 5.0, 5.0]\n" * 2
    assert len(list(cache.iterdir())) == 2


def test_what_others_can_write_or_time_has_damaged_is_not_loaded(cache: Path) -> None:
    compile_anew()
    compiled = next(cache.iterdir())
    content, planted = compiled.read_bytes(), b"planted by somebody else"
    for mode, put, stays in ((0o700, content[:1000] + b"x" + content[1001:], content), (0o777, planted, planted)):
        cache.chmod(mode)
        compiled.unlink()  # this process has it mapped
        compiled.write_bytes(put)
        compile_anew()
        assert compiled.read_bytes() == stays
