"""Waiting until a service says that it is serving."""

import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from modelfleet.client.channel import open_channel
from modelfleet.runtime.errors import DeadlineExpiredError

_POLL_S = 0.2


def wait_until_healthy(target: str, deadline: float) -> None:
    """Return once `target` is SERVING. Raises DeadlineExpiredError, with its last answer, at a time of `monotonic`."""
    with open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        last = "it does not answer"
        while time.monotonic() < deadline:
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
            except grpc.RpcError as error:
                last = str(error)
            else:
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = f"it says {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}"
            time.sleep(_POLL_S)
    raise DeadlineExpiredError(f"{target} is not healthy: {last}.")
