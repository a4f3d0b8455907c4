"""How many cores this process may use, and how its threads wait for one another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

BUSY = 0.3  # a core; mean load of the last minute from which on other work is on the cores
SPINS = "20000"  # of a thread that waits, before it sleeps; libgomp's own 300,000 are about a millisecond


def bound_spinning() -> None:
    """Let OpenMP's threads wait by sleeping where others use the cores, else after a short spin.

    A thread that spins keeps the one it waits for from its core. To be called before libgomp is loaded, which comes
    with torch; the user's own settings win.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        is_busy = os.getloadavg()[0] > BUSY * len(os.sched_getaffinity(0))
        os.environ["GOMP_SPINCOUNT"] = "0" if is_busy else SPINS


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
