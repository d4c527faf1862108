"""What Prometheus sees of the way of a request."""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram

from modelfleet.runtime.telemetry import LATENCY_BUCKETS_S

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
    "modelfleet_session_bytes", "Growth of the process's resident memory while the session was loaded.", ["model"]
)


def observe_batch(model: str, lengths: Sequence[int], run_s: float) -> None:
    """Record a batch that ran."""
    STAGE_SECONDS.labels("run").observe(run_s)
    BATCH_ROWS.labels(model).observe(len(lengths))
    REAL_TOKENS.labels(model).inc(sum(lengths))
    PADDED_TOKENS.labels(model).inc(len(lengths) * max(lengths))


def forget_model(model: str) -> None:
    """Drop the series of an unloaded model version."""
    for metric in (BATCH_ROWS, REAL_TOKENS, PADDED_TOKENS, QUEUE_ROWS, SESSION_BYTES):
        metric.remove_by_labels({"model": model})
