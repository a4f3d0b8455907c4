"""8-bit products against exact ones, and the model that they make against the plain one."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ROOT, SMALL_ENCODER, Capture, Patch, kernels_for, needs_small_encoder, random_texts
from running import printed_by
from torch import nn

from sst2_xlmr import engines, predictor
from sst2_xlmr.engines.cpu.int8 import Int8Classifier
from sst2_xlmr.engines.cpu.int8_linear import Quantized, int8_linear, int16_linear, linear8, linear16, quantize
from sst2_xlmr.engines.cpu.kernels import Kernels
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.model.roberta import SequenceClassifier
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util.tensors import quantize_weights

TASK = SingleLabel(["a", "b", "c"])
# Of a layer's output and input, and rows.
SIZES = [(3, 5, 1), (64, 4, 6), (70, 30, 13), (200, 96, 100), (100, 40, 131), (130, 128, 105), (1, 8, 49), (5, 3, 0)]
# Gives the small encoder a head, and prints the bytes that loading it takes for good.
LOADED = """
import sys; from pathlib import Path
import torch
from sst2_xlmr.backend import quantized_model
from sst2_xlmr.model.classifier import build_classifier
from sst2_xlmr.model.encoders import find_encoder
from sst2_xlmr.task import SingleLabel
from sst2_xlmr.util import device
def own_bytes():  # without the pages of torch's libraries, of which some builds load a hundred megabytes only now
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
device.tune_memory()
before = own_bytes()
task = SingleLabel(["a", "b"])
classifier = build_classifier(find_encoder(sys.argv[1]), task)[0].requires_grad_(False).eval()
model = quantized_model(classifier, task, torch.bfloat16)
del classifier
device.trim_malloc()
print(own_bytes() - before)
"""


def int8_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    kernels = kernels_for(dtype)
    if not kernels.has_int8:
        pytest.skip("no AVX512-VNNI")
    return kernels


def values_of(quantized: Quantized, n: int) -> torch.Tensor:
    in_bytes, ranges = quantized
    scale, shift = ranges.double().split(1, dim=1)
    return in_bytes[:, :n].double() * scale - shift


def test_a_row_uses_the_whole_range_of_its_own() -> None:
    """Values are off by half a step at most; 0 stays 0 to that; a row of zeros has no range."""
    kernels = int8_kernels()
    torch.manual_seed(0)
    x = torch.randn(7, 30) * 10.0 ** torch.arange(-4, 3)[:, None]
    x[3], x[4] = 0, x[4].abs() + 5
    quantized = quantize(kernels, x)
    span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    assert torch.all((values_of(quantized, 30) - x).abs().amax(1) <= span * (0.5 / 255 + 1e-6))
    assert quantized[0][:, :30].amax(1).tolist() == [255, 255, 255, 0, 255, 255, 255]
    assert not quantized[0][:, 30:].any(), "what is behind the last value multiplies weights of zero"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    kernels = int8_kernels()
    x = torch.randn(3, 20)
    x[1, 7] = bad
    layer = int8_linear(*quantize_weights(torch.randn(5, 20)), torch.zeros(5))
    values, quantized = linear8(kernels, layer, quantize(kernels, x), gelu=True)
    assert values.isnan().all(1).tolist() == [False, True, False]
    assert quantized[1].isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "rows"), SIZES)
def test_a_layer_is_the_product_of_what_was_quantized(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    """With bias, GELU, residual and LayerNorm, against float64 on the same bytes, whatever threads and neighbours."""
    kernels = int8_kernels(dtype)
    torch.manual_seed(n)
    weight, bias, x = torch.randn(n, k), torch.randn(n), torch.randn(rows, k).to(dtype)
    weight[n // 2] = 0
    layer, quantized = int8_linear(*quantize_weights(weight), bias), quantize(kernels, x)
    values, scales = quantize_weights(weight)
    exact = values_of(quantized, k) @ (values.double() * scales.double()[:, None]).t() + bias.double()
    norm = nn.LayerNorm(n, eps=1e-5).requires_grad_(False)
    norm.weight.normal_(1, 0.5)
    norm.bias.normal_()
    residual = torch.randn(rows, n).to(dtype)
    normed = F.layer_norm(exact + residual.double(), (n,), norm.weight.double(), norm.bias.double(), 1e-5)
    found = {
        "bias": (linear8(kernels, layer, quantized), exact),
        "gelu": (linear8(kernels, layer, quantized, gelu=True), F.gelu(exact)),
        "norm": (linear8(kernels, layer, quantized, norm=(residual, norm)), normed),
    }
    for name, ((plain, in_bytes), expected) in found.items():
        assert plain.shape == expected.shape and in_bytes[1].shape == (rows, 2)
        tolerance = 1e-5 if dtype == torch.float32 else 1 / 128
        span = (expected.amax(1, keepdim=True) - expected.amin(1, keepdim=True)).clamp(min=1)
        # A row of one value has no deviation for LayerNorm to divide by.
        if not (name == "norm" and n == 1):
            assert torch.all((plain.double() - expected).abs() <= tolerance * (expected.abs() + span)), name
            assert torch.all((values_of(in_bytes, n) - expected).abs() <= span * 0.01 + 0.03), name
    alone, nothing = linear8(kernels, layer, quantized, wanted="values")
    assert torch.equal(alone, found["bias"][0][0])
    assert len(nothing[0]) == 0
    torch.set_num_threads(3)
    by_three, _ = linear8(kernels, layer, quantize(kernels, x))
    torch.set_num_threads(1)
    assert torch.equal(by_three, alone)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(linear8(kernels, layer, quantize(kernels, x[row : row + 1]))[0], alone[row : row + 1])


def build(layers: int = 3) -> SequenceClassifier:
    torch.manual_seed(0)
    model = SequenceClassifier(EncoderShape(200, 64, layers, 4, 131, 48), 3).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        is_gamma = "norm" in name and name.endswith("weight")
        parameter.normal_(float(is_gamma), 1.0 / 8 if parameter.dim() > 1 else 0.3)
    return model


def prediction(model: nn.Module, batch_tokens: int = 4096) -> torch.Tensor:
    """Return probabilities for 200 random texts."""
    ids, lengths = random_texts(torch.randint(3, 42, (200,), generator=torch.Generator().manual_seed(3)))
    return torch.from_numpy(predict(model, TASK, ids.int().numpy(), lengths.numpy(), batch_tokens, CPU))


def answer_in(dtype: torch.dtype, near_tie: float, layers: int = 3) -> torch.Tensor:
    return prediction(Int8Classifier(build(layers), int8_kernels(dtype), int8_kernels(), TASK, near_tie))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_answers_as_the_plain_one(dtype: torch.dtype, layers: int) -> None:
    """Measured by how much the texts' predictions differ, which on random weights is little; whatever the batches."""
    expected = prediction(build(layers))
    model = Int8Classifier(build(layers), int8_kernels(dtype), int8_kernels(), TASK)
    assert torch.allclose(prediction(model), prediction(model, batch_tokens=60), atol=1e-6)
    for near_tie, allowed in ((0.0, 0.15), (math.inf, 0.01)):
        error, spread = (answer_in(dtype, near_tie, layers) - expected).std(0), expected.std(0)
        assert torch.all(error < allowed * spread), (near_tie, error, spread)


