"""
A manager that is gone for five minutes, under load: `make soak-outage`.

It is killed with -9 when a model has just been loaded and nobody has asked for it; then both the worker and the
tokenizer are killed and started again. Every answer is compared with that of another cluster, which has its manager.
Prints counts of answers and of errors by code, and exits with 1 when an answer was wrong, when nothing was answered in
some phase, or when the model is not there afterwards.
"""

import asyncio
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from load.callers import COLUMNS, MODEL, Load, client_of, expected_answers, push_sample
from modelfleet_tools.cluster import LocalCluster, Service
from modelfleet_tools.output import print_table

_CALLERS = 4


def main(seconds: Annotated[float, typer.Option(help="How long the manager is gone.")] = 300) -> None:
    """Take the manager away from a local cluster under load."""
    load = asyncio.run(_outage(seconds))
    print_table(f"Load while the manager is gone for {seconds:g} s", COLUMNS, load.rows())
    sys.exit(any(phase.wrong or not phase.answers for phase in load.phases))


async def _outage(seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data)) as cluster, client_of(cluster) as client:
            await push_sample(client, cluster)
            load = Load(await expected_answers(client))
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data)) as cluster, client_of(cluster) as client:
            await push_sample(client, cluster)
            await _kill(cluster, Service.MANAGER)
            load.begin("manager gone")
            async with load.callers(client, _CALLERS):
                await asyncio.sleep(seconds / 3)
                for service in (Service.INFERENCE, Service.TOKENIZER):
                    load.begin(f"kill {service.value} meanwhile")
                    await _kill(cluster, service)
                    await asyncio.to_thread(cluster.restart, service)
                    await asyncio.sleep(seconds / 3)
                load.begin("manager back")
                await asyncio.to_thread(cluster.restart, Service.MANAGER)
                await asyncio.sleep(seconds / 10)
            await client.get_model_version(MODEL)
    return load


async def _kill(cluster: LocalCluster, service: Service) -> None:
    cluster.kill(service, signal.SIGKILL)
    await asyncio.to_thread(cluster.wait_for_exit, service)


if __name__ == "__main__":
    typer.run(main)
