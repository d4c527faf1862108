"""Starts a worker: sessions, engine, agent, and the two services in front of them."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
from pydantic import Field

from modelfleet.api.inference.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from modelfleet.api.oip.v2.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from modelfleet.client.channel import open_hop
from modelfleet.inference.agent import Agent
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.cache import Cache
from modelfleet.inference.engine import Engine
from modelfleet.inference.generation.answering import Answering
from modelfleet.inference.generation.detokenization import Detokenization
from modelfleet.inference.generation.model import GenerationSettings
from modelfleet.inference.health import Health
from modelfleet.inference.loading import Loader
from modelfleet.inference.manager_client import ManagerClient
from modelfleet.inference.memory_budget import MemoryBudget
from modelfleet.inference.oip_servicer import OpenInferenceServicer
from modelfleet.inference.pipeline import Pipeline
from modelfleet.inference.request_limits import RequestLimits
from modelfleet.inference.served_models import ServedModels
from modelfleet.inference.servicer import InferenceServicer
from modelfleet.inference.session import Device, SessionOptions, require_device
from modelfleet.inference.tokenization import Tokenization
from modelfleet.inference.tokenizer_client import TokenizerClient
from modelfleet.runtime.cpus import available_cpus
from modelfleet.runtime.errors import ProviderUnavailableError
from modelfleet.runtime.memory import available_memory
from modelfleet.runtime.server import Server, run, until_signalled
from modelfleet.runtime.settings import ServerSettings, read_settings

_log = structlog.get_logger()

SERVICES = ("modelfleet.api.inference.v1.InferenceService", "inference.GRPCInferenceService")

# Found by `make bench`: on a CPU a batch that stays in its caches is fastest and padding is never free; a GPU wants
# large batches, and below about a thousand tokens one takes as long as a single text.
_BATCHES = {
    Device.CPU: BatchLimits(max_tokens=512, min_fill=0.9, free_tokens=0),
    Device.CUDA: BatchLimits(max_tokens=16384, min_fill=0.9, free_tokens=1024),
    Device.TENSORRT: BatchLimits(max_tokens=16384, min_fill=0.9, free_tokens=1024),
}
_LANES = {Device.CPU: 1, Device.CUDA: 2, Device.TENSORRT: 2}

# An engine thread that has just come back from a session needs the interpreter at once, to start the next batch; the
# default of 5 ms lets the event loop keep it for as long as a batch takes on a GPU.
_THREAD_SWITCH_INTERVAL_S = 0.0005


class Settings(ServerSettings):
    """Settings of a worker."""

    port: int = Field(default=8001, ge=0, le=65535)
    """Port of the gRPC server; 0 picks a free one."""
    metrics_port: int = Field(default=9001, ge=0, le=65535)
    """Port of Prometheus metrics; 0 picks a free one."""
    manager: str = "localhost:8003"
    """Where the manager listens."""
    tokenizer: str = "localhost:8002"
    """Where the tokenizer service listens."""
    worker: str = Field(default_factory=socket.gethostname)
    """Name of this worker, unique while it lives; the pod's name on Kubernetes. The host's name by default."""
    pool: str = "default"
    """Name of the pool that this worker belongs to."""
    cache_dir: Path = Path("modelfleet-cache")
    """Directory of downloaded models, made when missing; a worker started again on it needs no download."""
    device: Device = Device.CPU
    """What sessions run on. A device that is not there is an error; nothing falls back to the CPU."""
    device_id: int = Field(default=0, ge=0)
    """Which GPU."""
    device_memory_bytes: int = Field(default=0, ge=0)
    """Most memory that one session's arena may take on a GPU; 0 for no limit."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of a session; 0 for as many CPUs as the container is given."""
    max_batch_tokens: int = Field(default=0, ge=0)
    """Most padded tokens in a batch (rows, for `tensor` models); 0 for 512 on a CPU and 16384 on a GPU."""
    max_queue_tokens: int = Field(default=262_144, ge=1)
    """Most tokens that wait for one model; a request beyond that is answered RESOURCE_EXHAUSTED."""
    max_streams: int = Field(default=0, ge=0)
    """Most continuations of one generative model at once; 0 for 16 on a CPU and 64 on a GPU."""
    generation_cache_bytes: int = Field(default=2 << 30, ge=1)
    """Most memory for the tokens of one generative model's continuations, and at most three quarters of what is left
    when it is loaded; a request that needs more waits, or is refused."""
    max_texts: int = Field(default=4096, ge=1)
    """Most texts in one request."""
    max_text_bytes: int = Field(default=512 << 10, ge=1)
    """Largest text."""
    memory_bytes: int = Field(default=0, ge=0)
    """Host memory that this worker may take; a version that would not fit is refused. 0 for the container's limit."""
    evict_idle: bool = False
    """Let the versions that were not used for longest make way for one that does not fit into memory. The next request
    for one of them loads it again, and waits for that."""
    max_loaded_versions: int = Field(default=0, ge=0)
    """Most versions loaded at once; beyond it, those that were not used for longest make way. Switches on
    `--evict-idle`, too. 0 for no limit."""
    canary_interval_s: float = Field(default=10, ge=0)
    """Pause between requests of the worker's own, which find out whether it still answers; 0 for none."""
    canary_timeout_s: float = Field(default=60, gt=0)
    """A worker on which one batch runs this long, or none ends while a canary waits, is stuck: liveness fails."""

    @property
    def batch_limits(self) -> BatchLimits:
        """The device's limits of a batch, with the budget that was set."""
        limits = _BATCHES[self.device]
        return BatchLimits(self.max_batch_tokens or limits.max_tokens, limits.min_fill, limits.free_tokens)


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Server]:
    """Serve until the block ends, then drain."""
    async with (
        open_hop(settings.manager, max_message_bytes=settings.max_message_bytes) as manager_channel,
        open_hop(settings.tokenizer, max_message_bytes=settings.max_message_bytes) as tokenizer_channel,
        _engine(settings) as engine,
    ):
        cache = Cache(settings.cache_dir)
        manager = ManagerClient(manager_channel, worker=settings.worker, pool=settings.pool)
        options = SessionOptions(
            device=settings.device,
            device_id=settings.device_id,
            threads=settings.threads or available_cpus(),
            device_memory_bytes=settings.device_memory_bytes,
        )
        await asyncio.to_thread(require_device, options)
        served = ServedModels()
        budget = MemoryBudget(
            settings.memory_bytes or available_memory(), None if settings.device is Device.CPU else settings.device_id
        )
        generation = GenerationSettings(
            settings.max_streams, settings.generation_cache_bytes, settings.max_queue_tokens
        )
        tokenizer = TokenizerClient(tokenizer_channel)
        loader = Loader(
            *(cache, manager.download, engine, options, settings.batch_limits),
            budget=budget,
            generation=generation,
            check_tokenizer=tokenizer.check,
        )
        agent = Agent(
            served,
            loader,
            engine,
            cache,
            manager,
            evicts=settings.evict_idle or settings.max_loaded_versions > 0,
            max_loaded_versions=settings.max_loaded_versions,
        )
        tokenization = Tokenization(tokenizer)
        limits = RequestLimits(settings.max_texts, settings.max_text_bytes)
        pipeline = Pipeline(served, manager, tokenization, engine, limits)
        answering = Answering(pipeline, tokenization, Detokenization(tokenizer), tokenizer)

        server = Server(settings, SERVICES)
        open_inference = OpenInferenceServicer(pipeline, served, max_batch=settings.max_texts)
        add_InferenceServiceServicer_to_server(InferenceServicer(pipeline, answering, served), server.grpc)
        add_GRPCInferenceServiceServicer_to_server(open_inference, server.grpc)
        await server.start()
        agent_task = asyncio.create_task(agent.run(), name="agent")
        agent_task.add_done_callback(_stop_if_failed)
        health = Health(
            served,
            engine,
            lambda: _fail(server, open_inference),
            interval_s=settings.canary_interval_s,
            timeout_s=settings.canary_timeout_s,
        )
        health_task = asyncio.create_task(health.run(), name="health")
        ready_task = asyncio.create_task(_say_ready(agent, server, open_inference), name="ready")
        try:
            yield server
        finally:
            ready_task.cancel()
            health_task.cancel()
            await server.drain(partial(_leave, open_inference))
            agent_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await agent_task
            await served.close()


