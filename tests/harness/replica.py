"""A process that answers, on the chassis, the calls between services with the last part of its address."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from modelfleet.api.inference.v1 import inference_pb2, inference_pb2_grpc
from modelfleet.api.manager.v1 import worker_service_pb2, worker_service_pb2_grpc
from modelfleet.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from modelfleet.runtime.server import Server, run, until_signalled
from modelfleet.runtime.settings import ServerSettings, read_settings


class Replica(
    inference_pb2_grpc.InferenceServiceServicer,
    tokenizer_pb2_grpc.TokenizerServiceServicer,
    worker_service_pb2_grpc.WorkerServiceServicer,
):
    """Answers what a client, a worker asks a tokenizer, and a worker asks a manager; each answer says who gave it."""

    def __init__(self, host: str) -> None:
        self._number = int(host.rpartition(".")[2])

    async def Embed(self, request: Any, _context: Any) -> inference_pb2.EmbedResponse:  # noqa: N802  as in the contract
        vectors = np.full(len(request.texts), self._number, "<f4").tobytes()
        return inference_pb2.EmbedResponse(model="m", model_version=1, vectors=vectors, dimensions=1)

    async def Tokenize(self, request: Any, _context: Any) -> tokenizer_pb2.TokenizeResponse:  # noqa: N802
        count = len(request.texts)
        ones = np.ones(count, "<i4").tobytes()
        ids = np.full(count, self._number, "<i4").tobytes()
        return tokenizer_pb2.TokenizeResponse(ids=ids, lengths=ones, token_counts=ones)

    async def ReportStatus(self, _request: Any, _context: Any) -> worker_service_pb2.ReportStatusResponse:  # noqa: N802
        return worker_service_pb2.ReportStatusResponse()

    async def WatchAssignments(  # noqa: N802
        self, _request: Any, _context: Any
    ) -> AsyncIterator[worker_service_pb2.WatchAssignmentsResponse]:
        assignment = worker_service_pb2.Assignment(revision=self._number)
        yield worker_service_pb2.WatchAssignmentsResponse(assignment=assignment)
        await asyncio.Event().wait()


async def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM, then drain."""
    server, replica = Server(settings, []), Replica(settings.host)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(replica, server.grpc)
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(replica, server.grpc)
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(replica, server.grpc)
    await server.start()
    await server.set_serving(serving=True)
    await until_signalled()
    await server.drain()


if __name__ == "__main__":
    own = read_settings(ServerSettings, "replica", "A replica of any service.", arguments=sys.argv[1:])
    run(lambda: serve(own), own, "replica")
