"""
Load on a local cluster while each service in turn is killed with -9 and started again: `make soak`.

Every answer is compared with the one that the quiet cluster gave. Prints counts of answers and of errors by code, and
exits with 1 when an answer was wrong or when nothing was answered between two kills.
"""

import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from load.callers import COLUMNS, Load, client_of, expected_answers, push_sample
from modelfleet_tools.cluster import LocalCluster, Service
from modelfleet_tools.output import print_table

_CALLERS = 8


def main(
    seconds: Annotated[float, typer.Option(help="How long to load the cluster.")] = 600,
    kill_every: Annotated[float, typer.Option(help="Seconds from one kill to the next.")] = 15,
) -> None:
    """Load a local cluster while its services are killed."""
    load = asyncio.run(_soak(seconds, kill_every))
    print_table("Load while services are killed with -9 and started again", COLUMNS, load.rows())
    sys.exit(any(phase.wrong or not phase.answers for phase in load.phases))


async def _soak(seconds: float, kill_every: float) -> Load:
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data)) as cluster, client_of(cluster) as client:
            await push_sample(client, cluster)
            load = Load(await expected_answers(client))
            load.begin("nothing")
            async with load.callers(client, _CALLERS):
                await _kill_in_turn(cluster, load, seconds, kill_every)
    return load


async def _kill_in_turn(cluster: LocalCluster, load: Load, seconds: float, kill_every: float) -> None:
    deadline = time.monotonic() + seconds
    turn = 0
    order = tuple(Service)
    await asyncio.sleep(kill_every)
    while time.monotonic() < deadline:
        service = order[turn % len(order)]
        turn += 1
        load.begin(f"kill {service.value}")
        cluster.kill(service, signal.SIGKILL)
        await asyncio.to_thread(cluster.wait_for_exit, service)
        await asyncio.to_thread(cluster.restart, service)
        await asyncio.sleep(kill_every)


if __name__ == "__main__":
    typer.run(main)
