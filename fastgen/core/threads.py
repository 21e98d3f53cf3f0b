"""How many CPU threads a run may use, and whether it gets them."""

import math
import os
import time
from pathlib import Path

from fastgen.core.errors import warn

__all__ = ["CpuShare", "allowed_cpus", "threads_per_process"]

CGROUPS = Path("/sys/fs/cgroup")


def allowed_cpus(cgroups: Path = CGROUPS) -> int:
    """CPUs that this process may keep busy: its affinity, cut by the container's quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota = _quota(cgroups)
    return max(1, cpus if quota is None else min(cpus, math.floor(quota + 1e-6)))


def _quota(cgroups: Path) -> float | None:
    """CPUs that the control group allows, version 2 or 1; None without a limit."""
    try:
        if (cgroups / "cpu.max").is_file():
            limit, period = (cgroups / "cpu.max").read_text().split()
        else:
            limit = (cgroups / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroups / "cpu/cpu.cfs_period_us").read_text().strip()
        return float(limit) / float(period) if limit not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def threads_per_process(wanted: int, default: int, cgroups: Path = CGROUPS) -> int:
    """Threads for one process.

    wanted: the user's number, 0 if none is set; default: PyTorch's own, one a physical core. Without a number
    the default is cut to the allowed CPUs, shared by the processes of this machine (LOCAL_WORLD_SIZE): more
    threads than CPUs wait for each other in every operation. OMP_NUM_THREADS, where set, is left as it is.
    """
    if wanted:
        return wanted
    if os.environ.get("OMP_NUM_THREADS"):
        return default
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(default, allowed_cpus(cgroups) // processes))


class CpuShare:
    """Watches how much CPU time the calling thread gets, and warns once when it is little."""

    LITTLE, SECONDS = 0.6, 10.0

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.thread_time()
        self.warned = False

    def since(self) -> float:
        """CPU seconds per second of the calling thread since the last call, between 0 and 1.

        A thread that computes all the time gets 1 on a free CPU, and 1/n where n busy threads share it.
        Waiting for a disk or an accelerator lowers it too, so it speaks only of computation on the CPU.
        """
        wall, cpu = time.monotonic(), time.thread_time()
        seconds, share = wall - self.wall, (cpu - self.cpu) / max(wall - self.wall, 1e-9)
        self.wall, self.cpu = wall, cpu
        share = min(max(share, 0.0), 1.0)
        if share < self.LITTLE and seconds >= self.SECONDS and not self.warned:
            self.warned = True
            warn(
                f"the CPU is shared: this run computed in {share:.0%} of the last {seconds:.0f} s, so it "
                "takes longer than it needs; stop other busy processes, or lower train.num_threads"
            )
        return share
