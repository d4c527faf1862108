"""What every server can be told, from `MODELFLEET_*` environment variables and flags; flags win."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServerSettings(BaseSettings):
    """
    Settings of a gRPC server. Each service adds its own by inheritance.

    Times are in seconds, sizes in bytes.
    """

    model_config = SettingsConfigDict(
        env_prefix="MODELFLEET_",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    host: str = "0.0.0.0"  # noqa: S104  a server in a pod listens on all of the pod's addresses
    """Address to listen on."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the gRPC server; 0 picks a free one."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of Prometheus metrics; 0 picks a free one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged. `debug` logs every call."""
    max_message_bytes: int = Field(default=64 << 20, ge=1 << 20, lt=2**31)
    """Largest message taken or sent."""
    max_concurrent_calls: int = Field(default=1024, ge=1)
    """Calls under way at once; one more is answered RESOURCE_EXHAUSTED. Health checks are not counted."""
    max_connection_age_s: float = Field(default=300, gt=0)
    """Age at which connections are closed gracefully, so that clients find replicas that came later."""
    max_connection_age_grace_s: float = Field(default=60, gt=0)
    """How long calls on such a connection may still run."""
    keepalive_s: float = Field(default=30, gt=0)
    """Pause after which an idle connection is pinged."""
    drain_delay_s: float = Field(default=5, ge=0)
    """On SIGTERM: how long health says NOT_SERVING before new calls are refused, for clients to move away."""
    drain_timeout_s: float = Field(default=30, ge=0)
    """On SIGTERM: how long calls under way may take to finish after that."""
