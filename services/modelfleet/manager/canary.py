"""The canary of a rollout: its steps and limits, and the judgement of what two versions did meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from modelfleet.manager.workers import Traffic

_QUANTILE = 0.99


@dataclass(frozen=True, slots=True)
class Canary:
    """Percent of the requests for the new version by step, and what it must keep to. A limit of None is none."""

    percents: tuple[int, ...]
    step_duration_s: float = 0.0
    min_requests: int = 100
    max_error_rate: float | None = None
    max_p99_s: float | None = None
    max_p99_ratio: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether the new version is judged at all."""
        return any(limit is not None for limit in (self.max_error_rate, self.max_p99_s, self.max_p99_ratio))

    def suffices(self, new: Traffic) -> bool:
        """Return whether the new version did enough in a step to let the step end by itself."""
        return not self.is_limited or new.request_count >= self.min_requests

    def verdict(self, old: Traffic, new: Traffic) -> str:
        """Return which limit the new version has passed and how, or nothing."""
        if new.request_count < self.min_requests:
            return ""
        rate = new.failure_count / new.request_count
        if self.max_error_rate is not None and rate > self.max_error_rate:
            return (
                f"The canary failed {new.failure_count} of {new.request_count} requests, {rate:.2%}; "
                f"max_error_rate is {self.max_error_rate:.2%}."
            )
        new_p99, old_p99 = p99_s(new), p99_s(old)
        if new_p99 is None:
            return ""
        if self.max_p99_s is not None and new_p99 > self.max_p99_s:
            return f"The canary's p99 is {_ms(new_p99)}; max_p99 is {_ms(self.max_p99_s)}."
        compares = self.max_p99_ratio is not None and old_p99 and old.request_count >= self.min_requests
        if compares and old_p99 and self.max_p99_ratio is not None and new_p99 > self.max_p99_ratio * old_p99:
            return (
                f"The canary's p99 is {_ms(new_p99)}, {new_p99 / old_p99:.2f} times the old version's "
                f"{_ms(old_p99)}; max_p99_ratio is {self.max_p99_ratio:g}."
            )
        return ""


def since(now: Traffic, before: Traffic) -> Traffic:
    """Return what was added between two reports of one worker; counts that fell began anew with a fresh session."""
    if now.request_count < before.request_count:
        return now
    return Traffic(
        now.request_count - before.request_count,
        max(0, now.failure_count - before.failure_count),
        tuple(max(0, a - b) for a, b in zip_longest(now.latency_counts, before.latency_counts, fillvalue=0)),
    )


def total(parts: Iterable[Traffic]) -> Traffic:
    """Return the sum over workers."""
    requests = failures = 0
    latencies: tuple[int, ...] = ()
    for part in parts:
        requests += part.request_count
        failures += part.failure_count
        latencies = tuple(a + b for a, b in zip_longest(latencies, part.latency_counts, fillvalue=0))
    return Traffic(requests, failures, latencies)


def p99_s(traffic: Traffic) -> float | None:
    """
    Return the 99th percentile of the latency in seconds, None without requests.

    As Prometheus' histogram_quantile does, requests are taken to be spread evenly within a bucket.
    """
    rank = _QUANTILE * sum(traffic.latency_counts)
    below = 0
    for index, count in enumerate(traffic.latency_counts):
        if count and below + count >= rank:
            lower = 2.0 ** (index - 1) if index else 0.0
            return (lower + (2.0**index - lower) * (rank - below) / count) / 1000
        below += count
    return None


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
