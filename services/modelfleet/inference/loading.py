"""From an assigned version to a loaded model: download, verify, load, prove."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog

from modelfleet.bundle.bundle import BundleFile
from modelfleet.bundle.golden import DEFAULT_TOLERANCES, GoldenExample, read_golden
from modelfleet.bundle.graph import Precision, check_graph, precision
from modelfleet.bundle.infer import GENAI_FILE
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.inference import metrics
from modelfleet.inference.assignment import AssignedVersion
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.cache import Cache, Download
from modelfleet.inference.engine import Engine
from modelfleet.inference.generation.model import GenerationSettings, GenerativeModel
from modelfleet.inference.generation.proving import prove
from modelfleet.inference.memory_budget import MemoryBudget, SessionMemory
from modelfleet.inference.models import HeldModel, LoadedModel, TensorModel, TextModel
from modelfleet.inference.proving import check_golden, self_test
from modelfleet.inference.session import Session, SessionOptions
from modelfleet.inference.states import VersionState
from modelfleet.inference.tasks.tensors import blank
from modelfleet.runtime.memory import return_free_memory

_log = structlog.get_logger()

# While it loads, a session holds its file and its own weights: 142 MB at the peak for MiniLM's 91, and 117 afterwards
# (tests/load/session_memory.py).
_LOADING_SHARE = 1.5
# Elements of `tensor` models come in messages of at most this size by default; a batch of more would only take memory.
_LARGEST_BATCH_BYTES = 64 << 20
# One may have been killed for another reason.
_DEATHS = 2


class KilledLoadingError(Exception):
    """To try it once more might end this process, too."""


@dataclass(frozen=True, slots=True, eq=False)
class _Proof:
    """What a loaded model is held to."""

    examples: Sequence[GoldenExample]
    precision: Precision
    tolerance: float


class Loader:
    """
    Makes loaded models.

    `check_tokenizer` raises InvalidBundleError for a tokenizer that the tokenizer service cannot use.
    """

    def __init__(
        self,
        cache: Cache,
        download: Download,
        engine: Engine,
        options: SessionOptions,
        limits: BatchLimits,
        *,
        budget: MemoryBudget,
        generation: GenerationSettings = GenerationSettings(),  # noqa: B008  it is frozen
        check_tokenizer: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._cache = cache
        self._engine = engine
        self._download = download
        self._options = options
        self._limits = limits
        self._budget = budget
        self._generation = generation
        self._check_tokenizer = check_tokenizer
        # What generative versions have opened, by the files of the graph.
        self._graphs: WeakValueDictionary[frozenset[BundleFile], Any] = WeakValueDictionary()

    async def fetch(self, assigned: AssignedVersion) -> None:
        """
        Have a version's files here, and its tokenizer at the tokenizer service.

        Raises ManagerUnreachableError, BlobNotFoundError, DigestMismatchError, InvalidBundleError, OSError (disk full).
        """
        for file in assigned.bundle.files:
            await self._cache.fetch(file, self._download)
        if self._check_tokenizer and (digest := assigned.bundle.tokenizer_digest):
            await self._check_tokenizer(digest)

    async def load(self, assigned: AssignedVersion, entered: Callable[[VersionState], None]) -> HeldModel:
        """
        Return the model of a version that was fetched, attached to the engine; `entered` hears of each state.

        Raises DigestMismatchError, InvalidBundleError, ProviderUnavailableError, GoldenMismatchError,
        InsufficientMemoryError, FatalDeviceError, OSError (disk full), KilledLoadingError.
        """
        with self._cache.attempt(assigned.bundle) as deaths:
            if deaths >= _DEATHS:
                raise KilledLoadingError(
                    f"{deaths} processes of this worker died one after another while they loaded it, for lack of "
                    "memory or by the graph. The container's last state, or the kernel's log, says which."
                )
            return await self._load(assigned, entered)

    async def _load(self, assigned: AssignedVersion, entered: Callable[[VersionState], None]) -> HeldModel:
        entered(VersionState.VERIFYING)
        started = time.monotonic()
        await asyncio.to_thread(return_free_memory)  # of the downloads, so that what is left is known
        if assigned.bundle.manifest.task is Task.GENERATE:
            model: HeldModel = await self._generative(assigned, entered)
        else:
            model = await self._loaded(assigned, entered)
        seconds = round(time.monotonic() - started, 3)
        _log.info("loaded", version=model.name, seconds=seconds, **asdict(model.memory))
        return model

    async def _loaded(self, assigned: AssignedVersion, entered: Callable[[VersionState], None]) -> LoadedModel:
        model, proof = await asyncio.to_thread(self._verified, assigned)
        entered(VersionState.WARMING)
        await self._prove(model, proof)
        return model

    async def unload(self, model: HeldModel) -> None:
        """Let go of a model that no request uses any more."""
        if isinstance(model, GenerativeModel):
            await model.close()
        else:
            self._engine.detach(model)

    async def _generative(self, assigned: AssignedVersion, entered: Callable[[VersionState], None]) -> GenerativeModel:
        model, examples = await asyncio.to_thread(self._opened, assigned)
        entered(VersionState.WARMING)
        model.start(self._engine.device_failed)
        try:
            await prove(model, examples)
        except BaseException:
            await model.close()
            raise
        metrics.observe_memory(model.name, model.memory)
        return model

    def _opened(self, assigned: AssignedVersion) -> tuple[GenerativeModel, Sequence[GoldenExample]]:
        bundle, manifest, name = assigned.bundle, assigned.bundle.manifest, str(assigned.key)
        directory = self._cache.materialize(bundle)
        weights = _graph_files(directory, manifest)
        graph = frozenset(file for file in bundle.files if file.path in {GENAI_FILE, *weights})
        opened = self._graphs.get(graph)  # of another version, with another adapter
        size = 0 if opened else _size(directory, weights)
        self._budget.require(name, int(_LOADING_SHARE * size), size, "to be loaded")
        before = self._budget.left()
        model = GenerativeModel(name, manifest, directory, self._options, self._generation, opened=opened)
        self._graphs[graph] = model.session.model
        host_bytes, device_bytes = self._budget.left().since(before)
        model.memory = SessionMemory(host_bytes=host_bytes, device_bytes=device_bytes)
        model.fit_cache(self._budget.left())
        return model, read_golden(directory / bundle.golden) if bundle.golden else ()

    async def _prove(self, model: LoadedModel, proof: _Proof) -> None:
        await check_golden(model, self._engine, proof.examples, proof.tolerance)
        samples = [example.inputs for example in proof.examples]
        await self_test(
            model, self._engine, self._budget, samples, precision=proof.precision, tolerance=proof.tolerance
        )
        metrics.observe_memory(model.name, model.memory)

    def _verified(self, assigned: AssignedVersion) -> tuple[LoadedModel, _Proof]:
        bundle, manifest, name = assigned.bundle, assigned.bundle.manifest, str(assigned.key)
        directory = self._cache.materialize(bundle)
        graph = directory / manifest.model
        size = _size(directory, _graph_files(directory, manifest))
        examples = read_golden(directory / bundle.golden) if bundle.golden else ()
        narrowest = precision(graph)
        tolerance = manifest.golden_tolerance
        if tolerance is None:
            tolerance = DEFAULT_TOLERANCES[narrowest]
        self._budget.require(name, int(_LOADING_SHARE * size), size, "to be loaded")
        before = self._budget.left()
        session = Session(graph, replace(self._options, engine_cache=self._cache.engines(bundle)))
        return_free_memory()
        host_bytes, device_bytes = self._budget.left().since(before)
        self._budget.require_kept(name, "once it is loaded")
        if manifest.task is Task.TENSOR:
            model: LoadedModel = TensorModel(name, manifest, session, self._tensor_limits(manifest, session, examples))
        else:
            model = TextModel(name, manifest, session, self._limits)
        model.memory = SessionMemory(host_bytes=host_bytes, device_bytes=device_bytes)
        return model, _Proof(examples, narrowest, tolerance)

    def _tensor_limits(self, manifest: Manifest, session: Session, examples: Sequence[GoldenExample]) -> BatchLimits:
        """Return limits in rows: the worker's, the manifest's, or those that fill a message, whichever is lowest."""
        rows = min(self._limits.max_tokens, manifest.max_batch_rows or self._limits.max_tokens)
        samples = [example.inputs for example in examples] or [blank(session.inputs) or {}]
        largest = max(sum(array[:1].nbytes for array in sample.values()) for sample in samples)
        if largest:
            rows = min(rows, max(1, _LARGEST_BATCH_BYTES // largest))
        return replace(self._limits, max_tokens=rows)


def _graph_files(directory: Path, manifest: Manifest) -> frozenset[str]:
    """Return the paths of a graph and of the data beside it. Raises InvalidBundleError for a graph that is corrupt."""
    return check_graph(directory / manifest.model, directory) | {manifest.model}


def _size(directory: Path, paths: Iterable[str]) -> int:
    return sum((directory / path).stat().st_size for path in paths)
