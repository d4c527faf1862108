"""From an assigned version to a loaded model: download, verify, load, warm up."""

import asyncio
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog

from modelfleet.bundle.graph import check_graph
from modelfleet.bundle.manifest import Task
from modelfleet.inference import metrics
from modelfleet.inference.assignment import AssignedVersion
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.cache import Cache, Download
from modelfleet.inference.engine import Engine
from modelfleet.inference.models import LoadedModel, TensorModel, TextModel
from modelfleet.inference.session import Session, SessionOptions
from modelfleet.inference.states import VersionState
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidBundleError, SessionFailureError

_log = structlog.get_logger()


class Loader:
    """Makes loaded models. One at a time is verified and warmed, so that loading takes little from serving."""

    def __init__(
        self, cache: Cache, download: Download, engine: Engine, options: SessionOptions, limits: BatchLimits
    ) -> None:
        self._cache = cache
        self._engine = engine
        self._download = download
        self._options = options
        self._limits = limits
        self._one_at_a_time = asyncio.Lock()

    async def load(self, assigned: AssignedVersion, entered: Callable[[VersionState], None]) -> LoadedModel:
        """
        Return the loaded model, attached to the engine; `entered` hears of each state on the way.

        Raises ManagerUnreachableError, BlobNotFoundError, DigestMismatchError, InvalidBundleError,
        ProviderUnavailableError, OSError (disk full).
        """
        for file in assigned.bundle.files:
            await self._cache.fetch(file, self._download)
        async with self._one_at_a_time:
            entered(VersionState.VERIFYING)
            started = time.monotonic()
            before = _resident_bytes()
            model = await asyncio.to_thread(self._verified, assigned)
            metrics.SESSION_BYTES.labels(model.name).set(max(0, _resident_bytes() - before))
            entered(VersionState.WARMING)
            self._engine.attach(model)
            try:
                await _warm_up(model, self._engine)
            except BaseException:
                self._engine.detach(model)
                raise
            _log.info("loaded", version=model.name, seconds=round(time.monotonic() - started, 3))
        return model

    def _verified(self, assigned: AssignedVersion) -> LoadedModel:
        bundle = assigned.bundle
        directory = self._cache.materialize(bundle)
        graph = directory / bundle.manifest.model
        check_graph(graph, directory)
        session = Session(graph, self._options)
        kind = TensorModel if bundle.manifest.task is Task.TENSOR else TextModel
        return kind(str(assigned.key), bundle.manifest, session, self._limits)


async def _warm_up(model: LoadedModel, engine: Engine) -> None:
    """Run a text model at its smallest and at its largest batch, so that no caller pays for first-time work."""
    if isinstance(model, TensorModel):
        return  # nothing says which inputs such a graph takes
    longest = model.manifest.max_tokens or 1
    widest = max(1, model.limits.max_tokens // longest)
    for rows, length in ((1, 1), (widest, longest)):
        tokens = Tokens(
            ids=np.full(rows * length, model.manifest.pad_token_id, np.int32),
            lengths=np.full(rows, length, np.int32),
            type_ids=None,
            offsets=None,
            window_counts=np.ones(rows, np.int32),
            token_counts=np.full(rows, length, np.int32),
        )
        try:
            await engine.submit(model, tokens, [length] * rows, deadline=math.inf)
        except SessionFailureError as error:
            raise InvalidBundleError(
                f"The graph fails on {rows} x {length} tokens: {error.__cause__}", field="model"
            ) from error


def _resident_bytes() -> int:
    """Return the process's resident memory. https://man7.org/linux/man-pages/man5/proc_pid_statm.5.html."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