def test_only_near_ties_are_computed_in_16_bits() -> None:
    in_8_bits, in_16_bits = (answer_in(torch.bfloat16, near_tie) for near_tie in (0.0, math.inf))
    best, second = in_8_bits.log().topk(2).values.unbind(1)
    near_tie = float((best - second).sort().values[99:101].mean())  # between two texts
    is_near = best - second < near_tie
    found = answer_in(torch.bfloat16, near_tie)
    assert torch.equal(found[~is_near], in_8_bits[~is_near])
    assert torch.allclose(found[is_near], in_16_bits[is_near], atol=1e-6)
    assert not torch.equal(in_8_bits[is_near], in_16_bits[is_near])


@pytest.mark.parametrize(("n", "k", "rows"), SIZES)
def test_16_bits_lose_almost_nothing(n: int, k: int, rows: int) -> None:
    """Against float64; a row and a channel with values of different sizes, threads, neighbours change nothing."""
    fp32 = int8_kernels()
    torch.manual_seed(n)
    weight, bias, x = torch.randn(n, k), torch.randn(n), torch.randn(rows, k)
    weight[0] *= 1e-3
    x[:1] *= 1e3
    layer = int16_linear(weight, bias)
    found = linear16(fp32, layer, x)
    size = x.double().abs().amax(1, keepdim=True) * weight.double().abs().amax(1) * math.sqrt(k)
    error = found.double() - F.linear(x.double(), weight.double(), bias.double())
    assert torch.all(error.abs() < size * 2**-14 + 1e-6)
    torch.set_num_threads(3)
    last, by_three = linear16(fp32, layer, x[-1:]), linear16(fp32, layer, x)
    torch.set_num_threads(1)
    assert torch.equal(last, found[-1:]) and torch.equal(by_three, found)


@needs_small_encoder
def test_loading_leaves_no_fp32_weights_in_memory() -> None:
    """The small encoder has 117.6 M parameters: 470 MB in fp32."""
    int8_kernels()
    assert int(printed_by(ROOT, sys.executable, "-c", LOADED, SMALL_ENCODER)) < 470e6 / 2


def test_without_the_instructions_it_is_said_once(model: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(engines, "int8_engine", lambda *_: None)
    loaded = predictor.Classifier.load(model, "int8", "cpu")
    said = capsys.readouterr().err
    assert loaded.precision in ("bf16", "fp32")
    assert said.startswith("warning: int8 needs a CPU with AVX512-VNNI")
    assert said.count("\n") == 1
    logits = loaded.module(torch.tensor([0, 5, 2]), torch.tensor([3]))
    assert math.isfinite(float(logits.float().sum()))
