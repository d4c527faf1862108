"""A real S3 endpoint for tests: rclone, which checks signatures and their expiry, over a directory."""

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

_PROGRAM = Path(sys.executable).with_name("rclone")
_SERVING = re.compile(r"Starting s3 server on \[(http://127\.0\.0\.1:\d+)/\]")
_KEY, _SECRET = "key", "secret"


@dataclass(frozen=True)
class S3:
    """Where the endpoint listens and keeps its buckets, and what clients of it have in their environment."""

    endpoint: str
    directory: Path

    def new_bucket(self) -> str:
        """Return the name of a new empty bucket."""
        name = f"test-{uuid4().hex}"
        (self.directory / name).mkdir()
        return name

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which SDKs of AWS find an endpoint."""
        return {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
        }


@contextmanager
def running_s3() -> Iterator[S3]:
    """Serve until the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="modelfleet-s3-"))
    command = [_PROGRAM, "serve", "s3", "--config=", f"--auth-key={_KEY},{_SECRET}", "--addr=127.0.0.1:0", directory]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr or ())
            told: list[str] = []
            for line in lines:
                told.append(line)
                if serving := _SERVING.search(line):
                    break
            else:
                raise RuntimeError("".join(told))
            # Read on, so that it never waits for its log to be read.
            reader = threading.Thread(target=lambda: list(lines))
            reader.start()
            yield S3(serving[1], directory)
        finally:
            process.kill()
            shutil.rmtree(directory)
        reader.join()
