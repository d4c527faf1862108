"""Prometheus' text format over HTTP, on a thread of its own: at `/metrics`, and nothing anywhere else."""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import prometheus_client

_PATH = "/metrics"
_ANY = ("0.0.0.0", "::")  # noqa: S104  compared, not listened on


class CannotListenError(OSError):
    """A port is taken, or an address is none of this machine's."""


_Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve_metrics(host: str, port: int) -> int:
    """
    Serve on `port` (0 for a free one); return the port. Raises CannotListenError.

    Where `host` stands for all addresses, these are IPv6 and IPv4, as gRPC has it for the server beside it.
    """
    try:
        listening = _listen(host, port)
    except OSError as error:
        raise CannotListenError(
            error.errno,
            f"Cannot serve metrics on {host}, port {port}: {error.strerror}. Is another process using the port?",
        ) from error
    server = _Server(listening)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_port)


def _listen(host: str, port: int) -> socket.socket:
    if host not in _ANY:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    try:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # a machine without IPv6, or a port that is taken, which the next line says
        return socket.create_server(("", port))


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        address = listening.getsockname()[:2]
        super().__init__(address, _SilentHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = address
        self.setup_environ()
        self.set_app(_metrics_at_their_path(prometheus_client.make_wsgi_app()))


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as in the base class
        """Log nothing: every scrape would be a line."""


def _metrics_at_their_path(metrics: _Wsgi) -> _Wsgi:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == _PATH:
            return metrics(environ, start_response)
        # A health check over HTTP that is answered 200 here would pass whatever the state of the service.
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        said = f"There is nothing at {path}. Metrics are at {_PATH}; health is asked by gRPC (grpc.health.v1).\n"
        return [said.encode()]

    return answer
