"""Channels to modelfleet services: every replica gets its share, sick ones get none, UNAVAILABLE is tried again."""

import json
from typing import Any

import grpc

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
MAX_METADATA_BYTES = 64 << 10

ATTEMPTS = 5
"""Of a caller's calls; gRPC allows no more."""
HOP_ATTEMPTS = 2
"""Of calls between services, whose callers try again as well: enough for a replica that dies to fail no call."""


def channel_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, *, attempts: int = ATTEMPTS
) -> list[tuple[str, Any]]:
    """
    Return the options of a channel; a target `dns:///name:port` balances over all addresses of the name.

    A call that fails with UNAVAILABLE is made up to `attempts` times, 1 to 5. Attempts at each hop multiply.
    """
    return [
        ("grpc.service_config", json.dumps(_service_config(attempts))),
        ("grpc.enable_retries", int(attempts > 1)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # A replica that comes back is found within a second, not after gRPC's default of up to two minutes. Names are
        # looked up when a connection ends, which servers see to every few seconds: see `max_connection_age_s`.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ]


def _service_config(attempts: int) -> dict[str, Any]:
    # Waits are 0.1 s, 0.2 s, 0.4 s, 0.8 s, each with 20% jitter, or what the server says in grpc-retry-pushback-ms.
    policy = {
        "maxAttempts": max(attempts, 2),
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        # Health is asked by the channel itself, for the overall service "": a replica that is not ready gets no calls
        # although its connection is fine. https://grpc.io/docs/guides/health-checking/
        "healthCheckConfig": {"serviceName": ""},
        "methodConfig": [{"name": [{}], "retryPolicy": policy}],
    }


def open_channel(target: str, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> grpc.Channel:
    """Open a channel for threads."""
    return grpc.insecure_channel(target, options=channel_options(max_message_bytes))


def open_async_channel(
    target: str, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, attempts: int = ATTEMPTS
) -> grpc.aio.Channel:
    """Open a channel for asyncio."""
    return grpc.aio.insecure_channel(target, options=channel_options(max_message_bytes, attempts=attempts))


def open_hop(target: str, *, max_message_bytes: int) -> grpc.aio.Channel:
    """Open a channel from one service to another."""
    return open_async_channel(target, max_message_bytes=max_message_bytes, attempts=HOP_ATTEMPTS)
