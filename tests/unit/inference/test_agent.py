import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
from harness import graphs
from harness.graphs import SampleBundle
from modelfleet.bundle.graph import check_graph
from modelfleet.bundle.manifest import Task
from modelfleet.bundle.reference import ModelReference
from modelfleet.inference import agent as agent_module
from modelfleet.inference import loading
from modelfleet.inference.agent import Agent
from modelfleet.inference.assignment import AssignedVersion, Assignment, Route, VersionKey, WeightedVersion
from modelfleet.inference.cache import Cache
from modelfleet.inference.engine import Engine
from modelfleet.inference.loading import Loader
from modelfleet.inference.memory_budget import MemoryBudget
from modelfleet.inference.models import LoadedModel
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.inference.states import VersionState
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import (
    BlobNotFoundError,
    ManagerUnreachableError,
    ModelLoadingError,
)
from structlog.testing import capture_logs
from structlog.typing import EventDict

MODEL = graphs.text_bundle(graphs.embedder(), Task.EMBED)
OTHER = graphs.text_bundle(graphs.pooled_embedder(), Task.EMBED)
BROKEN = graphs.text_bundle(graphs.classifier(), Task.EMBED, output="no such output")


class Manager:
    """A manager in this process: a test says what is assigned, and sees what is reported."""

    def __init__(self) -> None:
        self.contents = {**MODEL.contents, **OTHER.contents, **BROKEN.contents}
        self.fails: dict[str, Exception] = {}  # downloads, by digest
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.reachable = True
        self.reports: list[tuple[int, dict[str, str]]] = []
        self._assignments: asyncio.Queue[Assignment] = asyncio.Queue()
        self._revision = 0

    def assign(
        self, versions: dict[str, SampleBundle], aliases: dict[str, int] | None = None, *, revision: int | None = None
    ) -> None:
        """Assign versions by `name@number`, and `stable` of models by name."""
        self._revision = self._revision + 1 if revision is None else revision
        self._assignments.put_nowait(assignment(self._revision, versions, aliases or {}))

    async def assignments(self) -> AsyncIterator[Assignment]:
        while True:
            yield await self._assignments.get()

    async def report(self, revision: int, versions: list[ServedVersion]) -> None:
        if not self.reachable:
            raise ManagerUnreachableError("gone")
        self.reports.append((revision, {str(version.key): version.state.value for version in versions}))

    async def download(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        await self.may_send.wait()
        if not self.reachable:
            raise ManagerUnreachableError("The manager cannot be reached.")
        if sha256 in self.fails:
            raise self.fails[sha256]
        yield self.contents[sha256][offset:]


def assignment(revision: int, versions: dict[str, SampleBundle], aliases: dict[str, int]) -> Assignment:
    return Assignment(
        revision,
        tuple(AssignedVersion(key(name), sample.bundle) for name, sample in versions.items()),
        tuple(Route(model, "stable", (WeightedVersion(number, 1),)) for model, number in aliases.items()),
    )


def key(name: str) -> VersionKey:
    model, _, number = name.partition("@")
    return VersionKey(model, int(number))


@dataclass
class Worker:
    """An agent at work, and what it works on."""

    manager: Manager
    served: ServedModels
    engine: Engine
    agent: Agent
    loader: "PausingLoader"
    task: "asyncio.Task[None]"
    history: dict[str, list[str]] = field(default_factory=dict)
    logs: list[EventDict] = field(default_factory=list)

    def states(self) -> dict[str, str]:
        return {str(version.key): version.state.value for version in self.served.versions()}

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                assert not self.task.done(), self.task
                await asyncio.sleep(0.002)

    async def until_states(self, **states: str) -> None:
        wanted = {name.replace("_", "@"): state for name, state in states.items()}
        await self.until(lambda: self.states() == wanted)

    def answering(self, reference: str = "m") -> str:
        with self.served.use(ModelReference.parse(reference)) as (version, _):
            return str(version)


class PausingLoader(Loader):
    """Holds what is loaded back until `may_finish`."""

    def __init__(self, cache: Cache, manager: Manager, engine: Engine, directory: Path) -> None:
        budget = MemoryBudget(1 << 40, None)
        super().__init__(cache, manager.download, engine, graphs.cpu_options(directory), graphs.LIMITS, budget=budget)
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.held_back = 0

    async def load(self, assigned: AssignedVersion, entered: Callable[[VersionState], None]) -> LoadedModel:
        model = await super().load(assigned, entered)
        self.held_back += 1
        await self.may_finish.wait()
        return model


@asynccontextmanager
async def working(
    directory: Path, manager: Manager | None = None, *, max_loaded_versions: int = 0
) -> AsyncIterator[Worker]:
    manager = manager or Manager()
    served, cache, engine = ServedModels(), Cache(directory), Engine(1, 1000)
    loader = PausingLoader(cache, manager, engine, directory)
    agent = Agent(served, loader, engine, cache, manager, max_loaded_versions=max_loaded_versions)
    worker = Worker(manager, served, engine, agent, loader, asyncio.create_task(agent.run()))
    served.on_change(lambda: record(worker))
    unforeseen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unforeseen.append(context))
    try:
        with capture_logs() as worker.logs:
            yield worker
    finally:
        worker.task.cancel()
        await asyncio.wait([worker.task])
        await asyncio.to_thread(engine.close)
    assert unforeseen == []
    assert [event for event in worker.logs if event["log_level"] == "error"] == []


