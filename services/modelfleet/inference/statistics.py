"""What a model version has done since it was loaded: the figures that the Open Inference Protocol reports."""

import threading
import time
from dataclasses import dataclass, field


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
    last_ended: float = 0.0
    """Seconds since the epoch; 0 before the first request."""
    batches: dict[int, BatchRecord] = field(default_factory=dict)
    """By number of rows."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

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
            self.last_ended = time.time()

    def failure(self, total_s: float) -> None:
        """Record a request that failed in the engine."""
        with self.lock:
            self.fail.add(total_s)
            self.last_ended = time.time()
