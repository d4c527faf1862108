"""How many CPUs this process may use: its container's limit, not the node's size."""

import math
import os
from pathlib import Path

_CGROUP_V2_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUP_V1_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def available_cpus() -> int:
    """Return the CPUs that affinity and the cgroup's quota leave, rounded up, at least 1."""
    affinity = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def _cgroup_quota() -> float | None:
    try:
        quota, period = _CGROUP_V2_LIMIT.read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = _CGROUP_V1_QUOTA.read_text(), _CGROUP_V1_PERIOD.read_text()
        except OSError:
            return None
    if quota.strip() in ("max", "-1"):
        return None
    return int(quota) / int(period)
