"""This process's memory: freed blocks are kept for the next step, and running out of memory is a UserError.

By default, glibc returns large freed blocks to the system, which costs XLM-R base 20,000 page faults per step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from sst2_xlmr.util.errors import UserError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory, and grow the heap in steps of 64 MiB."""
    if platform.libc_ver()[0] == "glibc":
        values = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
        values[_M_ARENA_MAX] = 1  # or every thread would keep blocks of its own
        for parameter, value in values.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def give_back_memory() -> None:
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
def memory_errors(cure: str) -> Iterator[None]:
    """Turn running out of GPU or CPU memory into a `UserError` of this rank, with the cure."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        where = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        text = f"{'CUDA out of memory' if on_gpu else 'out of memory'}{where}: {cure}"
        raise UserError(text, is_own=True) from error
