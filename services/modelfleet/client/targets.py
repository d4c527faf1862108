"""Where the services are."""

import os

from modelfleet.client.steps import Service

_DEFAULTS = {
    Service.INFERENCE: "localhost:8001",
    Service.TOKENIZER: "localhost:8002",
    Service.MANAGER: "localhost:8003",
}


def environment_variable(service: Service) -> str:
    """Return the name of the variable that says where a service is."""
    return f"MODELFLEET_{service.upper()}"


def targets(inference: str | None, tokenizer: str | None, manager: str | None) -> dict[Service, str]:
    """Return each service's gRPC target: the given one, else the environment's, else this machine."""
    given = {Service.INFERENCE: inference, Service.TOKENIZER: tokenizer, Service.MANAGER: manager}
    return {
        service: target or os.environ.get(environment_variable(service)) or _DEFAULTS[service]
        for service, target in given.items()
    }
