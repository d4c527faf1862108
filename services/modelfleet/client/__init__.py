"""
Channels with balancing, retries and health; typed calls, numpy in and numpy out.

    from modelfleet.client import Client

    with Client() as client:
        vectors = client.embed("minilm", ["first text", "second text"]).vectors
"""

from modelfleet.client.async_client import AsyncClient
from modelfleet.client.client import Client

__all__ = ["AsyncClient", "Client"]
