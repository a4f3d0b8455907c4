"""How a device computes: the precision, and whether a repetition gives the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sst2_xlmr.util.errors import UserError

_FIRST_WITH_BF16 = (8, 0)  # compute capability; torch.cuda.is_bf16_supported() also counts GPUs that emulate it


def choose_precision(name: str, device: torch.device) -> str:
    """Turn `--precision` into bf16, fp32 or tf32 (not on a CPU): auto is bf16 where the hardware multiplies it."""
    if name == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is for CUDA; take fp32 on a CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= _FIRST_WITH_BF16 else "fp32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def set_up_numerics(precision: str, deterministic: bool, device: torch.device) -> None:
    """Set CUDA's precision, before its first product, and take slower kernels that repeat to the bit if asked to."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if deterministic:
        # As https://docs.nvidia.com/cuda/cublas/#results-reproducibility asks for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
