"""What check_gpu.py proves: on a GPU training gives what it gives on a CPU, again and again.

Every check is a function that returns its figures, and raises AssertionError if they are not as they must be. They also
run on a CPU, against itself, which is how the tests keep them working where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import Answer
from runs import ROOT
from worker import Spec, TrainingRun

from sst2_xlmr.engines.cuda.adamw import why_not_compiled
from sst2_xlmr.training.step import forward_backward
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.files import digest_of
from sst2_xlmr.util.precision import set_up_numerics

PARITY_STEPS, CURVE_STEPS, RESUME_STEPS = 30, 100, 20
LENGTHS = (16, 64, 128, 256, 512)  # tokens, for repetitions


class Trained(NamedTuple):
    """What some steps of training have left.

    Attributes:
        losses: mean of every step's batch.
        gradients, weights: fp32 on the CPU, by name; gradients of the first step, weights after the last.
        change: norm of what training has changed, over all weights.
    """

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    change: float


def build(spec: Spec, device: torch.device, **options: Any) -> TrainingRun:
    """Return a run with some options changed; two runs have the same weights at first, on any device."""
    config = dataclasses.replace(spec.config, device=device.type, **options)
    return TrainingRun(spec._replace(config=config), World.alone(device))


def train(run: TrainingRun, steps: int) -> Trained:
    """Train for some steps at a constant rate."""
    before = {slot.name: slot.master().clone() for slot in run.optimizer.slots}
    losses: list[torch.Tensor] = []
    gradients: dict[str, torch.Tensor] = {}
    for batch in itertools.islice(run.loaders["timed"].starting_at(0, 0), steps):
        sums = forward_backward(run.model, batch, run.loss, run.optimizer, run.world)
        if not gradients:
            gradients = {
                name: parameter.grad.float().cpu()
                for name, parameter in run.classifier.named_parameters()
                if parameter.grad is not None
            }
        run.optimizer.step(run.config.lr, run.optimizer.gradient_norm())
        losses.append(sums["loss"] / batch.global_rows)
    after = {slot.name: slot.master() for slot in run.optimizer.slots}
    change = float(torch.stack([(after[name] - before[name]).norm() for name in after]).norm())
    return Trained(torch.stack(losses).tolist(), gradients, {name: after[name].cpu() for name in after}, change)


def distance(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference over all tensors."""
    return float(torch.stack([(ours[name] - reference[name]).norm() for name in reference]).norm())


def check_parity(spec: Spec, device: torch.device) -> Answer:
    """Loss, gradients and weights are a CPU's, in fp32 over 30 steps without dropout."""
    options: Answer = {"precision": "fp32", "dropout": 0.0, "head_dropout": 0.0}
    ours = train(build(spec, device, **options), PARITY_STEPS)
    theirs = train(build(spec, torch.device("cpu"), compile=False, **options), PARITY_STEPS)
    zero = {name: torch.zeros_like(tensor) for name, tensor in theirs.gradients.items()}
    figures = {
        "loss_relative": max(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses)),
        "gradient_relative": distance(ours.gradients, theirs.gradients) / distance(zero, theirs.gradients),
        "weights_of_change": distance(ours.weights, theirs.weights) / theirs.change,
    }
    assert figures["loss_relative"] < 1e-4, figures
    assert figures["gradient_relative"] < 1e-4, figures
    assert figures["weights_of_change"] < 0.02, figures
    return figures


def check_bf16(spec: Spec, device: torch.device) -> Answer:
    """bf16 with fp32 master weights learns as fp32 does, over 100 steps."""
    options: Answer = {"dropout": 0.0, "head_dropout": 0.0}
    curves = {
        precision: train(build(spec, device, precision=precision, **options), CURVE_STEPS).losses
        for precision in ("fp32", "bf16")
    }
    difference = np.subtract(curves["bf16"], curves["fp32"])
    learned = float(np.mean(curves["fp32"][:10]) - np.mean(curves["fp32"][-10:]))
    figures = {"mean_difference": float(difference.mean()), "learned": learned}
    assert abs(figures["mean_difference"]) < 0.02, figures
    return figures


def check_update(device: torch.device) -> Answer:
    """The optimizer's update compiles on the device, and gives what it gives without being compiled."""
    reasons = {precision: why_not_compiled(device, precision == "bf16") for precision in ("fp32", "bf16")}
    assert not any(reasons.values()), reasons
    return {"compiled": sorted(reasons)}


def check_no_waiting(spec: Spec, device: torch.device) -> Answer:
    """The host never waits for the GPU within a step."""
    run = build(spec, device)
    steps = run.loaders["timed"].starting_at(0, 0)
    for batch in itertools.islice(steps, 3):
        run.make_step(batch, lambda _: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in itertools.islice(steps, 5):
            run.make_step(batch, lambda _: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits_per_step": 0}


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    set_up_numerics("bf16", True, device)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def repeats(run: TrainingRun, length: int, rows: int) -> bool:
    """Whether logits and gradients of a padded batch have the same bits twice."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(4, len(run.spec.kept_ids), (rows, length), generator=generator)
    for row in range(1, rows):
        tokens[row, int(torch.randint(2, length + 1, (1,), generator=generator)) :] = 1
    tokens = tokens.to(run.world.device)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        run.classifier.zero_grad(set_to_none=True)
        logits = run.classifier(tokens)
        logits.float().square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in run.classifier.parameters() if p.grad is not None)])
    return all(torch.equal(a, b) for a, b in zip(*found))


def check_repetition(spec: Spec, device: torch.device) -> Answer:
    """With `--deterministic` a repetition has the same bits at every length; without, this tells at which."""
    lengths = [length for length in LENGTHS if length <= spec.shape.positions - 2]
    run = build(spec, device, precision="bf16")
    figures: Answer = {"plain": {str(length): repeats(run, length, rows=32) for length in lengths}}
    with deterministic(device):
        figures["deterministic"] = {str(length): repeats(run, length, rows=32) for length in lengths}
    assert all(figures["deterministic"].values()), figures
    return figures


def run_train(*options: object) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def check_resume(encoder: Path, data: Path, folder: Path, device: torch.device) -> Answer:
    """A run that train.py resumes in its middle leaves the same bits as it did without the interruption."""
    figures: Answer = {}
    for precision in ("fp32", "bf16"):
        run = folder / precision
        options = ["--encoder", encoder, "--data-dir", data, "--device", device.type, "--precision", precision]
        options += ["--max-steps", RESUME_STEPS, "--save-every", RESUME_STEPS // 2, "--batch-size", 8, "--log-every", 5]
        run_train(*options, "--deterministic", "--max-length", 64, "--output-dir", run)
        whole = digest_of(run / "model" / "model.safetensors")
        for name in ("model", "best", f"checkpoints/step-{RESUME_STEPS:08}"):
            shutil.rmtree(run / name)
        run_train("--resume", "--output-dir", run)
        resumed = digest_of(run / "model" / "model.safetensors")
        figures[precision] = {"equal": whole == resumed, "sha256": whole[:16]}
    assert all(figure["equal"] for figure in figures.values()), figures
    return figures
