"""When a pool is taken to serve."""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from modelfleet.client.answers import Pool, PoolWorker, WorkerVersion
from modelfleet.runtime.errors import DeadlineExpiredError, StateConflictError
from modelfleet_tools.check_pools import wait_until_pool_serves

CUDA = "CUDAExecutionProvider"
READY = WorkerVersion("m", 2, "READY", "", (CUDA, "CPUExecutionProvider"))
WORKER = PoolWorker("w-1", "node", True, "image", "", 0, (READY,))


def pool(*workers: PoolWorker, desired: int = 1, problem: str = "") -> Pool:
    ready = sum(worker.ready for worker in workers)
    return Pool("a10", desired, ready, "nvidia.com/gpu", 1, (), problem, workers, datetime.now(UTC))


class Told:
    """A client whose manager tells of a pool what it is given, one after the other, the last for ever."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = list(pools)

    def get_pool(self, _name: str) -> Pool:
        return self._pools.pop(0) if len(self._pools) > 1 else self._pools[0]


def wait(*pools: Pool, seconds: float = 5) -> int:
    client: Any = Told(pools)
    return wait_until_pool_serves(client, "a10", CUDA, "m@2", time.monotonic() + seconds)


def test_it_waits_for_every_ready_worker() -> None:
    loading = replace(WORKER, worker="w-2", versions=(replace(READY, state="WARMING"),))

    assert wait(pool(WORKER, loading), pool(WORKER, replace(loading, versions=(READY,)))) == 2


def test_a_worker_that_is_not_ready_is_not_waited_for_beside_one_that_is() -> None:
    assert wait(pool(WORKER, replace(WORKER, worker="w-2", ready=False, problem="Unschedulable", versions=()))) == 1


def test_a_pool_that_shall_have_no_workers_needs_none() -> None:
    assert wait(pool(desired=0)) == 0


def test_another_provider_is_an_error_at_once() -> None:
    fallen_back = replace(READY, providers=("CPUExecutionProvider",))

    with pytest.raises(StateConflictError, match="w-1 answers on CPUExecutionProvider, not on CUDA"):
        wait(pool(replace(WORKER, versions=(fallen_back,))))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (pool(replace(WORKER, versions=())), "w-1 does not report m@2"),
        (
            pool(replace(WORKER, versions=(replace(READY, state="FAILED", state_reason="too large"),))),
            "w-1 says FAILED too large",
        ),
        (pool(replace(WORKER, ready=False, problem="Unschedulable: 1 Insufficient nvidia.com/gpu")), "Insufficient"),
        (pool(problem="FailedCreate: exceeded quota"), "FailedCreate: exceeded quota"),
        (pool(), "it has no workers yet"),
    ],
)
def test_at_the_end_it_says_what_is_missing(found: Pool, message: str) -> None:
    with pytest.raises(DeadlineExpiredError, match=f"Pool a10 does not serve: .*{message}"):
        wait(found, seconds=0)
