"""The CPUs that this process may use, by affinity and cgroup quota, and its priority."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, limited by the cgroup's quota, at least 1."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        cpus = os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _cgroup_quota())))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs granted by the cgroup (version 2, then 1), infinite without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    if quota.strip() in ("max", "-1"):
        return math.inf
    return int(quota) / int(period)


def lower_priority() -> None:
    """Let other processes go first, where the system has `nice`."""
    if hasattr(os, "nice"):
        os.nice(10)
