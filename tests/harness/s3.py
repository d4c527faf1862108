"""A real S3 endpoint for tests: SeaweedFS, which checks signatures and their expiry."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from harness.bucket import Bucket

_PROGRAM = Path(sys.executable).with_name("weed")
_PORTS = tuple(f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc"))
_FLAGS = ("-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-master.volumeSizeLimitMB=64")
_START_S = 30
_BUCKET = "tests"
_KEY, _SECRET = "key", "secret"


@dataclass(frozen=True)
class S3:
    """Where the endpoint listens, and what clients of it have in their environment."""

    endpoint: str

    def new_bucket(self) -> Bucket:
        """Return a prefix that nobody else has."""
        return Bucket(f"s3://{_BUCKET}/some/{uuid4().hex}")

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which SDKs of AWS find an endpoint."""
        return {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }


@contextmanager
def running_s3() -> Iterator[S3]:
    """Serve until the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="modelfleet-s3-"))
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    s3 = S3(f"http://127.0.0.1:{ports['s3.port']}")
    flags = [*_FLAGS, *(f"-{name}={port}" for name, port in ports.items())]
    # It ends with the tests, also when these are killed.
    command = [
        "setpriv",
        "--pdeathsig=KILL",
        _PROGRAM,
        "-logtostderr",
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={directory}",
        *flags,
    ]
    try:
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(command, env={**os.environ, **s3.environment}, stderr=log, stdout=log)
        try:
            _wait_for(s3, process, directory / "log")
            yield s3
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(directory)
        for port in ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


def _wait_for(s3: S3, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once the bucket is there, which is made with its first object."""
    store = S3Store(
        _BUCKET,
        access_key_id=_KEY,
        secret_access_key=_SECRET,
        endpoint=s3.endpoint,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    until = time.monotonic() + _START_S
    while True:
        try:
            obstore.put(store, "x", b"x")
        except BaseError as error:
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError(log.read_text()[-4000:]) from error
            time.sleep(0.05)
        else:
            return


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
