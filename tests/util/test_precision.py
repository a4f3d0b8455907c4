"""Precision by device, and determinism; GPUs are pretended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import user_error

from sst2_xlmr.util.precision import choose_precision, set_up_numerics

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _undo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_auto_is_bf16_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("bf16", CUDA) == "bf16"


def test_tf32_on_a_cpu_is_refused(
    run_train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = user_error(lambda: run_train(tmp_path / "run", "--precision", "tf32"), capsys)
    assert "--precision tf32 is for CUDA" in line


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "highest"), ("tf32", "high")])
def test_products_of_fp32_are_rounded_only_on_request(precision: str, expected: str) -> None:
    set_up_numerics(precision, False, CUDA)
    assert torch.get_float32_matmul_precision() == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_asks_torch_and_cublas() -> None:
    set_up_numerics("bf16", True, CUDA)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
