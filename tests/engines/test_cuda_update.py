"""The optimizer's norm and update as a GPU would get them: how many operations, and whether they compile."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from sst2_xlmr.model.classifier import Classifier
from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.training.flat_engine import FlatEngine
from sst2_xlmr.training.optimizer import AdamW, Groups
from sst2_xlmr.util import versions

SST2_TABLE_ROWS = 9_370
VIEWS = {"view", "split", "slice", "select", "expand", "alias", "detach", "t", "unbind"}


class Count(TorchDispatchMode):
    """Counts the operations that compute something, as opposed to those that only give tensors another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def xlmr_base(bf16: bool, layerwise_lr_decay: float = 1.0) -> AdamW:
    """The optimizer of XLM-R base with SST-2's part of the vocabulary, and gradients; no memory is taken."""
    with torch.device("meta"):
        model = Classifier(EncoderShape(), 2, table_rows=SST2_TABLE_ROWS)
        optimizer = AdamW(model, Groups(12, 0.01, layerwise_lr_decay), 1.0, bf16)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
    optimizer.engine = FlatEngine(optimizer.trained)
    return optimizer


def operations(optimizer: AdamW) -> list[str]:
    """Return what one step calls on the device."""
    # The rates of a step come from the host, which a meta tensor cannot be combined with.
    with Count() as count, torch.device("meta"):
        optimizer.step(1e-5, optimizer.gradient_norm())
    return [name for name in count.names if name not in {"lift_fresh", "empty"}]


@pytest.mark.parametrize("bf16", [False, True])
def test_norm_and_update_of_xlmr_base_are_few_operations(bf16: bool) -> None:
    """Two groups: matrices, which decay, and vectors. A tensor at a time it took 611 launches."""
    called = operations(xlmr_base(bf16))
    assert len(called) <= 40, called


def test_layerwise_rates_cost_one_pass_a_group() -> None:
    """Embeddings, twelve layers and the head have rates of their own, with and without decay."""
    once = len(operations(xlmr_base(True)))
    a_pass = 16
    assert len(operations(xlmr_base(True, 0.9))) == once + (28 - 2) * a_pass


@pytest.mark.skipif(
    not versions.has_torchtext() or importlib.util.find_spec("triton") is None,
    reason=f"written for the internals of torch 2.3 with Triton; this is {versions.description()}",
)
def test_the_update_compiles_for_gpus_in_one_kernel(tmp_path: Path) -> None:
    """In bf16 from compute capability 8.0, the first that has it; in fp32 from 7.0."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    program = str(Path(__file__).with_name("fake_cuda.py"))
    done = subprocess.run(
        [sys.executable, program, str(tmp_path)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {name: result["kernels"] for name, result in results.items()} == {"fp32": 1, "bf16": 1}
    assert set(results["bf16"]["machine_code"]) == {"80", "90"}
    assert all(size > 1000 for result in results.values() for (size,) in result["machine_code"].values())
