"""A name server as a cluster has it: the names of headless Services, whose answers lag behind and are cached."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dnslib import QTYPE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer, UDPServer

_LAG_S = 1.0
"""From a change of a pod to an answer that knows of it: the endpoint controller and the name server's watch."""
_TTL_S = 5
"""How long the name server gives the same answer, and says that it holds: CoreDNS's default for Services."""


class ClusterDns(BaseResolver):  # type: ignore[misc]  # ships no hints
    """Answers with the ready addresses of each name as of a while ago; `looked_up` counts questions by name."""

    def __init__(self) -> None:
        self._records: dict[str, list[tuple[float, tuple[str, ...]]]] = {}
        self._cached: dict[str, tuple[float, tuple[str, ...]]] = {}
        self.looked_up: dict[str, int] = {}
        self.port = 0

    def target(self, name: str, port: int) -> str:
        """Return what a client is told in place of `dns:///name:port`."""
        return f"dns://127.0.0.1:{self.port}/{name}:{port}"

    def publish(self, name: str, addresses: tuple[str, ...]) -> None:
        """Change which addresses are ready. A name's first addresses are known at once."""
        since = time.monotonic() if name in self._records else -_LAG_S
        self._records.setdefault(name, []).append((since, addresses))

    def resolve(self, request: DNSRecord, _handler: object) -> DNSRecord:
        """Answer one question."""
        name = str(request.q.qname).rstrip(".")
        reply = request.reply()
        if request.q.qtype == QTYPE.A:
            self.looked_up[name] = self.looked_up.get(name, 0) + 1
            for address in self._answer(name):
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=_TTL_S))
        return reply

    def _answer(self, name: str) -> tuple[str, ...]:
        now = time.monotonic()
        expiry, addresses = self._cached.get(name, (now, ()))
        if now >= expiry:
            known = [addresses for since, addresses in self._records[name] if since + _LAG_S <= now]
            addresses = known[-1] if known else ()
            self._cached[name] = (now + _TTL_S, addresses)
        return addresses


@contextmanager
def running_dns() -> Iterator[ClusterDns]:
    """Answer on a free port of loopback until the block ends."""
    resolver = ClusterDns()
    server = DNSServer(resolver, address="127.0.0.1", port=0, server=UDPServer, logger=DNSLogger("error"))
    resolver.port = server.server.server_address[1]
    server.start_thread()
    try:
        yield resolver
    finally:
        server.stop()
        server.server.server_close()
