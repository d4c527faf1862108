"""What a model version has done since it was READY: the figures that the Open Inference Protocol and reports give."""

import math
import threading
import time
from dataclasses import dataclass, field, fields

LATENCY_CLASSES = 18
"""Up to 1 ms, 2 ms, 4 ms, … 2^16 ms, and longer."""


@dataclass(slots=True)
class Duration:
    """How often something happened and how long it took in all, in seconds."""

    count: int = 0
    total_s: float = 0.0

    def add(self, elapsed_s: float) -> None:
        """Count one more."""
        self.count += 1
        self.total_s += elapsed_s


@dataclass(slots=True)
class BatchRecord:
    """Batches of one size."""

    collate: Duration = field(default_factory=Duration)
    run: Duration = field(default_factory=Duration)
    reduce: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class ModelRecord:
    """Counts of one model version. Written by the engine's threads, read by anyone."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    collate: Duration = field(default_factory=Duration)
    run: Duration = field(default_factory=Duration)
    reduce: Duration = field(default_factory=Duration)
    rows: int = 0
    faults: int = 0
    """Requests that failed through no fault of the caller."""
    latency_counts: list[int] = field(default_factory=lambda: [0] * LATENCY_CLASSES)
    """Requests by how long they took, failed ones too: entry i counts those up to 2^i ms, the last all longer ones."""
    last_ended: float = 0.0
    """Seconds since the epoch; 0 before the first request."""
    batches: dict[int, BatchRecord] = field(default_factory=dict)
    """By number of rows."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def resume(self, before: "ModelRecord") -> None:
        """Go on where the record of an earlier session of the version ended."""
        with self.lock:
            for part in fields(self):
                if part.name != "lock":
                    setattr(self, part.name, getattr(before, part.name))

    def batch(self, rows: int, *, collate_s: float, run_s: float, reduce_s: float) -> None:
        """Record a batch that ran."""
        with self.lock:
            batch = self.batches.setdefault(rows, BatchRecord())
            batch.collate.add(collate_s)
            batch.run.add(run_s)
            batch.reduce.add(reduce_s)

    def request(
        self, rows: int, *, total_s: float, queue_s: float, collate_s: float, run_s: float, reduce_s: float
    ) -> None:
        """Record a request that was answered; its stages are the sums over the batches that it was part of."""
        with self.lock:
            self.rows += rows
            self.success.add(total_s)
            self.queue.add(queue_s)
            self.collate.add(collate_s)
            self.run.add(run_s)
            self.reduce.add(reduce_s)
            self._ended(total_s)

    def failure(self, total_s: float, *, fault: bool) -> None:
        """Record a request that failed in the engine; `fault`: through no fault of the caller."""
        with self.lock:
            self.fail.add(total_s)
            self.faults += fault
            self._ended(total_s)

    def _ended(self, total_s: float) -> None:
        self.latency_counts[latency_class(total_s)] += 1
        self.last_ended = time.time()


def latency_class(elapsed_s: float) -> int:
    """Return the index of the entry of `latency_counts` that a duration falls into."""
    milliseconds = elapsed_s * 1000
    return min(math.ceil(math.log2(milliseconds)), LATENCY_CLASSES - 1) if milliseconds > 1 else 0
