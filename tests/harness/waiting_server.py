"""A server process whose calls end when a line comes on standard input: for tests of the drain."""

import asyncio
import sys

from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from modelfleet.runtime.server import Server, run, until_signalled
from modelfleet.runtime.settings import ServerSettings, read_settings

from harness.scripted import Scripted


async def serve(settings: ServerSettings) -> None:
    async def wait(request: pb.GetModelRequest, _context: object) -> pb.GetModelResponse:
        if request.model == "wait":
            await asyncio.to_thread(sys.stdin.readline)
        return pb.GetModelResponse(model=pb.Model(model=request.model))

    server = Server(settings, ["modelfleet.api.manager.v1.ModelService"])
    add_ModelServiceServicer_to_server(Scripted(unary=wait), server.grpc)
    await server.start()
    await server.set_serving(serving=True)
    await until_signalled()
    await server.drain()


if __name__ == "__main__":
    flags = ["--host=127.0.0.1", "--drain-delay-s=1", "--drain-timeout-s=30", *sys.argv[1:]]
    settings = read_settings(ServerSettings, "waiting", "A server whose calls wait.", arguments=flags)
    run(lambda: serve(settings), settings, "waiting")
