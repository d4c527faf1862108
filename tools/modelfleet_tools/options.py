"""Options that several commands share."""

from typing import Annotated, TypeAlias

import typer
from modelfleet.client.client import Client

InferenceOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--inference",
        envvar="MODELFLEET_INFERENCE",
        metavar="HOST:PORT",
        help="The inference service [localhost:8001].",
    ),
]
ManagerOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--manager", envvar="MODELFLEET_MANAGER", metavar="HOST:PORT", help="The manager [localhost:8003]."),
]
TimeoutOption: TypeAlias = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Longest wait for an answer.")
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Write one JSON document instead of a table.")]

DEFAULT_TIMEOUT_S = 30.0


def open_client(
    *, inference: str | None = None, manager: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Client:
    """Return a client of the services that the options name."""
    return Client(inference=inference, manager=manager, timeout_s=timeout_s)
