"""What every server can be told, from `MODELFLEET_*` environment variables and flags; flags win."""

import argparse
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

ENV_PREFIX = "MODELFLEET_"


class ServerSettings(BaseSettings):
    """
    Settings of a gRPC server. Each service adds its own by inheritance.

    Times are in seconds, sizes in bytes.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    host: str = "0.0.0.0"  # noqa: S104  a server in a pod listens on all of the pod's addresses
    """Address to listen on. `0.0.0.0` and `::` both mean all addresses, IPv4 and IPv6."""
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
    max_metadata_bytes: int = Field(default=64 << 10, ge=8 << 10, lt=2**31)
    """Largest metadata (headers) of a call."""
    max_connection_age_s: float = Field(default=8, gt=0)
    """Age at which a connection takes no new calls: its client looks names up and connects anew, which finds replicas
    that came later. Calls under way go on."""
    keepalive_s: float = Field(default=30, gt=0)
    """Pause after which an idle connection is pinged."""
    drain_delay_s: float = Field(default=5, ge=0)
    """On SIGTERM: how long new calls are still answered, for clients to find others. Health says NOT_SERVING for the
    last 2 s of it."""
    drain_timeout_s: float = Field(default=30, ge=0)
    """On SIGTERM: how long calls under way may take to finish after that."""


_Settings = TypeVar("_Settings", bound=BaseSettings)


def read_settings(
    cls: type[_Settings], prog: str, description: str, *, arguments: list[str] | None = None
) -> _Settings:
    """
    Return the settings of this process; `arguments` replaces the command line.

    Prints what is wrong with a value and exits with status 2. `--help` exits with 0.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"Each flag can be given in the environment instead: --log-level is {ENV_PREFIX}LOG_LEVEL. Flags win.",
    )
    # The type of its generic parameter is that of the parser, which argparse does not make generic.
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(cls, root_parser=parser)
    try:
        return cls(_cli_settings_source=source(args=True if arguments is None else arguments))
    except ValidationError as error:
        parser.error("; ".join(_explained(problem) for problem in error.errors(include_url=False)))


def _explained(problem: ErrorDetails) -> str:
    if not problem["loc"]:  # a check over several fields
        return problem["msg"]
    name = str(problem["loc"][0])
    flag = "--" + name.replace("_", "-")
    return f"{flag} (or {ENV_PREFIX}{name.upper()}) is {problem['input']!r}: {problem['msg']}"
