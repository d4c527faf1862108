"""Pools: workers that are alike in hardware, wherever they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from modelfleet.runtime.errors import InvalidInputError, PoolNotFoundError

MOST_REPLICAS = 10_000


@dataclass(frozen=True, slots=True)
class PoolWorker:
    """A worker of a pool. `problem` says what keeps it from being ready; fields that the place lacks are empty."""

    worker: str
    ready: bool
    problem: str = ""
    node: str = ""
    image: str = ""
    restart_count: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool as it was at `observe_time`; workers are ordered by name. `problem` keeps it from having its workers."""

    pool: str
    desired_replicas: int
    ready_replicas: int
    workers: tuple[PoolWorker, ...]
    observe_time: datetime
    gpu_resource: str = ""
    gpus_per_worker: int = 0
    images: tuple[str, ...] = ()
    problem: str = ""
    autoscaler: str = ""
    """What changes the number of workers by itself, empty for nothing."""
    scaled_by_release: bool = False
    """Whether its Helm release sets the number of workers."""


class Pools(Protocol):
    """Where pools are known and scaled."""

    async def run(self) -> None:
        """Keep what is known up to date until cancelled."""

    async def list(self) -> tuple[Pool, ...]:
        """Return the pools ordered by name. Raises KubernetesUnreachableError while nothing is known."""

    async def scale(self, pool: str, replicas: int) -> Pool:
        """
        Ask for `replicas` workers, 0 to 10,000, and return the pool with that number.

        Raises PoolNotFoundError, StateConflictError where it cannot be scaled, KubernetesUnreachableError, and
        OverloadedError when the API turns the call away.
        """


def find_pool(pools: Sequence[Pool], name: str) -> Pool:
    """Return the pool of this name. Raises PoolNotFoundError, naming those that there are."""
    for pool in pools:
        if pool.pool == name:
            return pool
    known = ", ".join(pool.pool for pool in pools) or "none"
    raise PoolNotFoundError(f"There is no pool {name!r}. Pools: {known}.", field="pool")


def check_replicas(replicas: int) -> None:
    """Raise InvalidInputError unless a pool can have this many workers."""
    if not 0 <= replicas <= MOST_REPLICAS:
        raise InvalidInputError(f"replicas is {replicas}. Give 0 to {MOST_REPLICAS}.", field="replicas")
