"""Time and memory of a process. This file needs torch alone, so that it also runs in the peer's environment."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

import torch


def clock(on_cuda: bool) -> float:
    """Return the time in seconds, once the GPU has done what it was given."""
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(on_cuda: bool) -> dict[str, int]:
    """Return this process's peak memory; `ru_maxrss`, a fallback, begins with the peak of its parent."""
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        peak = {"peak_rss_bytes": int(match[1]) * 1024}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if on_cuda:
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak
