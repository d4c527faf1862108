"""Services as processes, known by what they log."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ServiceProcess:
    """A process that logs JSON lines to standard error; `events` are those logged so far, `others` what is none."""

    process: "subprocess.Popen[str]"
    port: int = 0
    metrics_port: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def follow(self) -> Iterator[dict[str, Any]]:
        """Yield events until the process closes its standard error."""
        for line in self.process.stderr or ():
            if line.startswith("{"):
                self.events.append(json.loads(line))
                yield self.events[-1]
            else:
                self.others.append(line)


@contextmanager
def service_process(*arguments: str) -> Iterator[ServiceProcess]:
    """Run Python with `arguments` until the block ends, from when it listens on; what still runs then is killed."""
    # Finds the servers of the harness too.
    paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        service = ServiceProcess(process)
        events = service.follow()
        for event in events:
            if event["event"] == "metrics":
                service.metrics_port = event["port"]
            elif event["event"] == "listening":
                service.port = event["port"]
                break
        else:
            raise RuntimeError(f"{arguments} ended before it listened: {service.events}")
        # Read on, so that the process never waits for its log to be read.
        reader = threading.Thread(target=lambda: list(events))
        reader.start()
        try:
            yield service
        finally:
            process.kill()
            reader.join()
