"""AdamW against torch's, master weights, groups."""

from __future__ import annotations

import math

import pytest
import torch

from sst2_xlmr.engines.cpu.adamw import CpuEngine
from sst2_xlmr.engines.cpu.kernels import load_kernels
from sst2_xlmr.engines.cuda.adamw import compiled_engine, why_not_compiled
from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.training.flat_engine import Rates, scalars_of, update_flat
from sst2_xlmr.training.master_weights import join_master, split_master
from sst2_xlmr.training.optimizer import AdamW, Groups, lr_scale
from sst2_xlmr.util.distributed import World

SHAPE = EncoderShape(vocab_size=50, hidden=8, layers=2, heads=2, ffn=16, positions=20)
CPU = torch.device("cpu")


def model() -> Classifier:
    """Weights about as large as a pretrained model's."""
    torch.manual_seed(0)
    classifier = Classifier(SHAPE, 2)
    for parameter in classifier.parameters():
        parameter.data *= 0.1
    return classifier


def build(classifier: Classifier, bf16: bool = False, how: str = "kernels", max_grad_norm: float = 0.0) -> AdamW:
    """How: "eager", "compiled" (torch.compile, as on CUDA) or "kernels"."""
    kernels = load_kernels(torch.bfloat16 if bf16 else torch.float32)
    if (how == "kernels" and kernels is None) or (how == "compiled" and why_not_compiled(CPU, bf16)):
        pytest.skip("nothing compiles here")
    optimizer = AdamW(classifier, Groups(layers=2, weight_decay=0.1), max_grad_norm, bf16)
    if how == "kernels" and kernels is not None:
        optimizer.engine = CpuEngine(kernels, optimizer.trained, World.alone(CPU))
    elif how == "compiled":
        optimizer.engine = compiled_engine(optimizer.trained)
    return optimizer


def set_gradients(classifier: Classifier, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in classifier.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype)


@pytest.mark.parametrize("how", ["eager", "compiled", "kernels"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_equals_torchs_adamw(how: str, max_grad_norm: float) -> None:
    ours, theirs = model(), model()
    optimizer = build(ours, how=how, max_grad_norm=max_grad_norm)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
    for step in range(30):
        lr = 0.01 * (step + 1) / 30
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = optimizer.gradient_norm()
        optimizer.step(lr, norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or math.inf)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        torch.testing.assert_close(norm, expected)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["compiled", "kernels"])
def test_one_pass_equals_the_eager_way_in_bf16(how: str) -> None:
    ours, theirs = model(), model()
    optimizer, reference = build(ours, bf16=True, how=how), build(theirs, bf16=True, how="eager")
    for step in range(30):
        for classifier, chosen in ((ours, optimizer), (theirs, reference)):
            set_gradients(classifier, step)
            chosen.step(0.01, chosen.gradient_norm())
    for mine, other in zip(optimizer.slots, reference.slots):
        torch.testing.assert_close(mine.master(), other.master(), atol=3e-6, rtol=0)


def test_masters_are_split_and_joined_bit_for_bit() -> None:
    every_exponent = torch.arange(0, 2**31 - 2**24, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = torch.cat([every_exponent, -every_exponent, torch.tensor([0.0, 1.00390625, float("inf")])])
    weights, low = split_master(values)
    assert torch.equal(join_master(weights, low).view(torch.int32), values.view(torch.int32))
    is_finite = weights.float().isfinite() & (values.abs() > 1e-37)
    error = (weights.float() - values)[is_finite].abs() / values[is_finite].abs()
    assert float(error.max()) <= 2.0**-8  # half of the last of bf16's 8 bits


@pytest.mark.parametrize("how", ["eager", "kernels"])
def test_bf16_copies_follow_fp32_masters(how: str) -> None:
    """Steps far below bf16's resolution add up in the masters and reach the working copies."""
    classifier = model()
    optimizer = build(classifier, bf16=True, how=how)
    start = {slot.name: slot.master() for slot in optimizer.slots}
    for _ in range(100):
        for parameter in classifier.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4, optimizer.gradient_norm())
    for slot in optimizer.trained:
        assert slot.working.dtype == torch.bfloat16
        torch.testing.assert_close(slot.working.float(), slot.master(), atol=0, rtol=2.0**-8)
        decay = (1 - 1e-4 * slot.weight_decay) ** 100
        torch.testing.assert_close(slot.master(), start[slot.name] * decay - 0.01, atol=1e-4, rtol=0)


def test_micro_batches_add_up_in_fp32() -> None:
    """1 + 512 * 2^-9 is 2 in fp32; in bf16 every single addition would be lost."""
    classifier = model()
    optimizer = build(classifier, bf16=True)
    for number in range(513):
        for parameter in classifier.parameters():
            parameter.grad = torch.full_like(parameter, 2.0**-9 if number else 1.0)
        optimizer.accumulate()
    count = sum(parameter.numel() for parameter in classifier.parameters())
    norm = optimizer.gradient_norm()
    optimizer.step(1e-4, norm)
    torch.testing.assert_close(norm, torch.tensor(2.0 * math.sqrt(count)))
    assert all(not slot.accumulator.any() for slot in optimizer.trained if slot.accumulator is not None)


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert why_not_compiled(CPU, bf16=True) == "torch.compile: no C++ compiler"


def test_decay_of_rows_without_gradient_is_kept() -> None:
    classifier = model()
    optimizer = build(classifier)
    table = classifier.encoder.transformer.token_embedding.weight
    before = table.detach().clone()
    for step in range(5):
        set_gradients(classifier, step)
        assert table.grad is not None
        table.grad[10] = 0
        optimizer.step(0.1 * (step + 1), optimizer.gradient_norm())
    expected = math.prod(1 - 0.1 * (step + 1) * 0.1 for step in range(5))
    assert optimizer.table_decay == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(table[10], before[10] * optimizer.table_decay)


def test_decay_at_real_settings_adds_up() -> None:
    """Three epochs of SST-2 at 2e-5 and 0.01; a factor of 1 - 2e-7 in fp32 would decay 8 % too much."""
    weights = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 0.5
    before = weights.clone()
    zero = torch.zeros(10_000)
    scalars = torch.tensor([1.0, *scalars_of(Rates(2e-5, 2e-5 * 0.01), 1.0)])
    for _ in range(6315):
        update_flat(zero, zero, zero, weights, None, scalars)
    decay = 1 - (weights.double() / before.double()).mean()
    assert decay == pytest.approx(1 - (1 - 2e-7) ** 6315, rel=0.03)
    # Each weight's own rounding remains; one multiplication, as for compact tables, has none of it.
    torch.testing.assert_close(weights, before * (1 - 2e-7) ** 6315, rtol=4e-4, atol=0)


def test_layerwise_rates() -> None:
    scales = {name: lr_scale(name, 2, 0.5) for name, _ in model().named_parameters()}
    assert scales["head.dense.weight"] == 1.0
    assert scales["encoder.transformer.layers.layers.1.linear1.bias"] == 0.5
    assert scales["encoder.transformer.layers.layers.0.self_attn.in_proj_weight"] == 0.25
    assert scales["encoder.transformer.token_embedding.weight"] == 0.125
    assert scales["encoder.transformer.positional_embedding.embedding.weight"] == 0.125
    assert scales["encoder.transformer.embedding_layer_norm.weight"] == 0.125


def test_only_matrices_decay() -> None:
    for slot in build(model()).trained:
        assert (slot.weight_decay > 0) == (slot.name.endswith("weight") and "norm" not in slot.name)
