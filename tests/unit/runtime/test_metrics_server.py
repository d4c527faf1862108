import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from modelfleet.runtime.metrics_server import serve_metrics


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    return serve_metrics("127.0.0.1", 0)


def test_metrics_are_at_their_path(port: int) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{port}/metrics?name[]=modelfleet_rpc_in_flight", timeout=5
    ) as answer:
        assert answer.status == 200
        assert b"modelfleet_rpc_in_flight" in answer.read()


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics/", "/favicon.ico"])
def test_nothing_else_is_there(port: int, path: str) -> None:
    """A probe that was answered 200 would pass whatever the state of the service."""
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5)

    with refused.value as answer:
        assert b"Metrics are at /metrics; health is asked by gRPC" in answer.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_an_error_that_names_it(host: str) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Cannot serve metrics on {host}, port {port}: .*another process"):
            serve_metrics(host, port)
