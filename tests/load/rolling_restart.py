"""
A rolling restart under load: every replica of every service is ended by SIGTERM in turn and started again.

Two workers and two tokenizers behind one client each, as on Kubernetes; the manager has one replica, which requests do
not need. Every answer is compared with the one of the quiet cluster. Prints a table and exits with 1 when a request
failed or was answered wrongly: `make soak-restart`.
"""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from load.callers import COLUMNS, Load, client_of, expected_answers, push_sample
from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.output import print_table

REPLICAS = ("manager", "tokenizer", "tokenizer-2", "inference", "inference-2")
_CALLERS = 8


async def restart_in_turn(
    *, replicas: Sequence[str] = REPLICAS, rounds: int = 1, rest_s: float = 1.0, callers: int = _CALLERS
) -> Load:
    """Load a cluster that serves the sample, restart each replica in turn, and return what callers saw."""
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data), tokenizers=2, workers=2) as cluster, client_of(cluster) as client:
            await push_sample(client, cluster)
            load = Load(await expected_answers(client))
            load.begin("nothing")
            async with load.callers(client, callers):
                await asyncio.sleep(rest_s)
                for _ in range(rounds):
                    for replica in replicas:
                        load.begin(f"restart {replica}")
                        await asyncio.to_thread(cluster.restart, replica)
                        await asyncio.sleep(rest_s)  # the load goes on before the next one leaves
    return load


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each replica is restarted.")] = 5,
    rest: Annotated[float, typer.Option(help="Seconds from one restart to the next.")] = 2.0,
) -> None:
    """Restart every replica of a local cluster in turn, under load."""
    load = asyncio.run(restart_in_turn(rounds=rounds, rest_s=rest))
    print_table("Rolling restart under load", COLUMNS, load.rows())
    sys.exit(any(phase.errors or phase.wrong for phase in load.phases))


if __name__ == "__main__":
    typer.run(main)
