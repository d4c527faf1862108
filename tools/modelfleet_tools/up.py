"""`modelfleet up`: the three services on this machine until Ctrl-C."""

import dataclasses
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, TypeAlias

import typer
from modelfleet.runtime.errors import InternalError

from modelfleet_tools.cluster import LocalCluster, Service
from modelfleet_tools.options import JsonOption
from modelfleet_tools.output import print_json, print_table, tell

DEFAULT_DATA_DIR = Path(".cache/modelfleet")

DeviceOption: TypeAlias = Annotated[
    Literal["cpu", "cuda", "tensorrt"], typer.Option(help="What models run on. One that is not there is an error.")
]
_Port: TypeAlias = Annotated[int, typer.Option(min=0, max=65535, help="Port of the service; 0 picks a free one.")]
_MetricsPort: TypeAlias = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of its metrics; 0 picks a free one.")
]


def up(
    *,
    data_dir: Annotated[
        Path, typer.Option(envvar="MODELFLEET_DATA_DIR", file_okay=False, help="Keeps models, caches and logs.")
    ] = DEFAULT_DATA_DIR,
    device: DeviceOption = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on. Others than loopback are reachable by anyone.")] = (
        "127.0.0.1"
    ),
    inference_port: _Port = 8001,
    tokenizer_port: _Port = 8002,
    manager_port: _Port = 8003,
    inference_metrics_port: _MetricsPort = 9001,
    tokenizer_metrics_port: _MetricsPort = 9002,
    manager_metrics_port: _MetricsPort = 9003,
    as_json: JsonOption = False,
) -> None:
    """
    Start the three services on this machine and serve until Ctrl-C or SIGTERM.

    Ends with 0 after a clean stop, and with 3, naming the service and why, when one cannot start or dies; the others
    are stopped then.

    Example: modelfleet up --data-dir /var/lib/modelfleet --inference-port 0
    """
    cluster = LocalCluster(
        data_dir,
        device=device,
        host=host,
        ports={
            Service.INFERENCE: inference_port,
            Service.TOKENIZER: tokenizer_port,
            Service.MANAGER: manager_port,
        },
        metrics_ports={
            Service.INFERENCE: inference_metrics_port,
            Service.TOKENIZER: tokenizer_metrics_port,
            Service.MANAGER: manager_metrics_port,
        },
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    tell("Starting …")
    with cluster:
        try:
            _print_addresses(cluster, as_json=as_json)
            cluster.watch(lambda: tell(f"Workers are at {cluster.addresses.inference}"))
        except KeyboardInterrupt:
            tell("Stopping …")
    failed = [f"the {service} with {code}" for service, code in cluster.exit_codes.items() if code]
    if failed:
        raise InternalError(f"Not stopped cleanly: {', '.join(failed)} ended. Their logs are in {data_dir / 'logs'}.")
    tell("Stopped.")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print_addresses(cluster: LocalCluster, *, as_json: bool) -> None:
    addresses = dataclasses.asdict(cluster.addresses)
    if as_json:
        logs = {service.value: str(cluster.log_path(service)) for service in Service}
        metrics = {service.value: cluster.metrics_url(service) for service in Service}
        print_json({"addresses": addresses, "metrics": metrics, "logs": logs})
        return
    rows = (
        (service.value, addresses[service.value], cluster.metrics_url(service), cluster.log_path(service))
        for service in reversed(Service)
    )
    print_table("Serving", ("service", "address", "metrics", "log"), rows)
    tell("Ctrl-C stops.")
