"""Precision by device, and determinism; GPUs are pretended."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sst2_xlmr.util.device import choose_precision, set_up_numerics

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _undo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_auto_is_bf16_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (choose_precision("auto", CUDA), choose_precision("bf16", CUDA)) == (expected, "bf16")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("precision", "expected"), [("fp32", "highest"), ("tf32", "high")])
def test_numerics_are_those_that_were_asked_for(precision: str, expected: str, deterministic: bool) -> None:
    set_up_numerics(precision, deterministic, CUDA)
    assert torch.get_float32_matmul_precision() == expected
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
