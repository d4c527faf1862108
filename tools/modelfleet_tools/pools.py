"""`modelfleet pools list | show | scale`."""

import time
from typing import Annotated, TypeAlias

import typer
from modelfleet.client.answers import Pool, PoolWorker
from modelfleet.client.client import Client
from modelfleet.runtime.errors import DeadlineExpiredError

from modelfleet_tools.exit_codes import Commands
from modelfleet_tools.options import DEFAULT_TIMEOUT_S, JsonOption, ManagerOption, TimeoutOption, open_client
from modelfleet_tools.output import print_json, print_table, tell

_POLL_S = 1.0

commands = typer.Typer(
    cls=Commands, help="Show pools of workers, and change how many they have.", rich_markup_mode=None
)

PoolArgument: TypeAlias = Annotated[str, typer.Argument(metavar="POOL", help="The pool's name.")]


@commands.callback(invoke_without_command=True)
def pools(context: typer.Context) -> None:
    """Show pools of workers, and change how many they have."""
    if context.invoked_subcommand is None:
        list_pools()


@commands.command(name="list")
def list_pools(
    *,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    List the pools.

    Example: modelfleet pools list --json
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        found = client.pools()
    if as_json:
        print_json({"pools": found})
        return
    rows = (
        (
            pool.pool,
            f"{pool.ready_replicas}/{pool.desired_replicas}",
            f"{pool.gpus_per_worker} {pool.gpu_resource}" if pool.gpu_resource else "none",
            ", ".join(pool.images) or "none",
            pool.problem or next(filter(None, map(_problem, pool.workers)), ""),
        )
        for pool in found
    )
    print_table("Pools", ("pool", "ready", "GPU of each", "images", "problem"), rows)


@commands.command()
def show(
    pool: PoolArgument,
    *,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Show the workers of a pool: where they run, what they serve, and what keeps them from it.

    Example: modelfleet pools show default
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        found = client.get_pool(pool)
    if as_json:
        print_json(found)
    else:
        _print_workers(found)


@commands.command()
def scale(
    pool: PoolArgument,
    replicas: Annotated[int, typer.Argument(metavar="NUMBER", min=0, help="Workers that it shall have.")],
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Return only when so many are ready.")] = False,
    wait_timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest wait.")] = 1800,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Change how many workers a pool has. Workers that go drain first.

    A pool whose number of workers is set by an autoscaler or by its Helm release is left to that.

    Example: modelfleet pools scale default 4 --wait
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        found = client.scale_pool(pool, replicas)
        if wait:
            tell(f"Waiting until {pool} has {replicas} ready workers …")
            found = _wait_until_ready(client, pool, replicas, wait_timeout)
    if as_json:
        print_json(found)
    else:
        print(f"{pool} shall have {found.desired_replicas} workers; {found.ready_replicas} are ready")


def _wait_until_ready(client: Client, pool: str, replicas: int, timeout_s: float) -> Pool:
    deadline = time.monotonic() + timeout_s
    while True:
        found = client.get_pool(pool)
        if len(found.workers) == found.ready_replicas == replicas:
            return found
        if time.monotonic() > deadline:
            problems = "; ".join(f"{one.worker}: {one.problem}" for one in found.workers if one.problem)
            raise DeadlineExpiredError(
                f"{pool} has {found.ready_replicas} of {replicas} workers after {timeout_s:g} s. {problems}"
            )
        time.sleep(_POLL_S)


def _print_workers(pool: Pool) -> None:
    title = f"{pool.pool}: {pool.ready_replicas} of {pool.desired_replicas} workers ready"
    rows = (
        (
            worker.worker,
            worker.node or "none",
            "yes" if worker.ready else "no",
            worker.restart_count,
            _versions(worker),
            _problem(worker),
        )
        for worker in pool.workers
    )
    print_table(title, ("worker", "node", "ready", "restarts", "versions", "problem"), rows)
    if pool.problem:
        tell(f"Not all workers can be made: {pool.problem}")
    tell(f"As of {pool.observe_time:%Y-%m-%d %H:%M:%S} UTC.")


def _versions(worker: PoolWorker) -> str:
    return ", ".join(f"{one.model}@{one.model_version} {one.state}" for one in worker.versions) or "none"


def _problem(worker: PoolWorker) -> str:
    """Return what keeps a worker from being ready, or from serving one of its versions."""
    failed = (
        f"{one.model}@{one.model_version}: {one.state_reason}" for one in worker.versions if one.state == "FAILED"
    )
    return worker.problem or "; ".join(failed)
