"""A service as a child process, and its log."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LAST_LINES = 8


class ServiceProcess:
    """A process and the part of its log file that is its own."""

    def __init__(self, command: Sequence[str], log_path: Path) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            # A group of its own, so that Ctrl-C in a terminal reaches this process alone, which then stops in order.
            self.process = subprocess.Popen(  # noqa: S603  our own modules
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ, process_group=0
            )

    def terminate(self, timeout_s: float) -> None:
        """Send SIGTERM and wait; send SIGKILL after `timeout_s`."""
        self.process.send_signal(signal.SIGCONT)  # a stopped process would never hear the next one
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def logged_port(self, event: str) -> int | None:
        """Return the port that the process has logged with `event`."""
        entries = (_entry(line) for line in self._lines())
        return next((int(entry["port"]) for entry in entries if entry.get("event") == event), None)

    def last_lines(self) -> list[str]:
        """Return the end of the log, tracebacks of JSON lines left out."""
        return [_shown(line) for line in self._lines()[-_LAST_LINES:]]

    def _lines(self) -> list[str]:
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            whole, _, _ = log.read().rpartition(b"\n")
        return whole.decode(errors="replace").splitlines()


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _shown(line: str) -> str:
    entry = _entry(line)
    if "event" not in entry:
        return line
    level, event = entry.pop("level", "info"), entry.pop("event")
    errors = [f"{error['exc_type']}: {error['exc_value']}" for error in entry.pop("exception", ())]
    values = [f"{key}={value}" for key, value in entry.items() if key not in ("timestamp", "service")]
    return " ".join((level, event, *values, *errors))
