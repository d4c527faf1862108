"""Whether the workers of a pool serve a model, each on the device that the pool is for."""

import time
from collections.abc import Iterator

from modelfleet.client.answers import Pool, PoolWorker
from modelfleet.client.client import Client
from modelfleet.runtime.errors import DeadlineExpiredError, StateConflictError

_POLL_S = 0.5


def wait_until_pool_serves(client: Client, name: str, provider: str, version: str, deadline: float) -> int:
    """
    Return how many workers of a pool are ready, once each of them serves `version` (as in `pii@3`) on `provider`.

    A pool that shall have none needs none. Raises PoolNotFoundError, StateConflictError for another provider, and
    DeadlineExpiredError, with what is missing, at a time of `monotonic`.
    """
    while True:
        pool = client.get_pool(name)
        problems = list(_problems(pool, provider, version))
        if not pool.desired_replicas or (pool.ready_replicas and not problems):
            return pool.ready_replicas
        if time.monotonic() > deadline:
            raise DeadlineExpiredError(f"Pool {name} does not serve: {'; '.join(problems) or 'it has no workers yet'}.")
        time.sleep(_POLL_S)


def _problems(pool: Pool, provider: str, version: str) -> Iterator[str]:
    """Yield what keeps ready workers from serving; without one, what keeps workers from being ready."""
    if not pool.ready_replicas:
        yield from filter(None, (pool.problem, *(worker.problem for worker in pool.workers)))
    for worker in pool.workers:
        if worker.ready and (problem := _problem(worker, provider, version)):
            yield f"{worker.worker} {problem}"


def _problem(worker: PoolWorker, provider: str, version: str) -> str:
    for held in worker.versions:
        if f"{held.model}@{held.model_version}" == version:
            if held.state != "READY":
                return f"says {held.state} {held.state_reason}".rstrip()
            if held.providers[0] != provider:
                raise StateConflictError(f"{worker.worker} answers on {held.providers[0]}, not on {provider}.")
            return ""
    return f"does not report {version}"
