"""How many processor cores this process may really use, and its share of them among the ranks of a host."""

import os
from collections.abc import Sequence
from pathlib import Path


def core_quota() -> float:
    """Cores' worth of time that the control groups above this process allow; infinite without a limit."""
    quota = float("inf")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return quota
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
        elif "cpu" in controllers.split(","):
            root = Path("/sys/fs/cgroup/cpu")
        else:
            continue
        # A limit may stand at any level; in a container the path may be the host's, so that only the root is seen.
        folder = root / path.lstrip("/")
        while True:
            quota = min(quota, _quota_in(folder))
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return quota


def _quota_in(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():  # version 2: "quota period" in microseconds, or "max period"
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
        return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def share_of_cores(mine: Sequence[int], of_all_ranks: Sequence[Sequence[int]]) -> int:
    """Whole cores for one of several ranks on a host.

    A core that several ranks may run on is divided among them, so it does not matter whether the launcher has
    bound each rank to cores of its own.

    Args:
        mine: the cores this rank may run on, as ``os.sched_getaffinity`` gives them.
        of_all_ranks: the same of every rank on this host, this one included.

    Returns:
        At least 1.
    """
    share = sum(1 / sum(core in cores for cores in of_all_ranks) for core in mine)
    share = min(share, core_quota() / len(of_all_ranks))
    return max(1, int(share + 1e-6))


def usable_cores() -> int:
    """Whole cores for this process alone: what its affinity and its control groups allow, at least 1."""
    mine = sorted(os.sched_getaffinity(0))
    return share_of_cores(mine, [mine])
