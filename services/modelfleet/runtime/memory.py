"""How much memory this process has and may have: its container's limit, not the node's size."""

import ctypes
import resource
from pathlib import Path

# https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# https://man7.org/linux/man-pages/man5/proc_pid_statm.5.html, proc_pid_status.5.html, proc_pid_clear_refs.5.html
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def available_memory() -> int:
    """Return the bytes that the cgroup allows this process, or those of the machine where it sets no limit."""
    machine = _field(Path("/proc/meminfo"), "MemTotal")
    for path in _CGROUP_LIMITS:
        try:
            return min(machine, int(path.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return machine


def resident_memory() -> int:
    """Return the bytes that this process has in memory."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory since `reset_peak_memory`."""
    return _field(_STATUS, "VmHWM")


def reset_peak_memory() -> None:
    """Forget the peak. Where the kernel forbids that, peaks are those since the start of the process."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; musl has none and needs none
    if trim:
        trim(0)


def _field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