def record(worker: Worker) -> None:
    for version, state in worker.states().items():
        seen = worker.history.setdefault(version, [])
        if not seen or seen[-1] != state:
            seen.append(state)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_FIRST_RETRY_S", 0.01)


async def test_what_is_assigned_is_loaded_served_and_reported(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        await worker.until(lambda: (1, {"m@1": "READY"}) in worker.manager.reports)
        assert worker.history["m@1"] == ["DOWNLOADING", "VERIFYING", "WARMING", "READY"]
        assert worker.agent.settled.is_set()
        assert worker.answering("m") == worker.answering("m@1") == "m@1"


async def test_an_alias_moves_when_its_new_version_is_ready_and_the_old_one_is_unloaded(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        worker.manager.may_send.clear()
        worker.manager.assign({"m@2": OTHER}, {"m": 2})
        await worker.until_states(m_1="READY", m_2="DOWNLOADING")
        assert worker.answering("m") == "m@1"
        worker.manager.may_send.set()
        await worker.until_states(m_2="READY")
        assert worker.answering("m") == "m@2"


async def test_no_request_of_an_alias_fails_while_it_moves(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        worker.served.on_change(lambda: worker.answering("m"))  # raises where nothing answers
        for number in range(2, 6):
            worker.manager.assign({f"m@{number}": MODEL if number % 2 else OTHER}, {"m": number})
            await worker.until(lambda number=number: worker.states() == {f"m@{number}": "READY"})


async def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        worker.manager.assign({"m@2": BROKEN}, {"m": 2})
        await worker.until(lambda: any(held.get("m@2") == "FAILED" for _, held in worker.manager.reports))
        assert worker.states()["m@1"] == "READY"
        assert worker.answering("m") == "m@1"
        await worker.until(lambda: worker.states()["m@2"] == "FAILED")
        with pytest.raises(ModelLoadingError, match="no such output"):
            worker.answering("m@2")


async def test_a_failed_version_is_tried_again(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        graph = MODEL.bundle.files[0].sha256
        worker.manager.fails[graph] = BlobNotFoundError("no blob")
        worker.manager.assign({"m@1": MODEL})
        await worker.until_states(m_1="FAILED")
        assert worker.agent.settled.is_set()
        del worker.manager.fails[graph]
        await worker.until_states(m_1="READY")


async def test_an_unforeseen_failure_is_the_versions_own(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        graph = MODEL.bundle.files[0].sha256
        worker.manager.fails[graph] = ZeroDivisionError()
        worker.manager.assign({"m@1": MODEL, "o@1": OTHER})
        await worker.until(lambda: "FAILED" in worker.history.get("m@1", []))
        await worker.until(lambda: worker.states()["o@1"] == "READY")
        del worker.manager.fails[graph]
        await worker.until_states(m_1="READY", o_1="READY")


async def test_while_the_manager_is_away_a_download_waits_and_does_not_fail(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.reachable = False
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await asyncio.wait_for(worker.agent.settled.wait(), 5)  # what else is ready may be served
        with pytest.raises(ModelLoadingError, match="The manager cannot be reached"):
            worker.answering("m")
        worker.manager.reachable = True
        await worker.until_states(m_1="READY")
        assert "FAILED" not in worker.history["m@1"]


async def test_a_version_no_longer_assigned_is_unloaded_when_its_last_request_has_ended(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        with worker.served.use(ModelReference.parse("m@1")) as (_, model):
            worker.manager.assign({})
            await worker.until_states(m_1="DRAINING")
            with pytest.raises(ModelLoadingError, match="is being unloaded"):
                worker.answering("m@1")
            (y,) = await embed(worker.engine, model)  # the request under way is still answered
            assert y.shape == (graphs.DIMENSIONS,)
        await worker.until_states()
        with pytest.raises(ModelLoadingError):
            await embed(worker.engine, model)
        assert prometheus_client.REGISTRY.get_sample_value("modelfleet_batch_rows_count", {"model": "m@1"}) is None


async def embed(engine: Engine, model: LoadedModel) -> list[np.ndarray]:
    tokens = Tokens.whole(np.array([5], np.int32), np.array([1], np.int32))
    return await engine.submit(model, tokens, [1], deadline=float("inf"))


async def test_a_version_assigned_again_while_it_drains_is_loaded_again(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL})
        await worker.until_states(m_1="READY")
        with worker.served.use(ModelReference.parse("m@1")):
            worker.manager.assign({})
            await worker.until_states(m_1="DRAINING")
            worker.manager.assign({"m@1": MODEL})
            await worker.until(lambda: worker.manager.reports[-1][0] == 3)
            assert worker.states() == {"m@1": "DRAINING"}
        await worker.until_states(m_1="READY")


async def test_a_version_no_longer_assigned_while_it_downloads_is_gone_and_may_come_back(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.may_send.clear()
        worker.manager.assign({"m@1": MODEL})
        await worker.until_states(m_1="DOWNLOADING")
        worker.manager.assign({})
        await worker.until_states()
        worker.manager.may_send.set()
        worker.manager.assign({"m@1": MODEL})
        await worker.until_states(m_1="READY")


async def test_a_version_no_longer_assigned_while_a_thread_loads_it_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading_now, may_go_on = threading.Event(), threading.Event()

    def held_up(*arguments: Path) -> object:
        loading_now.set()
        may_go_on.wait(10)
        return check_graph(*arguments)

    async with working(tmp_path) as worker:
        monkeypatch.setattr(loading, "check_graph", held_up)
        worker.manager.assign({"m@1": MODEL})
        await asyncio.to_thread(loading_now.wait, 10)
        worker.manager.assign({})
        await worker.until_states()
        worker.manager.assign({"m@1": MODEL})
        await worker.until_states(m_1="VERIFYING")
        may_go_on.set()  # for the thread that nobody waits for, too
        await worker.until_states(m_1="READY")


async def test_assignments_in_quick_succession_end_as_the_last_one_says(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        for versions in ({"m@1": MODEL}, {}, {"m@1": MODEL}, {"m@2": OTHER}, {}, {"m@1": MODEL, "m@2": OTHER}):
            worker.manager.assign(versions)
        await worker.until_states(m_1="READY", m_2="READY")
        worker.manager.assign({"m@1": MODEL})
        worker.manager.assign({})
        await worker.until_states()


async def test_versions_that_get_ready_one_after_another_retire_the_old_one_once(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        worker.loader.may_finish.clear()
        worker.loader.held_back = 0
        worker.manager.assign({"m@2": OTHER, "o@1": OTHER}, {"m": 2})
        await worker.until(lambda: worker.loader.held_back == 1)
        worker.loader.may_finish.set()
        await worker.until_states(m_2="READY", o_1="READY")
        assert worker.history["m@1"][-2:] == ["READY", "DRAINING"]


async def test_what_was_assigned_last_is_served_without_the_manager_after_a_restart(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
    away = Manager()
    away.reachable = False
    async with working(tmp_path, away) as worker:
        await worker.until_states(m_1="READY")
        assert worker.answering("m") == "m@1"


async def test_a_version_that_was_to_make_way_stays_when_the_other_is_no_longer_assigned(tmp_path: Path) -> None:
    async with working(tmp_path, max_loaded_versions=1) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        version = worker.served.get(key("m@1"))
        assert version
        model = version.model
        with worker.served.use(ModelReference.parse("m")):  # so that it cannot make way yet
            worker.manager.assign({"m@1": MODEL, "o@1": OTHER}, {"m": 1})
            await worker.until(lambda: version.evicted)
            waiting = asyncio.create_task(worker.served.brought_back(version))
            await asyncio.sleep(0)
            worker.manager.assign({"m@1": MODEL}, {"m": 1})
            await worker.until_states(m_1="READY")
            await asyncio.wait_for(waiting, 5)

        assert worker.answering() == "m@1"
        await worker.until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "m@1"])
        assert version.model is model
        assert worker.loader.held_back == 1


async def test_a_version_that_has_killed_processes_fails_with_the_reason_and_leaves_the_others_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_LAST_RETRY_S", 0.5)
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / OTHER.bundle.digest).write_text("2")
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL, "m@2": OTHER}, {"m": 1})

        await worker.until_states(m_1="READY", m_2="FAILED")

        version = worker.served.get(key("m@2"))
        assert version
        assert version.reason.startswith("2 processes of this worker died one after another while they loaded it")
        await worker.until_states(m_1="READY", m_2="READY")  # it is tried again, much later


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_what_no_version_here_needs_any_more_is_deleted_from_the_disk(tmp_path: Path) -> None:
    blobs_of_model, blobs_of_other = ({file.sha256 for file in one.bundle.files} for one in (MODEL, OTHER))
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
        worker.manager.assign({"m@1": MODEL, "m@2": OTHER}, {"m": 2})
        await worker.until_states(m_1="READY", m_2="READY")
        assert names(tmp_path / "blobs") == blobs_of_model | blobs_of_other

        worker.manager.assign({"m@2": OTHER}, {"m": 2})
        await worker.until_states(m_2="READY")

        await worker.until(lambda: names(tmp_path / "blobs") == blobs_of_other)  # of which the tokenizer was shared
        await worker.until(lambda: names(tmp_path / "bundles") == {OTHER.bundle.digest})
        await worker.until(lambda: names(tmp_path) == {"assignment.json", "attempts", "blobs", "bundles", "engines"})


async def test_what_an_earlier_life_left_behind_is_deleted_and_what_is_still_assigned_is_not(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1})
        await worker.until_states(m_1="READY")
    left = [tmp_path / "blobs" / f"{'0' * 64}.partial", tmp_path / "bundles" / f"{'0' * 64}.building" / "onnx"]
    left += [tmp_path / "engines" / ("0" * 64), tmp_path / "dropped-1" / "blob"]
    for path in left:
        path.mkdir(parents=True)
    away = Manager()
    away.reachable = False

    async with working(tmp_path, away) as worker:
        await worker.until_states(m_1="READY")

        await worker.until(lambda: not any(path.exists() for path in left))
        assert names(tmp_path / "blobs") == {file.sha256 for file in MODEL.bundle.files}


async def test_a_manager_that_has_lost_its_data_is_believed(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, {"m": 1}, revision=50)
        await worker.until_states(m_1="READY")
    async with working(tmp_path) as worker:  # it has the assignment of revision 50 on disk
        await worker.until_states(m_1="READY")
        worker.manager.assign({"m@1": OTHER}, {"m": 1}, revision=2)
        await worker.until(lambda: holds(worker, "m@1", OTHER))
        await worker.until_states(m_1="READY")


def holds(worker: Worker, name: str, sample: SampleBundle) -> bool:
    version = worker.served.get(key(name))
    return version is not None and version.assigned.bundle == sample.bundle


async def test_an_assignment_older_than_the_managers_last_is_ignored(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL}, revision=5)
        await worker.until_states(m_1="READY")
        worker.manager.assign({}, revision=4)
        worker.manager.assign({"m@1": MODEL, "o@1": OTHER}, revision=6)
        await worker.until_states(m_1="READY", o_1="READY")
        assert worker.history["m@1"][-1] == "READY"
        assert "DRAINING" not in worker.history["m@1"]
        assert [(entry["revision"], entry["newest"]) for entry in worker.logs if "older" in entry["event"]] == [(4, 5)]


async def test_an_assignment_that_cannot_be_kept_is_served_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "assignment.written").mkdir(parents=True)  # writing fails, as on a full disk
    async with working(tmp_path) as worker:
        worker.manager.assign({"m@1": MODEL})
        await worker.until_states(m_1="READY")


async def test_reports_that_fail_are_made_again(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.reachable = False
        worker.manager.assign({})
        await asyncio.wait_for(worker.agent.settled.wait(), 5)
        worker.manager.reachable = True
        worker.manager.assign({"m@1": MODEL})
        await worker.until(lambda: (2, {"m@1": "READY"}) in worker.manager.reports)


async def test_stopping_ends_every_life(tmp_path: Path) -> None:
    async with working(tmp_path) as worker:
        worker.manager.may_send.clear()
        worker.manager.assign({"m@1": MODEL, "o@1": OTHER})
        await worker.until_states(m_1="DOWNLOADING", o_1="DOWNLOADING")
        worker.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker.task
        assert worker.states() == {}
        assert not [task for task in asyncio.all_tasks() if task.get_name() in ("m@1", "o@1")]
