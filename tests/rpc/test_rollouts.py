"""RolloutService through a real server, with workers that obey over real gRPC."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from harness.manager import Manager, push, refused, running_manager
from harness.obedient_worker import ObedientWorker
from harness.rollouts import alias, place, spec, start, state_name, two_versions, until, way
from modelfleet.api.manager.v1 import model_service_pb2 as models_pb
from modelfleet.api.manager.v1 import rollout_service_pb2 as pb
from modelfleet.api.manager.v1 import worker_service_pb2 as workers_pb
from modelfleet.api.manager.v1.version_state_pb2 import VersionState
from modelfleet.runtime.errors import Reason

SECOND = Duration(seconds=1)


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    async with running_manager(tmp_path) as running:
        await two_versions(running)
        yield running


@pytest.fixture
async def workers(manager: Manager) -> AsyncIterator[list[ObedientWorker]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(ObedientWorker(name).working_for(manager.address)) for name in ("w1", "w2")
        ]


def canary(*percents: int, **limits: Any) -> pb.Canary:
    return pb.Canary(percents=percents, **limits)


def traffic(requests: int, failures: int = 0, latency_ms_exponent: int = 3) -> workers_pb.Traffic:
    counts = [0] * 18
    counts[latency_ms_exponent] = requests
    return workers_pb.Traffic(request_count=requests, failure_count=failures, latency_counts=counts)


def answered(worker: ObedientWorker, **by_version: workers_pb.Traffic) -> None:
    worker.traffic = {int(name.removeprefix("v")): counts for name, counts in by_version.items()}
    worker.obey()


def progress(*expected: tuple[str, str, bool]) -> Callable[[pb.Rollout], bool]:
    def holds(rollout: pb.Rollout) -> bool:
        seen = [(one.worker, VersionState.Name(one.state), one.current) for one in rollout.workers]
        return seen == [(worker, f"VERSION_STATE_{state}", current) for worker, state, current in expected]

    return holds


async def test_a_rollout_moves_the_alias_on_every_worker_in_one_step(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    done = await until(manager, await start(manager), "SUCCEEDED")

    assert way(done) == ["PENDING", "LOADING", "FLIPPING", "DRAINING", "SUCCEEDED"]
    assert [event.percent for event in done.events] == [0, 0, 100, 100, 100]
    assert await alias(manager) == 2
    for worker in workers:
        assert worker.routes == [{1: 1}, {2: 1}]
        assert worker.held == [2]


async def test_a_rollout_waits_only_for_workers_of_the_pools_that_serve_the_model(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    await place(manager, "default")
    async with ObedientWorker("other", pool="large", failing={1, 2}).working_for(manager.address) as other:
        rollout = await start(manager)
        loading = await until(manager, rollout, "LOADING", "FLIPPING", "DRAINING", "SUCCEEDED")
        await until(manager, rollout, "SUCCEEDED")

        assert {worker.worker for worker in loading.workers} <= {"w1", "w2"}
        assert other.held == []
        assert all(worker.held == [2] for worker in workers)


async def test_a_model_is_not_placed_elsewhere_while_a_rollout_is_undecided(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    workers[1].slow = {2}
    rollout = await start(manager)
    await until(manager, rollout, "LOADING")

    call = manager.models.PlaceModel(models_pb.PlaceModelRequest(model="pii", pools=["large"]))
    message = rf"under rollout {rollout} and cannot be placed. Abort that, or wait"
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)

    await manager.rollouts.AbortRollout(pb.AbortRolloutRequest(rollout=rollout))
    await place(manager, "large")
    await workers[0].until(lambda worker: worker.held == [])


async def test_the_alias_stays_until_the_last_worker_is_ready(manager: Manager, workers: list[ObedientWorker]) -> None:
    workers[1].slow = {2}
    rollout = await start(manager)
    await until(manager, rollout, "LOADING", holds=progress(("w1", "READY", True), ("w2", "WARMING", True)))
    assert await alias(manager) == 1
    assert all(worker.routes == [{1: 1}] for worker in workers)

    workers[1].slow = set()
    workers[1].obey()

    await until(manager, rollout, "SUCCEEDED")


async def test_a_worker_that_joins_is_waited_for_and_one_that_is_silent_is_not(tmp_path: Path) -> None:
    async with running_manager(tmp_path, worker_ttl_s=1) as manager:
        await two_versions(manager)
        async with ObedientWorker("early", slow={2}).working_for(manager.address):
            rollout = await start(manager)
            await until(manager, rollout, "LOADING")
            async with ObedientWorker("late", interval_s=0.2).working_for(manager.address):
                holds = progress(("early", "WARMING", True), ("late", "READY", True))
                await until(manager, rollout, "LOADING", holds=holds)

                done = await until(manager, rollout, "SUCCEEDED")

    assert not done.workers


async def test_a_worker_that_cannot_load_stops_the_rollout(manager: Manager, workers: list[ObedientWorker]) -> None:
    workers[1].failing = {2}

    failed = await until(manager, await start(manager), "FAILED")

    assert failed.reason == "pii@2 failed on worker w2: made to fail"
    assert way(failed) == ["PENDING", "LOADING", "FAILED"]
    assert await alias(manager) == 1
    await workers[0].until(lambda worker: worker.held == [1])
    assert all(worker.routes == [{1: 1}] for worker in workers)


async def test_loading_that_takes_too_long_stops_the_rollout(manager: Manager, workers: list[ObedientWorker]) -> None:
    workers[0].slow = {2}

    failed = await until(manager, await start(manager, loading_timeout=SECOND), "FAILED")

    assert failed.reason == "Not loaded by w1 (WARMING) within 1 s."
    assert await alias(manager) == 1


async def test_without_workers_nothing_moves(manager: Manager) -> None:
    failed = await until(manager, await start(manager, loading_timeout=SECOND), "FAILED")

    assert failed.reason == "No worker reported within 1 s."
    assert await alias(manager) == 1


async def test_a_canary_takes_its_steps_as_it_is_promoted(manager: Manager, workers: list[ObedientWorker]) -> None:
    rollout = await start(manager, canary=canary(10, 50))
    found = await until(manager, rollout, "CANARY")
    assert found.percent == 10
    assert await alias(manager) == 1

    promoted = (await manager.rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=rollout))).rollout
    assert (state_name(promoted), promoted.percent) == ("CANARY", 50)
    await manager.rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=rollout))

    done = await until(manager, rollout, "SUCCEEDED")
    assert [event.percent for event in done.events] == [0, 0, 10, 50, 100, 100, 100]
    # Slow workers may miss what is between, never the end.
    assert all(worker.routes[-1] == {2: 1} for worker in workers)


async def test_a_canary_is_assigned_first_with_its_weight(manager: Manager, workers: list[ObedientWorker]) -> None:
    await until(manager, await start(manager, canary=canary(7)), "CANARY")
    await workers[0].until(lambda worker: len(worker.assignment.routes[0].targets) == 2)

    targets = workers[0].assignment.routes[0].targets
    assert [(target.model_version, target.weight) for target in targets] == [(2, 7), (1, 93)]


@pytest.mark.usefixtures("workers")
async def test_a_full_promotion_skips_the_other_steps(manager: Manager) -> None:
    rollout = await start(manager, canary=canary(10, 20, 30))
    await until(manager, rollout, "CANARY")

    await manager.rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=rollout, full=True))

    assert way(await until(manager, rollout, "SUCCEEDED")).count("CANARY") == 1


async def test_steps_with_a_duration_end_by_themselves_once_there_was_enough_to_judge(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    briefly = Duration(nanos=1)
    rollout = await start(manager, canary=canary(10, 50, step_duration=briefly, min_requests=100, max_error_rate=0.5))
    await until(manager, rollout, "CANARY", holds=lambda found: found.percent == 10)

    answered(workers[0], v2=traffic(60))
    answered(workers[1], v2=traffic(40))
    await until(manager, rollout, "CANARY", holds=lambda found: found.percent == 50)
    answered(workers[0], v2=traffic(160))

    await until(manager, rollout, "SUCCEEDED")


@pytest.mark.parametrize(
    ("limits", "answers", "reason"),
    [
        (
            {"max_error_rate": 0.01},
            (traffic(1000), traffic(100, failures=2)),
            "failed 2 of 100 requests, 2.00%; max_error",
        ),
        ({"max_p99": Duration(nanos=10**7)}, (traffic(1000), traffic(100, 0, 5)), "p99 is 31.8 ms; max_p99 is 10.0 ms"),
        (
            {"max_p99_ratio": 1.5},
            (traffic(1000), traffic(100, 0, 4)),
            "p99 is 15.9 ms, 2.00 times the old version's 8.0",
        ),
    ],
)
async def test_a_canary_that_passes_a_limit_stops_the_rollout(
    manager: Manager,
    workers: list[ObedientWorker],
    limits: dict[str, Any],
    answers: tuple[workers_pb.Traffic, workers_pb.Traffic],
    reason: str,
) -> None:
    rollout = await start(manager, canary=canary(10, **limits))
    await until(manager, rollout, "CANARY")

    answered(workers[0], v1=answers[0], v2=answers[1])

    failed = await until(manager, rollout, "FAILED")
    assert reason in failed.reason
    assert await alias(manager) == 1
    await workers[0].until(lambda worker: worker.routes[-1] == {1: 1})


async def test_figures_count_from_when_the_step_began(manager: Manager, workers: list[ObedientWorker]) -> None:
    answered(workers[0], v1=traffic(1000, failures=500))
    answered(workers[1], v1=traffic(1000, failures=500))
    rollout = await start(manager, canary=canary(10))
    await until(manager, rollout, "CANARY")

    answered(workers[0], v1=traffic(1090, failures=500), v2=traffic(10, failures=1))

    found = await until(manager, rollout, "CANARY", holds=lambda found: found.new_figures.request_count > 0)
    assert (found.old_figures.request_count, found.old_figures.failure_count) == (90, 0)
    assert (found.new_figures.request_count, found.new_figures.failure_count) == (10, 1)
    assert found.new_figures.p99.ToMilliseconds() == 7


async def test_a_worker_that_loads_during_a_canary_holds_its_promotion_up(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    rollout = await start(manager, canary=canary(10))
    await until(manager, rollout, "CANARY")
    workers[1].slow = {2}
    workers[1].obey()
    await until(manager, rollout, "CANARY", holds=progress(("w1", "READY", True), ("w2", "WARMING", True)))

    call = manager.rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=rollout))

    message = rf"Rollout {rollout} cannot be promoted: w2 \(WARMING\)"
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)


@pytest.mark.parametrize("state", ["LOADING", "CANARY", "FLIPPING"])
async def test_an_abort_leaves_the_alias_with_the_old_version(
    manager: Manager, workers: list[ObedientWorker], state: str
) -> None:
    workers[0].slow = {2} if state == "LOADING" else set()
    window = Duration(seconds=100) if state == "FLIPPING" else Duration()
    steps = canary(50) if state == "CANARY" else None
    rollout = await start(manager, rollback_window=window, canary=steps)
    await until(manager, rollout, state)

    request = pb.AbortRolloutRequest(rollout=rollout, reason="labels look odd")
    aborted = (await manager.rollouts.AbortRollout(request)).rollout

    assert (state_name(aborted), aborted.reason, aborted.percent) == ("ABORTED", "labels look odd", 0)
    assert await alias(manager) == 1
    await workers[0].until(lambda worker: worker.held == [1])
    await manager.models.SetAlias(models_pb.SetAliasRequest(model="pii", alias="stable", model_version=2))


async def test_the_old_version_stays_loaded_until_the_rollback_window_ends(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    rollout = await start(manager, rollback_window=SECOND)
    await until(manager, rollout, "FLIPPING")
    await workers[0].until(lambda worker: worker.routes[-1] == {2: 1})

    assert workers[0].held == [1, 2]
    done = await until(manager, rollout, "SUCCEEDED")
    flipped, drained = done.events[2].time.ToNanoseconds(), done.events[3].time.ToNanoseconds()
    assert drained - flipped >= 10**9


async def test_a_worker_that_fails_after_the_flip_moves_the_alias_back(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    rollout = await start(manager, rollback_window=Duration(seconds=100))
    await until(manager, rollout, "FLIPPING")
    workers[1].failing = {2}
    workers[1].obey()

    failed = await until(manager, rollout, "FAILED")

    assert failed.percent == 0
    assert await alias(manager) == 1
    await workers[0].until(lambda worker: worker.routes[-1] == {1: 1})


async def test_the_old_version_stays_until_every_worker_follows(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    workers[1].slow = {2}
    rollout = await start(manager)
    await until(manager, rollout, "LOADING", holds=progress(("w1", "READY", True), ("w2", "WARMING", True)))
    workers[0].deaf = True
    workers[1].slow = set()
    workers[1].obey()
    await until(manager, rollout, "FLIPPING", holds=progress(("w1", "READY", False), ("w2", "READY", True)))

    workers[0].deaf = False
    workers[0].obey()

    await until(manager, rollout, "SUCCEEDED")


async def test_draining_is_in_nobodys_way(manager: Manager, workers: list[ObedientWorker]) -> None:
    workers[0].lingering = {1}
    first = await start(manager)
    await until(manager, first, "DRAINING")
    message = f"Rollout {first} is DRAINING and can no longer be aborted. .* rollout of pii@stable to 1"
    call = manager.rollouts.AbortRollout(pb.AbortRolloutRequest(rollout=first))
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)

    back = await start(manager, 1)  # for which the first need not wait any longer: its old version is wanted again

    await until(manager, first, "SUCCEEDED")
    await until(manager, back, "SUCCEEDED")
    assert await alias(manager) == 1


async def test_an_alias_under_a_rollout_cannot_be_moved_otherwise(
    manager: Manager, workers: list[ObedientWorker]
) -> None:
    workers[0].slow = {2}
    rollout = await start(manager)
    under = f"'stable' of model 'pii' is under rollout {rollout}"
    for call, message in (
        (manager.models.SetAlias(models_pb.SetAliasRequest(model="pii", alias="stable", model_version=2)), under),
        (manager.models.DeleteAlias(models_pb.DeleteAliasRequest(model="pii", alias="stable")), under),
        (push(manager, "pii", {"model.onnx": b"3"}, alias="stable"), under),
        (manager.rollouts.CreateRollout(pb.CreateRolloutRequest(spec=spec())), under),
        (
            manager.models.DeleteModelVersion(models_pb.DeleteModelVersionRequest(model="pii", model_version=2)),
            f"version 2 cannot be deleted: it is under rollout {rollout}",
        ),
    ):
        await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)
    found = await manager.models.ListModelVersions(models_pb.ListModelVersionsRequest(model="pii"))
    assert [version.model_version for version in found.model_versions] == [2, 1]

    workers[0].slow = set()
    workers[0].obey()

    await until(manager, rollout, "SUCCEEDED")


async def test_other_aliases_move_meanwhile(manager: Manager, workers: list[ObedientWorker]) -> None:
    workers[0].slow = {2}
    await until(manager, await start(manager), "LOADING")

    await manager.models.SetAlias(models_pb.SetAliasRequest(model="pii", alias="blue", model_version=1))
    await start(manager, 1, alias="green")

    assert await alias(manager, "blue") == 1


@pytest.mark.usefixtures("workers")
async def test_a_rollout_may_create_its_alias(manager: Manager) -> None:
    done = await until(manager, await start(manager, 2, alias="fresh"), "SUCCEEDED")

    assert done.old_model_version == 0
    assert await alias(manager, "fresh") == 2
    request = pb.CreateRolloutRequest(spec=spec(2, alias="newer", canary=canary(10)))
    await refused(
        manager,
        manager.rollouts.CreateRollout(request),
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.STATE_CONFLICT,
        "pii@newer names no version yet that a canary could be compared with",
    )


async def test_a_rollout_to_where_the_alias_is_already_is_refused(manager: Manager) -> None:
    call = manager.rollouts.CreateRollout(pb.CreateRolloutRequest(spec=spec(1)))
    message = "pii@stable names version 1 already"
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "PII"}, "'PII' cannot name a model"),
        ({"alias": "2"}, "'2' cannot name an alias"),
        ({"model_version": 0}, "spec.model_version is 0. Give the number of a version"),
        ({"loading_timeout": Duration(nanos=1)}, "spec.loading_timeout is 1e-09. Give 1 s or more"),
        ({"rollback_window": Duration(seconds=-1)}, "spec.rollback_window is -1.* Give 0 s or more"),
        ({"canary": canary()}, r"spec.canary.percents is \[\]. Give rising percents"),
        ({"canary": canary(0)}, r"percents is \[0\]"),
        ({"canary": canary(100)}, r"percents is \[100\]"),
        ({"canary": canary(50, 10)}, r"percents is \[50, 10\]"),
        ({"canary": canary(10, step_duration=Duration(seconds=-1))}, "step_duration is -1.* Give 0 s or more"),
        ({"canary": canary(10, min_requests=-1)}, "min_requests is -1. Give 0 for 100"),
        ({"canary": canary(10, max_error_rate=1.1)}, "max_error_rate is 1.1. Give a share from 0 to 1"),
        ({"canary": canary(10, max_error_rate=float("nan"))}, "max_error_rate is nan"),
        ({"canary": canary(10, max_p99=Duration())}, "max_p99 is 0.0. Give more than 0"),
        ({"canary": canary(10, max_p99_ratio=float("inf"))}, "max_p99_ratio is inf. Give more than 0"),
    ],
)
async def test_a_spec_that_makes_no_sense_is_refused(manager: Manager, changes: dict[str, Any], message: str) -> None:
    number = changes.pop("model_version", 2)
    call = manager.rollouts.CreateRollout(pb.CreateRolloutRequest(spec=spec(number, **changes)))

    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)


async def test_what_does_not_exist_is_said_to_not_exist(manager: Manager) -> None:
    rollouts, nowhere = manager.rollouts, grpc.StatusCode.NOT_FOUND
    for call in (
        rollouts.GetRollout(pb.GetRolloutRequest(rollout=7)),
        rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=7)),
        rollouts.AbortRollout(pb.AbortRolloutRequest(rollout=7)),
    ):
        await refused(manager, call, nowhere, Reason.ROLLOUT_NOT_FOUND, "There is no rollout 7; there is none yet")
    call = rollouts.CreateRollout(pb.CreateRolloutRequest(spec=spec(9)))
    await refused(manager, call, nowhere, Reason.MODEL_VERSION_NOT_FOUND, "no version 9; it has 2, 1")
    call = rollouts.CreateRollout(pb.CreateRolloutRequest(spec=spec(model="absent")))
    await refused(manager, call, nowhere, Reason.MODEL_NOT_FOUND, "No model 'absent'")


async def test_only_a_canary_can_be_promoted(manager: Manager) -> None:
    rollout = await start(manager)
    call = manager.rollouts.PromoteRollout(pb.PromoteRolloutRequest(rollout=rollout))
    message = f"Rollout {rollout} is (PENDING|LOADING), not CANARY"
    await refused(manager, call, grpc.StatusCode.FAILED_PRECONDITION, Reason.STATE_CONFLICT, message)


async def test_rollouts_are_listed_newest_first_by_page_model_and_alias(manager: Manager) -> None:
    for name in ("stable", "green", "stable", "stable"):
        number = await start(manager, alias=name)
        await manager.rollouts.AbortRollout(pb.AbortRolloutRequest(rollout=number))

    async def listed(**request: Any) -> tuple[list[int], str]:
        page = await manager.rollouts.ListRollouts(pb.ListRolloutsRequest(**request))
        return [one.rollout for one in page.rollouts], page.next_page_token

    assert await listed() == ([4, 3, 2, 1], "")
    assert await listed(model="pii", alias="stable") == ([4, 3, 1], "")
    assert await listed(model="other") == ([], "")
    numbers, token = await listed(model="pii", page_size=3)
    assert numbers == [4, 3, 2]
    assert await listed(model="pii", page_size=3, page_token=token) == ([1], "")
    call = manager.rollouts.ListRollouts(pb.ListRolloutsRequest(page_token=token))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "page_token")
    call = manager.rollouts.ListRollouts(pb.ListRolloutsRequest(alias="stable"))
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, "but no model is given")


async def test_an_abort_s_reason_has_an_end(manager: Manager) -> None:
    call = manager.rollouts.AbortRollout(pb.AbortRolloutRequest(rollout=1, reason="x" * 501))
    message = "reason has 501 characters. Give at most 500"
    await refused(manager, call, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_INPUT, message)
