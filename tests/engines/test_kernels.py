"""Kernels against plain torch, in fp32 and bf16, with one thread and two (AdamW's: test_optimizer.py); compiling."""

import ctypes
import math
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Patch, kernels_for

from sst2_xlmr.engines.cpu import kernels as compiling
from sst2_xlmr.engines.cpu.kernels import Kernels, Packed, load_kernels

NAN, INF = float("nan"), float("inf")
LENGTHS = [2, 16, 40, 3, 17, 31, 5]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_for(request.param)


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
    kernels_for(torch.float32).dropout_(ones, rows, site)
    return torch.where(ones > 0, 1 / (1 - rows.drop_p), 0.0).double()


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """fp32: within 1e-5 of the largest value; bf16: this, and the rounding of each result, half of its last bit."""
    largest = float(reference.abs().max())
    rtol = 0.0 if ours.dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(ours.double(), reference.detach().double(), rtol=rtol, atol=1e-5 * largest)


def sigmas(mask: torch.Tensor, expected: float) -> float:
    """How far the share of ones among independent zeros and ones is from the expected one."""
    return abs(float(mask.double().mean()) - expected) / math.sqrt(expected * (1 - expected) / mask.numel())


def test_the_share_of_dropped_units(kernels: Kernels, threads: int) -> None:
    """Over 10^6 units, and over rows, columns and neighbours; the rest is scaled by 1 / (1 - p)."""
    rows, p = pack([10] * 400, 0.1), 0.1
    kept = torch.ones(4000, 250, dtype=kernels.dtype)
    kernels.dropout_(kept, rows, 5)
    dropped, scale = kept == 0, torch.tensor(1 / (1 - p)).to(kernels.dtype)
    assert torch.equal(kept, torch.where(dropped, 0, scale))
    assert sigmas(dropped, p) < 4
    for shares in (dropped.double().mean(0), dropped.double().mean(1)):
        assert float((shares - p).abs().max()) < 5.5 * math.sqrt(p * (1 - p) * len(shares) / dropped.numel())
    for pair in (dropped[:, 1:] & dropped[:, :-1], dropped[1:] & dropped[:-1]):
        assert sigmas(pair, p * p) < 4.5


def test_masks_differ_between_sites_rows_and_runs() -> None:
    """Two masks share as many units as independent ones would; without dropout there is none."""
    rows = pack([64], 0.5)
    first = masks(rows, 3, 384)
    different = [masks(rows, site, 384) for site in (0, 1, 2, 4, 30, 37)] + [masks(pack([64], 0.5, seed=1), 3, 384)]
    different += [first.roll(1, 0), first.roll(7, 0), first.flip(0)]
    assert all(sigmas(mask == first, 0.5) < 4 for mask in different)
    values = torch.tensor([[0.0, -0.0, 1.0, NAN, INF, -INF, 1e-40, 3e38]] * 8)
    before = values.clone()
    kernels_for(torch.float32).dropout_(values, pack([8], 0.0), 1)
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("n", [33, 384])
@pytest.mark.parametrize("drop_p", [0.0, 0.3])
def test_add_norm(kernels: Kernels, threads: int, n: int, drop_p: float) -> None:
    rows, dtype = pack([5, 12], drop_p), kernels.dtype
    x, y, grad = (random(24, n, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    bias, gamma, beta = (random(n, dtype=dtype, seed=seed) for seed in (4, 5, 6))
    hidden, normed = kernels.add_norm(x, y, bias, gamma, beta, 1e-5, rows, 7, with_grad=True)
    assert torch.equal(kernels.add_norm(x, y, bias, gamma, beta, 1e-5, rows, 7)[1], normed), "without gradients"
    mask = masks(rows, 7, n)
    close(hidden, x.double() + (y.double() + bias.double()) * mask)

    inputs = [t.double().requires_grad_() for t in (hidden, gamma, beta)]
    reference = F.layer_norm(inputs[0], (n,), inputs[1], inputs[2], 1e-5)
    close(normed, reference)
    expected = torch.autograd.grad(reference, inputs, grad.double())
    dhidden, dy, dgamma, dbeta, dbias = kernels.add_norm_backward(grad, hidden, gamma, 1e-5, rows, 7)
    masked = expected[0] * mask
    for ours, theirs in zip((dhidden, dgamma, dbeta, dy, dbias), (*expected, masked, masked.sum(0))):
        close(ours, theirs)
    assert torch.equal(dy == 0, masked == 0), "another mask than in the forward pass"


def test_bias_gelu_everywhere() -> None:
    """From -1e4 to 1e4: the value within 2e-7 of |v| or of 1, the derivative within 1e-6; far out exactly v or 0."""
    v = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])])
    exact = v.double().requires_grad_()
    reference = F.gelu(exact)
    derivative = v.clone()[:, None]
    y = kernels_for(torch.float32).bias_gelu_(derivative, torch.zeros(1), with_grad=True)[:, 0]
    assert torch.equal(kernels_for(torch.float32).bias_gelu_(v.clone()[:, None], torch.zeros(1))[:, 0], y)
    assert float(((y - reference).abs() / exact.abs().clamp(min=1)).max()) < 2e-7
    assert float((derivative[:, 0] - torch.autograd.grad(reference.sum(), exact)[0]).abs().max()) < 1e-6
    assert y[-6:].tolist() == pytest.approx([0, 0, 0, 20, 100, 1e4], rel=0, abs=1e-30)
    assert derivative[-6:, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1], rel=0, abs=1e-30)


