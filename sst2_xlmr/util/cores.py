"""The cores that this process may use, and how its threads wait for one another."""

import contextlib
import math
import os
import statistics
import time
from pathlib import Path

BUSY = 0.3  # other running threads per core from which the machine counts as busy
LOADS, SECONDS_BETWEEN = 9, 0.002  # number of counts, of which the median is taken, and the time between them


def yield_busy_cores(load: Path = Path("/proc/loadavg")) -> None:
    """On a busy machine, let waiting OpenMP threads sleep at once; otherwise they spin first, which is faster.

    On busy cores, a spinning thread occupies the core that the thread it waits for needs. Call this before torch is
    imported, as libgomp reads the variable when it is loaded. The user's own settings win.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return
    others = []  # threads that run or wait for a core; the load average would include processes that have just ended
    with contextlib.suppress(OSError, IndexError, ValueError):  # without Linux's /proc
        for _ in range(LOADS):
            others.append(int(load.read_text().split()[3].partition("/")[0]) - 1)
            time.sleep(SECONDS_BETWEEN)
    if len(others) == LOADS and statistics.median(others) > BUSY * (os.cpu_count() or 1):
        os.environ["GOMP_SPINCOUNT"] = "0"


def limit_threads() -> None:
    """Before torch is imported, limit its threads to the container's or SLURM job's cores, unless the user has."""
    if (cores := available_cores()) < len(os.sched_getaffinity(0)):  # OpenMP itself knows only the affinity
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores in the process's affinity, limited by the SLURM job and the container."""
    limits, given = [len(os.sched_getaffinity(0))], os.environ.get("SLURM_CPUS_ON_NODE", "")
    limits += [int(given)] if given.isdecimal() else []
    places: list[list[str]] = []  # of its cgroups, version 1 (with controllers) or 2
    with contextlib.suppress(OSError, ValueError):
        places = [line.split(":", 2)[1:] for line in own.read_text().splitlines() if line.count(":") > 1]
    # A container's limit is the lowest CPU quota (`docker run --cpus=2`), rounded up, of its cgroup and those above it.
    for controllers, place in places:
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = cgroups / (controllers and "cpu")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for part in [Path(place), *Path(place).parents]:
            with contextlib.suppress(OSError, ValueError):  # not there, or `max`
                words = [(folder / part.relative_to("/") / name).read_text() for name in names]
                quota, period = map(float, " ".join(words).split())
                if quota > 0:
                    limits.append(math.ceil(quota / period))
    return max(1, min(limits))
