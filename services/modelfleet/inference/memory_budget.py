"""What memory a worker may take, what a version takes of it, and whether another one fits."""

from dataclasses import dataclass
from typing import Self

from modelfleet.inference.device_memory import free_device_memory
from modelfleet.runtime.errors import InsufficientMemoryError
from modelfleet.runtime.memory import resident_memory

_MEGABYTE = 1_000_000
SMALLER_BATCHES = "run smaller batches (max_batch_tokens, or max_batch_rows in a tensor model's manifest)"
_HOST_REMEDY = f"Assign fewer versions to it, give it more memory (memory_bytes), or have it {SMALLER_BATCHES}."


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """Memory of a loaded version, in bytes; zeros where it is not known."""

    host_bytes: int = 0
    """Host memory that loading took: weights and what the session keeps."""
    host_peak_bytes: int = 0
    """Growth of host memory at the largest batch, beyond `host_bytes`."""
    device_bytes: int = 0
    """Device memory that loading took."""
    device_peak_bytes: int = 0
    """Growth of device memory at the largest batch, beyond `device_bytes`."""


@dataclass(frozen=True, slots=True)
class MemoryLeft:
    """Bytes that are free, of the host's budget and on the device; `device` is None where there is none to ask."""

    host: int
    device: int | None

    def since(self, before: Self) -> tuple[int, int]:
        """Return the bytes taken of the host and of the device since `before`, never negative."""
        device = 0 if self.device is None or before.device is None else before.device - self.device
        return max(0, before.host - self.host), max(0, device)


class MemoryBudget:
    """`host_bytes` bounds the process's resident memory. `device_id` is None where sessions run on the CPU."""

    def __init__(self, host_bytes: int, device_id: int | None) -> None:
        self._host_bytes = host_bytes
        self._device_id = device_id

    def left(self) -> MemoryLeft:
        """Return what is free now."""
        device = None if self._device_id is None else free_device_memory(self._device_id)
        return MemoryLeft(self._host_bytes - resident_memory(), device)

    def require(self, version: str, host_bytes: int, device_bytes: int, purpose: str) -> None:
        """Raise InsufficientMemoryError, with the figures, unless a version may take that much more."""
        left = self.left()
        if host_bytes > left.host:
            raise _refusal(
                f"{version} needs about {_shown(host_bytes)} of host memory {purpose}, and {_shown(left.host)} of "
                f"{_shown(self._host_bytes)} are left on this worker. {_HOST_REMEDY}",
                missing_host_bytes=host_bytes - left.host,
            )
        if left.device is not None and device_bytes > left.device:
            raise _refusal(
                f"{version} needs about {_shown(device_bytes)} of device memory {purpose}, and {_shown(left.device)} "
                f"are left. Assign fewer versions to this worker, or have it {SMALLER_BATCHES}.",
                missing_device_bytes=device_bytes - left.device,
            )

    def require_kept(self, version: str, when: str) -> None:
        """Raise InsufficientMemoryError, with the figures, if a version has taken more than there was."""
        left = self.left()
        if left.host < 0:
            raise _refusal(
                f"{version} does not fit: {when}, this worker takes {_shown(-left.host)} more than its "
                f"{_shown(self._host_bytes)} of host memory. {_HOST_REMEDY}",
                missing_host_bytes=-left.host,
            )


def _refusal(message: str, *, missing_host_bytes: int = 0, missing_device_bytes: int = 0) -> InsufficientMemoryError:
    refusal = InsufficientMemoryError(message)
    refusal.missing_host_bytes, refusal.missing_device_bytes = missing_host_bytes, missing_device_bytes
    return refusal


def _shown(count: int) -> str:
    return f"{max(0, count) / _MEGABYTE:.0f} MB"
