"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the cores of the process's affinity, but no more than SLURM's job and the container have.

    A container's CPU quota (`docker run --cpus=2`) is that of its cgroup and of all above it, rounded up.
    """
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    limits = [int(given)] if given.isdecimal() else []
    return max(1, min([len(os.sched_getaffinity(0)), *limits, *map(math.ceil, _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, that cgroups of version 1 or 2 have for this process."""
    try:
        places = [line.split(":", 2)[1:] for line in own.read_text().splitlines() if line.count(":") > 1]
    except (OSError, ValueError):
        return
    for controllers, place in places:
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = cgroups / (controllers and "cpu")
        for part in [Path(place), *Path(place).parents]:
            found = folder / part.relative_to("/")
            try:
                if controllers:
                    quota, period = ((found / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (found / "cpu.max").read_text().split()
                if float(quota) > 0:
                    yield float(quota) / float(period)
            except (OSError, ValueError):  # not there, or `max`
                continue
