"""The three services as processes, and the commands that run them."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.bundle_graphs import write_graph
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient, Client
from modelfleet.runtime.errors import StateConflictError, UnavailableError
from modelfleet_tools.cluster import LocalCluster, Service

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]
FREE_PORTS = [flag for service in Service for flag in (f"--{service}-port", "0", f"--{service}-metrics-port", "0")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster that tests leave running."""
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def command(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "modelfleet_tools", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        **options,
    )


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_cluster_serves_on_ipv6(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_graph(folder / "model.onnx")

    with LocalCluster(tmp_path / "data", host="::1", workers=2) as cluster:
        addresses = cluster.addresses
        with Client(inference=addresses.inference, manager=addresses.manager) as client:
            client.push(*open_directory(folder), "m", alias="stable")
            client.wait_until_served("m", timeout_s=30)
        with urllib.request.urlopen(cluster.metrics_url("manager"), timeout=10) as answer:
            assert answer.status == 200

    assert addresses.manager.startswith("[::1]:")
    assert addresses.inference.startswith("ipv6:[::1]:")


async def test_a_cluster_serves_while_its_context_lasts(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_graph(folder / "model.onnx")

    async with LocalCluster(tmp_path / "data") as cluster:
        addresses = cluster.addresses
        pids = [cluster.pid(service) for service in Service]
        async with AsyncClient(inference=addresses.inference, manager=addresses.manager) as client:
            await client.push(*open_directory(folder), "m", alias="stable")
            await client.wait_until_served("m")

    assert cluster.exit_codes == dict.fromkeys(Service, 0)
    assert not any(is_running(pid) for pid in pids)


def test_metrics_are_where_the_cluster_says(cluster: LocalCluster) -> None:
    for service in Service:
        with urllib.request.urlopen(cluster.metrics_url(service)) as metrics:
            assert b"modelfleet_rpc_seconds" in metrics.read()


def test_a_service_that_was_killed_is_named_and_restarts_on_its_port(cluster: LocalCluster) -> None:
    before = cluster.addresses

    cluster.kill(Service.TOKENIZER)
    with pytest.raises(UnavailableError, match="The tokenizer was ended by SIGKILL") as caught:
        cluster.watch()
    cluster.restart(Service.TOKENIZER)

    assert "info listening port=" in caught.value.message
    assert cluster.addresses == before


def test_a_service_that_drains_for_too_long_is_killed(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, flags={Service.MANAGER: ["--drain-delay-s", "60"]}, stop_timeout_s=2)

    with cluster:
        cluster.kill(Service.TOKENIZER, signal.SIGSTOP)  # woken to drain as the others

    assert cluster.exit_codes == {Service.INFERENCE: 0, Service.TOKENIZER: 0, Service.MANAGER: -signal.SIGKILL}


def test_two_clusters_do_not_share_a_data_directory(cluster: LocalCluster) -> None:
    with pytest.raises(StateConflictError, match=f"Another cluster uses {cluster.data_dir}"):
        LocalCluster(cluster.data_dir).start()

    assert is_running(cluster.pid(Service.MANAGER))


def test_a_service_that_cannot_start_is_named_with_its_log_and_the_others_are_stopped(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    taken = int(cluster.addresses.manager.rpartition(":")[2])
    second = LocalCluster(tmp_path / "second", ports={Service.INFERENCE: taken})

    with pytest.raises(UnavailableError, match="The inference exited with code 1") as caught:
        second.start()

    assert f"Cannot listen on 127.0.0.1:{taken}" in caught.value.message
    assert second.exit_codes[Service.MANAGER] == 0


def test_up_serves_until_it_is_told_to_stop_and_ends_with_0(tmp_path: Path) -> None:
    with command("up", "--data-dir", str(tmp_path), "--json", *FREE_PORTS) as up:
        told = json.loads(up.stdout.readline())
        with Client(inference=told["addresses"]["inference"]) as client:
            assert client.served_models() == ()
        up.send_signal(signal.SIGTERM)
        _, errors = up.communicate(timeout=30)

    assert up.returncode == 0
    assert errors.splitlines()[-1] == "Stopped."
    assert Path(told["logs"]["inference"]).read_text()


def test_up_ends_with_3_when_a_service_dies_and_stops_the_others(tmp_path: Path) -> None:
    with command("up", "--data-dir", str(tmp_path), "--json", *FREE_PORTS) as up:
        up.stdout.readline()
        children = Path(f"/proc/{up.pid}/task/{up.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, errors = up.communicate(timeout=30)

    assert up.returncode == 3
    assert "Error: The manager was ended by SIGKILL. Its log" in errors
    assert "Traceback" not in errors
    assert not any(is_running(int(pid)) for pid in children)


def test_ctrl_c_in_a_terminal_stops_the_services_in_order(tmp_path: Path) -> None:
    with command("up", "--data-dir", str(tmp_path), "--json", *FREE_PORTS, process_group=0) as up:
        up.stdout.readline()
        os.killpg(up.pid, signal.SIGINT)
        up.communicate(timeout=30)

    assert up.returncode == 0


def test_the_demo_runs_the_main_job_and_stops_cleanly() -> None:
    with command("demo") as demo:
        shown, errors = demo.communicate(timeout=110)

    assert demo.returncode == 0, errors
    for words in ("pii@1", "Ada", "GIVEN_NAME", "grace.hopper@gmail.com", "(415) 555-0132", "alan.turing@gmail.com"):
        assert words in shown
    assert "All services are stopped" in errors
