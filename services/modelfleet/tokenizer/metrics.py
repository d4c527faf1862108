"""What the tokenizer service counts, besides what every server does."""

import prometheus_client

from modelfleet.runtime.telemetry import LATENCY_BUCKETS_S

_COUNT_BUCKETS = tuple(4**power for power in range(11))  # to a million

ENCODE_SECONDS = prometheus_client.Histogram(
    "modelfleet_tokenizer_encode_seconds",
    "Time to encode the texts of one call, waiting for a thread included.",
    buckets=LATENCY_BUCKETS_S,
)
TEXTS = prometheus_client.Histogram(
    "modelfleet_tokenizer_texts", "Texts, or pairs of them, of one call.", buckets=_COUNT_BUCKETS
)
TOKENS = prometheus_client.Histogram(
    "modelfleet_tokenizer_tokens", "Tokens returned by one call, special tokens included.", buckets=_COUNT_BUCKETS
)
LOADS = prometheus_client.Counter(
    "modelfleet_tokenizer_loads_total", "Tokenizers brought into memory, by where they came from.", ["source"]
)
