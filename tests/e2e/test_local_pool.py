"""`modelfleet pools` over the processes of `modelfleet up`."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelfleet.client import Client
from modelfleet.runtime.errors import InvalidInputError
from modelfleet_tools.__main__ import app
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

_FREE_PORTS = [
    f"--{service}-{kind}=0" for service in ("inference", "tokenizer", "manager") for kind in ("port", "metrics-port")
]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[str]:
    """The manager's address under a `modelfleet up` that ends cleanly."""
    command = [sys.executable, "-m", "modelfleet_tools", "up", f"--data-dir={tmp_path}", "--json", *_FREE_PORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as up:
        assert up.stdout
        try:
            yield json.loads(up.stdout.readline())["addresses"]["manager"]
        finally:
            up.send_signal(signal.SIGTERM)
            assert up.wait(60) == 0


def test_workers_are_started_and_stopped_as_asked(manager: str) -> None:
    def scale(replicas: int) -> None:
        arguments = ["pools", "scale", "default", str(replicas), "--wait", "--wait-timeout", "60"]
        result = CliRunner().invoke(app, arguments, env={"MODELFLEET_MANAGER": manager})
        assert result.exit_code == 0, result.output

    with Client(manager=manager) as client:
        scale(2)
        assert [worker.worker for worker in client.get_pool("default").workers] == ["default-1", "default-2"]
        scale(1)
        assert [worker.worker for worker in client.get_pool("default").workers] == ["default-1"]
        with pytest.raises(InvalidInputError, match="at least 1"):
            client.scale_pool("default", 0)
