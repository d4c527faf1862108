"""What Prometheus sees of the way of a request."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

from prometheus_client import Counter, Gauge, Histogram

from modelfleet.inference.memory_budget import SessionMemory
from modelfleet.runtime.errors import ModelfleetError
from modelfleet.runtime.telemetry import LATENCY_BUCKETS_S
from modelfleet.runtime.tracing import record_stage

STAGE_SECONDS = Histogram(
    "modelfleet_stage_seconds",
    "Time of a request in a stage: tokenize, queue, run (of the batch it was in), postprocess.",
    ["stage"],
    buckets=LATENCY_BUCKETS_S,
)
BATCH_ROWS = Histogram(
    "modelfleet_batch_rows", "Rows in a batch.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
REAL_TOKENS = Counter("modelfleet_tokens_total", "Tokens run, padding not counted.", ["model"])
PADDED_TOKENS = Counter("modelfleet_padded_tokens_total", "Tokens run, padding counted.", ["model"])
QUEUE_ROWS = Gauge("modelfleet_queue_rows", "Rows that wait for the engine.", ["model"])
VERSION_STATE = Gauge("modelfleet_version_state", "1 for the state that a model version is in.", ["model", "state"])
SESSION_BYTES = Gauge(
    "modelfleet_session_bytes",
    "Memory of a version: host and device when it was loaded; host_peak and device_peak on top, at the largest batch.",
    ["model", "part"],
)
FAILED_ROWS = Counter("modelfleet_failed_rows_total", "Rows without an answer, by why.", ["model", "reason"])
CANARIES = Counter("modelfleet_canaries_total", "Requests of the worker's own, by outcome.", ["outcome"])


class ModelSeries:
    """
    The series of one model version's batches.

    They are looked up once: what a thread still observes after `forget_model` does not bring them back.
    """

    def __init__(self, model: str, queue_rows: Callable[[], int]) -> None:
        self._run_seconds = STAGE_SECONDS.labels("run")
        self._batch_rows = BATCH_ROWS.labels(model)
        self._real_tokens = REAL_TOKENS.labels(model)
        self._padded_tokens = PADDED_TOKENS.labels(model)
        QUEUE_ROWS.labels(model).set_function(queue_rows)

    def observe_batch(self, lengths: Sequence[int], run_s: float) -> None:
        """Record a batch that ran."""
        self._run_seconds.observe(run_s)
        self._batch_rows.observe(len(lengths))
        self._real_tokens.inc(sum(lengths))
        self._padded_tokens.inc(len(lengths) * max(lengths))


def observe_tokenizing(started: float) -> None:
    """Record, in the task of a request, that its texts have been tokenized since `started` on the monotonic clock."""
    ended = time.monotonic()
    STAGE_SECONDS.labels("tokenize").observe(ended - started)
    record_stage("tokenize", started, ended)


def count_failed_rows(model: str, errors: Iterable[ModelfleetError]) -> None:
    """Count rows that have no answer."""
    for error in errors:
        FAILED_ROWS.labels(model, error.reason.value).inc()


def observe_memory(model: str, memory: SessionMemory) -> None:
    """Record what a version takes."""
    for part in fields(memory):
        SESSION_BYTES.labels(model, part.name.removesuffix("_bytes")).set(getattr(memory, part.name))


def forget_model(model: str) -> None:
    """Drop the series of a model version that is no longer here."""
    for metric in (BATCH_ROWS, REAL_TOKENS, PADDED_TOKENS, QUEUE_ROWS, FAILED_ROWS, VERSION_STATE, SESSION_BYTES):
        metric.remove_by_labels({"model": model})