@asynccontextmanager
async def _engine(settings: Settings) -> AsyncIterator[Engine]:
    """Give the engine; its threads end with the block, however that ends, since the process would wait for them."""
    engine = Engine(_LANES[settings.device], settings.max_queue_tokens)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def _stop_if_failed(agent: asyncio.Task[None]) -> None:
    """Stop a worker that no longer hears the manager: it is started again rather than left behind."""
    if not agent.cancelled() and (error := agent.exception()):
        _log.critical("the agent failed; stopping", exc_info=error)
        signal.raise_signal(signal.SIGTERM)


async def _fail(server: Server, open_inference: OpenInferenceServicer) -> None:
    open_inference.live = open_inference.ready = False
    await server.fail()


async def _leave(open_inference: OpenInferenceServicer) -> None:
    open_inference.ready = False


async def _say_ready(agent: Agent, server: Server, open_inference: OpenInferenceServicer) -> None:
    await agent.settled.wait()
    open_inference.ready = open_inference.live
    await server.set_serving(serving=True)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    async with working(settings):
        await until_signalled()


def main() -> None:
    """Read the settings and serve."""
    settings = read_settings(
        Settings,
        "python -m modelfleet.inference",
        "An inference worker of modelfleet: runs the models that the manager assigns to its pool.",
    )
    # The sessions' threads are the ones that compute; numpy's own would only fight them for the CPUs.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.setswitchinterval(_THREAD_SWITCH_INTERVAL_S)
    try:
        run(lambda: serve(settings), settings, "inference")
    except ProviderUnavailableError as error:
        raise SystemExit(f"The worker cannot start: {error.message}") from error


if __name__ == "__main__":
    main()
