"""A device's precision, and whether its results repeat bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sst2_xlmr.util.errors import UserError

_FIRST_WITH_BF16 = (8, 0)  # compute capability; torch.cuda.is_bf16_supported() also counts GPUs that emulate it


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve `--precision` to bf16, fp32 or tf32 (CUDA only); auto is bf16 if the hardware multiplies bf16."""
    if name == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is for CUDA; use fp32 on a CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= _FIRST_WITH_BF16 else "fp32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def set_up_numerics(precision: str, deterministic: bool, device: torch.device) -> None:
    """Set CUDA's precision, before the first product, and deterministic kernels (which are slower) on request."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if deterministic:
        # Required by https://docs.nvidia.com/cuda/cublas/#results-reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
