"""Choose device and precision; tune memory management; turn out-of-memory errors into UserError."""

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from sst2_xlmr.util.errors import UserError

_FIRST_WITH_BF16 = (8, 0)  # compute capability; torch.cuda.is_bf16_supported() also counts GPUs that emulate it
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def choose_device(name: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Resolve `--device` to this process's device; UserError without one, or with fewer GPUs than processes."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU on this machine; use --device cpu")
    if local_world_size > (count := torch.cuda.device_count()):
        problem = f"{local_world_size} processes need as many GPUs, but this node has {count}"
        raise UserError(f"{problem}; start torchrun with --nproc_per_node={count} or less")
    return torch.device("cuda", local_rank)


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
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        if deterministic:
            # Required by https://docs.nvidia.com/cuda/cublas/#results-reproducibility.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)


def tune_memory() -> None:
    """Make glibc's malloc keep freed memory, and grow the heap in steps of 64 MiB; collect garbage less often."""
    gc.set_threshold(10_000)  # with Python's default, garbage collection takes a third of reading and tokenizing
    if platform.libc_ver()[0] == "glibc":
        values = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
        values[_M_ARENA_MAX] = 1  # one arena: each thread's own would keep its freed blocks
        for parameter, value in values.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def trim_malloc() -> None:
    """Return the memory that malloc has kept to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def used_memory_gb() -> float:
    """Return this process's peak tensor memory on its GPU, or else its resident memory now, in 1e9 bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9


@contextlib.contextmanager
def memory_errors(fix: str) -> Iterator[None]:
    """Turn running out of GPU or CPU memory into a `UserError` of this rank, with the fix."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        where = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        raise UserError(f"{'CUDA ' * on_gpu}out of memory{where}: {fix}", on_this_rank=True) from error