def attention_masks(rows: Packed, site: int, heads: int) -> list[torch.Tensor]:
    """Per text float64 [heads, queries, keys]: with equal weights, and values that are one at one key each."""
    kernels, size = kernels_for(torch.float32), 64
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
    rows = pack([60] * 10, 0.25)
    dropped, other = (torch.stack(attention_masks(rows, site, 6)) == 0 for site in (4, 7))
    assert sigmas(dropped, 0.25) < 4
    for mask in (other, *(dropped.roll(1, dim) for dim in range(4))):
        assert sigmas(mask == dropped, 0.25**2 + 0.75**2) < 4


@pytest.mark.parametrize("drop_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("heads", "size", "lengths"),
    [(2, 20, LENGTHS), (2, 64, [33, 2, 16]), (1, 16, [16] * 3), (5, 1, [2, 3]), (2, 8, [1] * 8)],
)
def test_attention(kernels: Kernels, threads: int, heads: int, size: int, lengths: list[int], drop_p: float) -> None:
    """q, k and v are columns of a wider matrix, as a layer has them; scores are large enough to tell keys apart."""
    rows, dtype, width = pack(lengths, drop_p), kernels.dtype, heads * size
    projected = random(len(rows.keys), 3 * width, dtype=dtype, scale=1.5)
    q, k, v = projected.chunk(3, dim=1)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    reference = reference_attention(inputs[0], inputs[1], inputs[2], heads, rows, attention_masks(rows, 4, heads))
    mixed = kernels.attention(q, k, v, heads, rows, 4)
    close(mixed, reference)
    grad = random(len(rows.keys), width, dtype=dtype, seed=1)
    dprojected = torch.full_like(projected, NAN)
    dq, dk, dv = dprojected.chunk(3, dim=1)
    kernels.attention_backward(grad, (q, k, v), (dq, dk, dv), heads, rows, 4)
    for ours, theirs in zip((dq, dk, dv), torch.autograd.grad(reference, inputs, grad.double())):
        if max(lengths) > 1 or ours is dv:  # softmax of one score has no gradient but rounding
            close(ours, theirs)
    assert not mixed[rows.tokens :].any() and not dprojected[rows.tokens :].any()


def test_attention_with_scores_far_apart(kernels: Kernels) -> None:
    rows = pack([20], 0.0)
    q, k, v = (random(24, 8, dtype=kernels.dtype, seed=seed, scale=1000.0) for seed in range(3))
    mixed = kernels.attention(q, k, v, 1, rows, 1)
    close(mixed, reference_attention(q.double(), k.double(), v.double(), 1, rows, [torch.ones(1, 20, 20).double()]))


@pytest.fixture
def cache(monkeypatch: Patch, tmp_path: Path) -> Path:
    """The folder of compiled libraries in a new cache; skips where nothing compiles."""
    kernels_for(torch.float32)
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "FLAGS", ["-O0", *compiling.FLAGS[1:]])  # compiles in an eighth of the time
    return tmp_path / f"kernels-{os.getuid()}"


def compile_anew() -> None:
    found = compiling._find_kernels.__wrapped__(torch.float32)
    assert isinstance(found, Kernels), found
    assert found.column_sums(torch.ones(5, 3)).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "/nonexistent/cc"}, "no C compiler: /nonexistent/cc not found"),
        ({"CC": "", "PATH": "/nonexistent"}, "no C compiler: gcc not found"),
        ({"CC": "sh -c 'echo In x.c: >&2; echo x.c:1: error: y >&2; exit 1'"}, "sh failed: x.c:1: error: y"),
    ],
)
def test_why_there_are_no_kernels(monkeypatch: Patch, tmp_path: Path, variables: dict[str, str], reason: str) -> None:
    monkeypatch.setenv("SST2_XLMR_CACHE", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiling, "_find_kernels", compiling._find_kernels.__wrapped__)
    assert load_kernels(torch.float32) is None
    assert compiling.fallback_reason() == reason
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("is_noexec", [False, True])
def test_compiled_once(cache: Path, monkeypatch: Patch, is_noexec: bool) -> None:
    """By two at once if they start at once; from a disk mounted noexec it goes elsewhere, or the reason is said."""
    forbidden, dlopen = [str(cache)] * is_noexec, ctypes.CDLL

    def load(file: str) -> ctypes.CDLL:
        if file.startswith(tuple(forbidden)):
            raise OSError(f"{file}: failed to map segment from shared object")
        return dlopen(file)

    monkeypatch.setattr(ctypes, "CDLL", load)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: compile_anew(), range(2)))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    compile_anew()
    assert len(list(cache.iterdir())) == 1, "something was left behind"
    forbidden += [str(cache), tempfile.gettempdir()]
    reason = str(compiling._find_kernels.__wrapped__(torch.float32))
    assert reason.startswith("cannot load what gcc compiled: ")
    assert reason.endswith("failed to map segment from shared object")


def test_what_others_can_write_or_time_has_damaged_is_not_loaded(cache: Path, monkeypatch: Patch) -> None:
    compile_anew()
    compiled = next(cache.iterdir())
    content, planted = compiled.read_bytes(), b"planted by somebody else"
    for mode, put, stays in ((0o700, content[:1000] + b"x" + content[1001:], content), (0o777, planted, planted)):
        cache.chmod(mode)
        compiled.unlink()  # this process has it mapped
        compiled.write_bytes(put)
        compile_anew()
        assert compiled.read_bytes() == stays
    monkeypatch.setenv("SST2_XLMR_CACHE", str(compiled / "cache"))  # it cannot be made, which is no error
    compile_anew()
