"""What Prometheus sees of generated text."""

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from modelfleet.inference.generation.sequences import Finish, Progress, Sequence
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.errors import DeadlineExpiredError, InvalidInputError
from modelfleet.runtime.telemetry import LATENCY_BUCKETS_S

FIRST_TOKEN_SECONDS = Histogram(
    "modelfleet_first_token_seconds",
    "Time from a request's arrival, tokenized, to its first token.",
    ["model"],
    buckets=LATENCY_BUCKETS_S,
)
TOKEN_SECONDS = Histogram(
    "modelfleet_token_seconds", "Time from a token to the next.", ["model"], buckets=LATENCY_BUCKETS_S
)
STREAMS = Gauge("modelfleet_streams", "Continuations under way (active) and those that wait.", ["model", "state"])
CACHE_TOKENS = Gauge(
    "modelfleet_cache_tokens", "Tokens that the cache is reserved for, and its limit.", ["model", "kind"]
)
TOKENS = Counter(
    "modelfleet_stream_tokens_total", "Tokens of prompts (in), not computed again (cached), generated (out).",
    ["model", "kind"],
)  # fmt: skip
FINISHED = Counter("modelfleet_streams_finished_total", "Continuations that ended, by why.", ["model", "reason"])
DETOKENIZE_STREAMS = Histogram(
    "modelfleet_detokenize_streams", "Streams that share a call to the tokenizer service.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)  # fmt: skip
DETOKENIZE_TOKENS = Histogram(
    "modelfleet_detokenize_tokens", "New tokens in a call to the tokenizer service.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)  # fmt: skip


class DecodingSeries:
    """
    The series of one model version, and its record; the worker's own sequences are left out.

    Series are looked up once: what a thread still observes after `forget` does not bring them back.
    """

    def __init__(
        self,
        model: str,
        record: ModelRecord,
        *,
        active: Callable[[], int],
        waiting: Callable[[], int],
        reserved: Callable[[], int],
        cache_tokens: int,
    ) -> None:
        self._model = model
        self._record = record
        self._first_token = FIRST_TOKEN_SECONDS.labels(model)
        self._token = TOKEN_SECONDS.labels(model)
        self._tokens_in = TOKENS.labels(model, "in")
        self._tokens_cached = TOKENS.labels(model, "cached")
        self._tokens_out = TOKENS.labels(model, "out")
        self._watch(active, waiting, reserved)
        CACHE_TOKENS.labels(model, "limit").set(cache_tokens)

    def observe(self, one: Sequence, progress: Progress, now: float) -> None:
        """Count what a step brought a continuation, or how it ended; `now` is on the monotonic clock."""
        if one.probe:
            return
        if progress.token_ids:
            if one.generated == 0:
                one.first_token = now
                self._first_token.observe(now - one.arrival)
                self._tokens_in.inc(len(one.prompt))
            else:
                self._token.observe(now - one.last_token)
            one.last_token = now
            self._tokens_out.inc(len(progress.token_ids))
        if progress.error:
            fault = not isinstance(progress.error, InvalidInputError | DeadlineExpiredError)
            self._record.failure(now - one.arrival, fault=fault)
            self.finished(progress.error.reason.value)
        elif progress.finish:
            self._tokens_cached.inc(progress.cached_prompt_tokens)
            self.finished(progress.finish.value)
            if progress.finish is Finish.CANCELLED:
                return  # says nothing of the version
            # The time to the first token is what one version's may be compared with another's; the rest is as long as
            # the text.
            first_s = (one.first_token or now) - one.arrival
            self._record.request(
                1, total_s=first_s, queue_s=0, collate_s=0, run_s=now - one.arrival - first_s, reduce_s=0
            )

    def finished(self, reason: str) -> None:
        """Count the end of a continuation."""
        FINISHED.labels(self._model, reason).inc()

    def forget(self) -> None:
        """Drop the series of a model version that is no longer here."""
        # The library's gauges are cycles of references: they would keep what they watch until the garbage is collected.
        self._watch(int, int, int)
        for metric in (FIRST_TOKEN_SECONDS, TOKEN_SECONDS, STREAMS, CACHE_TOKENS, TOKENS, FINISHED):
            metric.remove_by_labels({"model": self._model})

    def _watch(self, active: Callable[[], int], waiting: Callable[[], int], reserved: Callable[[], int]) -> None:
        STREAMS.labels(self._model, "active").set_function(active)
        STREAMS.labels(self._model, "waiting").set_function(waiting)
        CACHE_TOKENS.labels(self._model, "reserved").set_function(reserved)
