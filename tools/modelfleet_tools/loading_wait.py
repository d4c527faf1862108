"""Waiting until a worker has a version, as the manager hears it from the workers."""

import time

from modelfleet.client.answers import WorkerVersion
from modelfleet.client.client import Client
from modelfleet.runtime.errors import DeadlineExpiredError, StateConflictError, UnavailableError

from modelfleet_tools.output import tell

_POLL_S = 0.1
_SILENT_S = 2.0


def wait_until_loaded(client: Client, model: str, model_version: int, timeout_s: float) -> WorkerVersion:
    """
    Return what a worker says of a version that it has READY; a wait longer than 2 s says for whom, and what it hears.

    Raises StateConflictError where every worker that has tried it has FAILED, and DeadlineExpiredError.
    """
    began, told = time.monotonic(), ""
    while True:
        heard, said = _heard(client, model, model_version)
        if ready := next((version for version in heard.values() if version.state == "READY"), None):
            return ready
        if heard and all(version.state == "FAILED" for version in heard.values()):
            worker, version = next(iter(heard.items()))
            raise StateConflictError(
                f"{model}@{model_version} cannot be served: {version.state_reason.rstrip('.')} (on {worker})."
            )
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise DeadlineExpiredError(f"{model}@{model_version} is not served after {timeout_s:g} s: {said}.")
        if waited_s > _SILENT_S and said != told:
            tell(f"Waiting for {model}@{model_version}: {said}")
            told = said
        time.sleep(_POLL_S)


def _heard(client: Client, model: str, model_version: int) -> tuple[dict[str, WorkerVersion], str]:
    """Return what each worker says of the version, by name and pool, and all of it in words."""
    try:
        workers = {f"{one.worker} of pool {pool.pool}": one for pool in client.pools() for one in pool.workers}
    except UnavailableError as error:
        return {}, f"the manager does not answer ({error.message.rstrip('.')})"
    heard = {
        name: version
        for name, worker in workers.items()
        for version in worker.versions
        if (version.model, version.model_version) == (model, model_version)
    }
    if heard:
        words = (f"{name} says {one.state} {one.state_reason}".rstrip() for name, one in heard.items())
        return heard, ", ".join(words)
    problems = [f"{name} ({worker.problem})" if worker.problem else name for name, worker in workers.items()]
    return heard, f"no worker has taken it up yet; there is {', '.join(problems) or 'none'}"
