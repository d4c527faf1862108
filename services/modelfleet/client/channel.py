"""Channels to modelfleet services: every replica gets its share, sick ones get none, UNAVAILABLE is tried again."""

import json
from typing import Any

import grpc

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20

# Health is asked by the channel itself, for the overall service "": a replica that drains or is not ready gets no calls
# although its connection is fine. https://grpc.io/docs/guides/health-checking/
# Retries wait 0.1 s, 0.2 s, 0.4 s, 0.8 s, each with 20% jitter, or what the server says in grpc-retry-pushback-ms.
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)


def channel_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, *, retry: bool = True) -> list[tuple[str, Any]]:
    """
    Return the options of a channel; a target `dns:///name:port` balances over all addresses of the name.

    A service whose own callers retry passes `retry=False`: attempts at each hop would multiply.
    """
    return [
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.enable_retries", int(retry)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # A replica that comes back is found within a second, not after gRPC's default of up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ]


def open_channel(target: str, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> grpc.Channel:
    """Open a channel for threads."""
    return grpc.insecure_channel(target, options=channel_options(max_message_bytes))


def open_async_channel(
    target: str, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, retry: bool = True
) -> grpc.aio.Channel:
    """Open a channel for asyncio."""
    return grpc.aio.insecure_channel(target, options=channel_options(max_message_bytes, retry=retry))
